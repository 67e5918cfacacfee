"""Drives one environment through its rollout: what the policy says goes to its step or its tools, until it is done.

What the policy does wrong with tools is answered by a message that names the fault, and counted; what the environment
does wrong is a ``Failed``. Knows the policy and ``Held``; neither hosts nor groups.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from async_rl.config.rollouts import AgentSection
from async_rl.data.messages import Message
from async_rl.errors import RequestRefused
from async_rl.rollout.deadline import wait_in_time
from async_rl.rollout.environments.instance import Failed, Held
from async_rl.rollout.environments.interface import Context, Task
from async_rl.rollout.environments.tools import BadCall, Tool, ToolCall, checked_call
from async_rl.rollout.gate import Gate
from async_rl.rollout.policy import Policy, Reply
from async_rl.types import Int32Array

Stage = Literal["setup", "step", "score"]

_T = TypeVar("_T")


class Late(Failed):
    """A stage was ended at its time limit."""


@dataclass(slots=True)
class Counts:
    """What the environments of a worker did so far."""

    tool_calls: Counter[str] = field(default_factory=Counter)
    """By result: ok, or what was wrong."""
    late: Counter[str] = field(default_factory=Counter)
    """Calls that were ended at their time limit, by stage."""
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Time by stage, that of the policy and the wait for a place included."""


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

    def __init__(self, settings: AgentSection, gate: Gate, counts: Counts, left: set[asyncio.Task[Any]]) -> None:
        """``left`` keeps what was cancelled and has perhaps not ended: the loop has weak references alone."""
        self._limits: dict[Stage, float] = {
            "setup": settings.setup_s,
            "step": settings.step_s,
            "score": settings.score_s,
        }
        self._gate = gate
        self.counts = counts
        self._left = left

    async def limited(self, stage: Stage, work: Coroutine[Any, Any, _T]) -> _T:
        """Return what ``work`` returns. Raises Late, without waiting for its end, when the stage's time is over."""
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
            raise Late(f"its {stage} has not ended after {limit:g} s (rollout.agent.{stage}_s)")
        return task.result()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._left.discard(task)
        if not task.cancelled():
            task.exception()  # Else asyncio logs it.


async def drive(
    held: Held, task: Task, context: Context, token_ids: Int32Array, policy: Policy, stages: Stages
) -> Played:
    """Return how the rollout of an environment ended. Raises Failed, and what the policy raises but refusals at limits.

    token_ids: int32[P], with which the policy begins where neither row nor environment has messages.
    """
    begun = await stages.limited("setup", held.setup(asdict(task), asdict(context)))
    messages = begun["messages"] or task.messages
    if messages is None and begun["tools"]:
        raise Failed("has tools, for which the prompt must be messages; return some from setup, or set data.format")
    talk = _Talk(policy, messages, token_ids, begun["tools"])
    rollout = _Rollout(held, begun["tools"], stages)
    answer = rollout.step_after if begun["steps"] else rollout.tools_after
    added: Sequence[Message] = ()
    try:
        while not rollout.done:
            reply = await _timed(stages.counts, talk.next(added))
            if reply.finish_reason == "length":  # It was cut off, and what it says is incomplete.
                break
            added = await answer(reply)
    except RequestRefused as refused:
        if refused.code == "invalid_request":
            raise Failed(f"says what the policy cannot be asked: {refused.why}") from None
    reward = rollout.worth(await stages.limited("score", held.reward(talk.said)))
    return Played(reward, rollout.truncated, rollout.metrics, rollout.turn_rewards)


class _Talk:
    """What was said so far: messages, or tokens and text where the prompt is text without a template."""

    def __init__(
        self, policy: Policy, messages: Sequence[Message] | None, token_ids: Int32Array, tools: list[Tool]
    ) -> None:
        self._policy, self._token_ids, self._tools = policy, token_ids, tools or None
        self._history = None if messages is None else list(messages)
        self._begun = False

    @property
    def said(self) -> Sequence[Message]:
        """The messages so far; none where the policy continues text."""
        return self._history or ()

    async def next(self, added: Sequence[Message]) -> Reply:
        """Return what the policy says after the messages that were added."""
        first, self._begun = not self._begun, True
        if not (first or added):
            raise Failed("said nothing to the policy after its turn, and is not done")
        if self._history is None:
            if first:
                return await self._policy.complete(self._token_ids)
            return await self._policy.extend("".join(message["content"] for message in added))
        self._history += added
        reply = await self._policy.chat(self._history, self._tools)
        self._history.append(reply.message)
        return reply


class _Rollout:
    """What the environment said so far of how the rollout goes."""

    def __init__(self, held: Held, tools: list[Tool], stages: Stages) -> None:
        self._held, self._tools, self._stages = held, tools, stages
        self.metrics: dict[str, float] = {}
        self.turn_rewards: dict[int, float] = {}
        self.done = self.truncated = False

    async def step_after(self, reply: Reply) -> Sequence[Message]:
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
        step = await self._stages.limited("step", self._held.step(reply.message))
        self._note(step, reply)
        messages: list[Message] = step["messages"]
        return messages

    async def tools_after(self, reply: Reply) -> Sequence[Message]:
        """Return the answers of the tools that were called, one after the other; the rollout is done without any."""
        calls = reply.message.get("tool_calls") or ()
        self.done = not calls
        said = []
        for call in calls:
            checked = self._checked(call)
            if isinstance(checked, BadCall):
                said.append(_said_by_tool(call, f"Error: {checked}"))
                continue
            used = await self._stages.limited("step", self._held.use(checked.name, checked.arguments))
            self._count(**{"tool_error" if used["fault"] else "ok": 1})
            said.append(_said_by_tool(call, f"Error: {used['content']}" if used["fault"] else used["content"]))
            self._note(used, reply)
            if self.done:
                break
        return said

    def worth(self, reward: Any) -> Any:
        """Return the rollout's reward: the environment's, or the sum of those of its steps, or None for neither."""
        return math.fsum(self.turn_rewards.values()) if reward is None and self.turn_rewards else reward

    def _checked(self, call: Any) -> ToolCall | BadCall:
        try:
            return checked_call(call, self._tools)
        except BadCall as bad:
            self._count(**{bad.fault: 1})
            return bad

    def _count(self, **results: int) -> None:
        self._stages.counts.tool_calls.update(results)

    def _note(self, step: Mapping[str, Any], reply: Reply) -> None:
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
