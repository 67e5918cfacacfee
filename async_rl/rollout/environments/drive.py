"""Drives one environment through its rollout: what the policy says goes to its step or its tools, until it is done.

What the policy does wrong with tools is answered by a message that names the fault, and counted; what the environment
does wrong is a ``Failed``. A rollout that was cut off begins with its ``Progress``: the environment, which is another
one, is set to the state of then, or has all turns again. Knows the policy and ``Held``; neither hosts nor groups.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

from async_rl.config.rollouts import AgentSection, Recovery
from async_rl.data.messages import Message
from async_rl.errors import RequestRefused
from async_rl.rollout.deadline import wait_in_time
from async_rl.rollout.environments.instance import Failed, Gone, Held
from async_rl.rollout.environments.interface import Context, Task
from async_rl.rollout.environments.progress import Exchange, Progress, Said
from async_rl.rollout.environments.tools import BadCall, Tool, ToolCall, checked_call
from async_rl.rollout.gate import Gate
from async_rl.rollout.policy import Policy, Reply
from async_rl.types import Int32Array

Stage = Literal["setup", "step", "score", "play"]

_T = TypeVar("_T")


class Late(Failed):
    """A stage was ended at its time limit."""


class Differs(Failed):
    """The environment cannot be brought to where the rollout was: it answers other than it did, or has no state."""


@dataclass(slots=True)
class Counts:
    """What the environments of a worker did so far."""

    tool_calls: Counter[str] = field(default_factory=Counter)
    """By result: ok, or what was wrong."""
    late: Counter[str] = field(default_factory=Counter)
    """Calls that were ended at their time limit, by stage."""
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Time by stage, that of the policy and the wait for a place included."""
    recoveries: Counter[str] = field(default_factory=Counter)
    """Rollouts that were continued with another environment, or begun again, by which of these and how."""


@dataclass(frozen=True, slots=True)
class Played:
    """How a rollout with an environment ended."""

    reward: Any
    """A number, a mapping of named numbers, or None: see ``rewards.score.score_of``."""
    truncated: bool
    """Whether the environment said that it ends at a limit."""
    metrics: Mapping[str, float]
    """What its steps and tools said beside their rewards, by name; of several the last."""
    turn_rewards: Mapping[int, float]
    """The rewards of its steps and tools, by the index of the turn that they followed."""


class Stages:
    """Limits the stages of an environment in time, without the pauses of the engine behind ``gate``."""

    def __init__(
        self, settings: AgentSection, section: str, gate: Gate, counts: Counts, left: set[asyncio.Task[Any]]
    ) -> None:
        """``section`` is that of the settings.

        ``left`` keeps what was cancelled and has perhaps not ended: the loop has weak references alone.
        """
        self._section = section
        self._limits: dict[Stage, float | None] = {
            "setup": settings.setup_s,
            "step": settings.step_s,
            "score": settings.score_s,
            "play": None,  # rollout.agent.timeout_s limits it, as any agent
        }
        self._gate = gate
        self.counts = counts
        self._left = left

    async def limited(self, stage: Stage, work: Coroutine[Any, Any, _T], what: str | None = None) -> _T:
        """Return what ``work`` returns, which errors call ``what``, or as its stage.

        Raises Late, without waiting for its end, when the stage's time is over.
        """
        limit, task = self._limits[stage], asyncio.create_task(work)
        began = time.monotonic()
        try:
            _, late = await wait_in_time([task], self._gate, limit)
        finally:
            self.counts.seconds[stage] += time.monotonic() - began
            if not task.done():
                task.cancel()
                self._left.add(task)
                task.add_done_callback(self._forget)
        if late:
            self.counts.late[stage] += 1
            raise Late(f"its {what or stage} has not ended after {limit:g} s ({self._section}.{stage}_s)")
        return task.result()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._left.discard(task)
        if not task.cancelled():
            task.exception()  # Else asyncio logs it.


Keep = Callable[[Progress], None]

_Answer = Callable[[Said], Awaitable[Sequence[Message]]]
"""(a turn of the policy) -> what the environment says after it."""


async def drive(
    held: Held,
    task: Task,
    context: Context,
    token_ids: Int32Array,
    policy: Policy,
    stages: Stages,
    *,
    recovery: Recovery = "restart",
    before: Progress | None = None,
    keep: Keep = lambda _: None,
) -> Played:
    """Return how the rollout of an environment ended. Raises Failed, and what the policy raises but refusals at limits.

    token_ids: int32[P], with which the policy begins where neither row nor environment has messages. before: what the
    rollout was when it was cut off; the policy has what it had then. recovery: how the environment is brought there.
    keep: is called with each progress. Raises Differs where the environment cannot be brought there.
    """
    begun = await stages.limited("setup", held.setup(asdict(task), asdict(context)))
    if begun["plays"]:
        if recovery != "restart":
            raise Failed(f"makes whole rollouts itself, which {recovery} cannot continue; set its recovery to restart")
        address = {"base_url": policy.base_url, "api_key": policy.api_key, "model": policy.model}
        whole = await stages.limited("play", held.play(address))
        return Played(whole["reward"], whole["truncated"], whole["metrics"], {})
    messages = begun["messages"] or task.messages
    if messages is None and begun["tools"]:
        raise Failed("has tools, for which the prompt must be messages; return some from setup, or set data.format")
    rollout = _Rollout(held, begun["tools"], stages)
    answer = rollout.step_after if begun["steps"] else rollout.tools_after

    async def noted(progress: Progress) -> Progress:
        """Keep a progress at the end of a step, with the environment's state where that is asked for."""
        if recovery == "state":
            state = await stages.limited("step", held.get_state(), "get_state")
            progress = replace(progress, state=state)
        keep(progress)
        return progress

    start = Progress(None if messages is None else tuple(messages), tuple(begun["tools"]))
    if before is None:
        progress = await noted(start)
    else:
        if start.tools != before.tools:
            raise Differs("its tools are not those that it had")
        if recovery == "replay":
            await _play_again(start, before, answer, rollout)
        elif before.state is None:
            raise Differs("its get_state had returned None")
        else:
            await stages.limited("setup", held.set_state(before.state), "set_state")
        rollout.restore(before)
        stages.counts.recoveries[recovery] += 1
        progress = before
    return await _played(rollout, answer, _Talk(policy, progress, token_ids), progress, noted, keep)


async def _played(
    rollout: _Rollout,
    answer: _Answer,
    talk: _Talk,
    progress: Progress,
    noted: Callable[[Progress], Awaitable[Progress]],
    keep: Keep,
) -> Played:
    """Take turns until the rollout is over. ``noted`` keeps the progress at the end of a step, ``keep`` in one."""
    try:
        while not rollout.done:
            said = progress.said
            if said is None:
                reply = await _timed(rollout.stages.counts, talk.next(progress.unasked))
                said = Said(reply.message, reply.index, reply.finish_reason)
                progress = replace(progress, said=said)
                keep(progress)
            if said.finish_reason == "length":  # It was cut off, and what it says is incomplete.
                break
            added = tuple(await answer(said))
            progress = await noted(rollout.after(progress, said, added))
    except RequestRefused as refused:
        if refused.code == "invalid_request":
            raise Failed(f"says what the policy cannot be asked: {refused.why}") from None
    reward = await rollout.worth(talk.said)
    return Played(reward, rollout.truncated, rollout.metrics, rollout.turn_rewards)


async def _play_again(start: Progress, before: Progress, answer: _Answer, rollout: _Rollout) -> None:
    """Give a new environment the turns of before. Raises Differs where it says anything else than it did."""
    if start.first != before.first:
        raise Differs("its setup returns other messages than before")
    rollout.again = True
    for at, exchange in enumerate(before.exchanges, 1):
        turn = exchange.said.index
        try:
            added = tuple(await answer(exchange.said))
        except (Gone, Late):
            raise
        except Failed as failed:
            raise Differs(f"it fails in turn {turn}, as it did not before: {failed}", failed.trace) from None
        if (added, rollout.turn_rewards.get(turn)) != (exchange.answer, exchange.reward):
            raise Differs(f"it answers turn {turn} other than before")
        ends = (before.done, before.truncated) if at == len(before.exchanges) else (False, False)
        if (rollout.done, rollout.truncated) != ends:
            raise Differs(f"it is done after turn {turn} where it was not, or not where it was")
    rollout.again = False


class _Talk:
    """What was said so far: messages, or tokens and text where the prompt is text without a template."""

    def __init__(self, policy: Policy, progress: Progress, token_ids: Int32Array) -> None:
        self._policy, self._token_ids, self._tools = policy, token_ids, list(progress.tools) or None
        self._history = None if progress.first is None else progress.conversation
        self._begun = progress.turns > 0
        if self._history is not None and progress.said is None:  # ``next`` is given the last answer.
            del self._history[len(self._history) - len(progress.unasked) :]

    @property
    def said(self) -> Sequence[Message]:
        """The messages so far; none where the policy continues text."""
        return self._history or ()

    async def next(self, added: Sequence[Message]) -> Reply:
        """Return what the policy says after the messages that were added."""
        first, self._begun = not self._begun, True
        if not (first or added):
            raise Failed("said nothing to the policy after its turn, and is not done")
        cut = self._policy.cut_off
        if self._history is None:
            if cut:
                return await self._policy.resume()
            if first:
                return await self._policy.complete(self._token_ids)
            return await self._policy.extend("".join(message["content"] for message in added))
        self._history += added
        reply = await (self._policy.resume(self._tools) if cut else self._policy.chat(self._history, self._tools))
        self._history.append(reply.message)
        return reply


class _Rollout:
    """What the environment said so far of how the rollout goes."""

    def __init__(self, held: Held, tools: list[Tool], stages: Stages) -> None:
        self._held, self._tools, self.stages = held, tools, stages
        self.metrics: dict[str, float] = {}
        self.turn_rewards: dict[int, float] = {}
        self.done = self.truncated = False
        self.again = False
        """Whether what is said was said before, and is not to be counted."""

    def restore(self, progress: Progress) -> None:
        """Begin where an earlier environment was."""
        self.metrics, self.turn_rewards = dict(progress.metrics), progress.turn_rewards
        self.done, self.truncated = progress.done, progress.truncated

    def after(self, progress: Progress, said: Said, answer: tuple[Message, ...]) -> Progress:
        """Return the progress after the answer to a turn."""
        exchange = Exchange(said, answer, self.turn_rewards.get(said.index))
        return Progress(
            progress.first,
            progress.tools,
            (*progress.exchanges, exchange),
            dict(self.metrics),
            self.done,
            self.truncated,
        )

    async def step_after(self, reply: Said) -> Sequence[Message]:
        """Return the messages of a step. One with a faulty call of a tool does not reach the environment."""
        calls = reply.message.get("tool_calls") or ()
        checked = [self._checked(call) for call in calls]
        if any(isinstance(each, BadCall) for each in checked):
            unused = "this call was not made, because another one of the same turn is faulty"
            return [
                _said_by_tool(call, f"Error: {each if isinstance(each, BadCall) else unused}")
                for call, each in zip(calls, checked, strict=True)
            ]
        self._count(ok=len(checked))
        step = await self.stages.limited("step", self._held.step(reply.message))
        self._note(step, reply)
        messages: list[Message] = step["messages"]
        return messages

    async def tools_after(self, reply: Said) -> Sequence[Message]:
        """Return the answers of the tools that were called, one after the other; the rollout is done without any."""
        calls = reply.message.get("tool_calls") or ()
        self.done = not calls
        said = []
        for call in calls:
            checked = self._checked(call)
            if isinstance(checked, BadCall):
                said.append(_said_by_tool(call, f"Error: {checked}"))
                continue
            used = await self.stages.limited("step", self._held.use(checked.name, checked.arguments))
            self._count(**{"tool_error" if used["fault"] else "ok": 1})
            said.append(_said_by_tool(call, f"Error: {used['content']}" if used["fault"] else used["content"]))
            self._note(used, reply)
            if self.done:
                break
        return said

    async def worth(self, messages: Sequence[Message]) -> Any:
        """Return the rollout's reward: the environment's, or the sum of those of its steps, or None for neither."""
        reward = await self.stages.limited("score", self._held.reward(messages))
        return math.fsum(self.turn_rewards.values()) if reward is None and self.turn_rewards else reward

    def _checked(self, call: Any) -> ToolCall | BadCall:
        try:
            return checked_call(call, self._tools)
        except BadCall as bad:
            self._count(**{bad.fault: 1})
            return bad

    def _count(self, **results: int) -> None:
        if not self.again:
            self.stages.counts.tool_calls.update(results)

    def _note(self, step: Mapping[str, Any], reply: Said) -> None:
        if step["reward"] is not None:
            self.turn_rewards[reply.index] = self.turn_rewards.get(reply.index, 0.0) + step["reward"]
        self.metrics.update(step["metrics"])
        self.done, self.truncated = self.done or step["done"], self.truncated or step["truncated"]


def _said_by_tool(call: Any, content: str) -> Message:
    """Return the message that answers a call."""
    call = call if isinstance(call, Mapping) else {}
    function = call.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    found: Message = {"role": "tool", "content": content}
    if call.get("id") is not None:
        found["tool_call_id"] = call["id"]
    if isinstance(name, str):
        found["name"] = name
    return found


async def _timed(counts: Counts, work: Awaitable[_T]) -> _T:
    began = time.monotonic()
    try:
        return await work
    finally:
        counts.seconds["policy"] += time.monotonic() - began
