"""Rollouts of a user's own, rollout.agent: a function, a program or an environment with state.

Makes a session and a policy for each, calls the function on the worker's event loop or starts the program, and makes a
rollout record of what it returns. Knows sessions and engine calls; neither groups nor the queue.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from async_rl.config.functions import load_function
from async_rl.config.inputs import Terms
from async_rl.config.schema import RunConfig
from async_rl.errors import AgentFailure, AsyncRLError, RefusalCode, RequestRefused, RewardNotApplicable
from async_rl.metrics.exporter import Metrics
from async_rl.rollout.agent_program import ProgramFailed, run_program
from async_rl.rollout.aside import aside
from async_rl.rollout.branches import How
from async_rl.rollout.calls import EngineCalls, routing_bytes
from async_rl.rollout.chat import Chat
from async_rl.rollout.deadline import wait_in_time
from async_rl.rollout.environments.instance import Failed
from async_rl.rollout.environments.play import Environments
from async_rl.rollout.gate import Gate
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.policy import Address, Call, Policy
from async_rl.rollout.responses import COST_THEIR_GROUP, Responses
from async_rl.rollout.rewards.score import numbers_of, score_of, turn_rewards_of
from async_rl.rollout.session import Limits, Session
from async_rl.rollout.user_function import UserTraceback
from async_rl.runtime.addresses import address_towards
from async_rl.types import Prompt, RolloutEnd, RolloutRecord

SETTING = "rollout.agent.function"
ARGUMENTS = ("prompt", "policy", "context")


@dataclass(frozen=True, slots=True)
class Context:
    """What an agent may know of its rollout beside the prompt."""

    rollout_id: str
    """The id "<group_id>/<index>", different for each attempt at a prompt."""
    seed: int
    """A number below 2**32 that is the same whenever this rollout is made again."""
    evaluation: str | None = None
    """The evaluation set that the prompt is of; None in training."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an agent returns. A number or a mapping alone stands for one with this reward."""

    reward: float | Mapping[str, Any] | None
    """A finite number, or a mapping with ``reward`` or ``score``, whose other numbers are parts of it; None for a
    rollout that has no reward and is left out of its group."""
    end: RolloutEnd | None = None
    """How it ended; None for truncated if a request was refused at a limit or the last turn was cut off, else done."""
    trainable: bool = True
    """Whether the rollout is compared with others of its group, and trained."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Finite numbers by name that say something of the rollout and are no part of its reward; None for one that does
    not apply."""

    turn_rewards: Mapping[Any, Any] | None = None
    """Rewards of single turns, finite numbers by ``Reply.index``, 0 for turns that are not there; None without any.
    trainer.loss.advantage turn_return needs them, and looks at no other reward."""

    @classmethod
    def of(cls, returned: Any) -> Outcome:
        """Return what an agent has returned as an outcome.

        A mapping may have ``metrics`` and ``turn_rewards``, as mappings.
        """
        if isinstance(returned, cls):
            return returned
        found = returned if isinstance(returned, Mapping) else {}
        metrics, turn_rewards = (
            value if isinstance(value := found.get(key), Mapping) else None for key in ("metrics", "turn_rewards")
        )
        return cls(returned, metrics=metrics or {}, turn_rewards=turn_rewards)


def load_agent(name: str) -> Callable[..., Any]:
    """Import the function that rollout.agent.function names. Raises AgentFailure."""
    return load_function(SETTING, name, ARGUMENTS, AgentFailure)


class Agents:
    """Makes the rollouts of one worker."""

    def __init__(self, config: RunConfig, responses: Responses, calls: EngineCalls, gate: Gate, tokenizer: Any) -> None:
        """Load the function that the settings name, if it is one. Raises AgentFailure."""
        assert config.rollout.agent.named is not None
        self._config = config
        self._named = " ".join(config.rollout.agent.named)
        settings = config.rollout.agent
        self._command = settings.command or []
        self._environments = Environments(config) if settings.environment is not None else None
        own = self._program if self._environments is None else self._played
        self._function = own if settings.function is None else load_agent(settings.function)
        self._turns_compared = config.trainer.loss.advantage == "turn_return"
        self._responses = responses
        self._calls = calls
        self._gate = gate
        self._tokenizer = tokenizer
        self._chat = Chat(config, tokenizer)
        # A server for HTTP, which doctor and workers without agents have no use for.
        from async_rl.rollout.gateway.server import Gateway

        joined = config.cluster.joined_address
        self.gateway = Gateway(
            config.rollout.agent.gateway_host,
            None if joined is None else address_towards(joined),
            config.model.path.name,
            self._context_tokens,
            tokenizer,
        )
        self.ways: Counter[How] = Counter()
        """Turns of rollouts in training that have ended, by how they came to their places."""
        self.refused: Counter[RefusalCode] = Counter()
        """Requests of these rollouts that were refused, by why."""

    async def start(self) -> None:
        """Start what agents of the kind need, so that what is wrong with it is known at once. Raises AgentFailure."""
        if self._environments is not None:
            await self._environments.start()

    async def rollout(
        self, prompt: Prompt, rollout_id: str, *, call: Call | None = None, terms: Terms | None = None
    ) -> RolloutRecord:
        """Make one rollout. Raises AgentFailure, RewardNotApplicable, and what an engine call raises.

        call: how an engine call is made, where not as the worker makes them. terms: those of an evaluation's set; None
        in training. An engine call that fails also fails the rollout where the agent catches that.
        """
        session = self._session(rollout_id, terms or self._responses.terms(prompt))
        failed: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        sample: Call = call or (lambda *call: self._calls.sample(prompt, *call))
        errors: list[Exception] = []

        async def sampled(partial: PartialRollout, request_id: str, stop: Sequence[str]) -> PartialRollout:
            try:
                return await sample(partial, request_id, stop)
            except Exception as error:
                errors.append(error)
                raise

        policy = Policy(
            session,
            sampled,
            chat=(chat := self._chat.for_row(prompt.fields)),
            encode=lambda text: list(self._tokenizer.encode(text, add_special_tokens=False)),
            decode=lambda ids: str(self._tokenizer.decode(ids, skip_special_tokens=True)),
            reader=chat,
            serve=lambda policy: self.gateway.open(policy, failed),
        )
        try:
            context = Context(rollout_id, _seed(rollout_id), None if terms is None else terms.name)
            outcome = await self._outcome(prompt, policy, context, failed)
            if errors:
                raise errors[0]
            if self._turns_compared and terms is None and outcome.trainable and outcome.turn_rewards is None:
                raise self._failure(
                    prompt,
                    "returned no turn_rewards, which trainer.loss.advantage turn_return compares; return an Outcome "
                    "with them, or set another advantage",
                )
        finally:
            session.close()  # what the agent has left running asks nothing more
            if policy.is_served:
                await self.gateway.end(policy.api_key)
            if terms is None:
                self.ways.update(session.ways)
                self.refused.update(policy.refused)
        nbytes = sum(routing_bytes(branch.partial.routed_experts) for branch in session.branches)
        return await aside(nbytes, lambda: self._record(prompt, session, outcome))

    def publish(self, metrics: Metrics) -> None:
        """Bring the counters of agents on /metrics up to date."""
        gateway = self.gateway
        for how, turns in self.ways.items():
            metrics.count_to("agent_turns_total", turns, how=how)
        for why, requests in self.refused.items():
            metrics.count_to("agent_requests_refused_total", requests, code=why)
        for (endpoint, code), requests in gateway.requests.items():
            metrics.count_to("gateway_requests_total", requests, endpoint=endpoint, code=str(code))
        for name, requests in gateway.ignored.items():
            metrics.count_to("gateway_fields_ignored_total", requests, field=name)
        metrics.count_to("gateway_requests_joined_total", gateway.joined)
        for read, calls in self._chat.reader.read.items():
            metrics.count_to("agent_tool_calls_read_total", calls, read="yes" if read else "no")
        if self._environments is not None:
            self._environments.publish(metrics)

    async def close(self) -> None:
        """End what agents run in, and serve no policy any longer."""
        if self._environments is not None:
            await self._environments.close()
        await self.gateway.close()

    @property
    def _context_tokens(self) -> int:
        """Tokens of a context: as many as the engine has room for."""
        return self._config.data.max_prompt_tokens + self._config.longest_response

    def _session(self, rollout_id: str, terms: Terms) -> Session:
        settings = self._config.rollout.agent
        limits = Limits(
            context_tokens=self._context_tokens,
            response_tokens=terms.max_response_tokens,
            sampled_tokens=settings.max_sampled_tokens,
            turns=settings.max_turns,
            branches=settings.max_branches,
        )
        return Session(rollout_id, functools.partial(self._responses.begin_tokens, terms=terms), limits)

    async def _outcome(
        self, prompt: Prompt, policy: Policy, context: Context, failed: asyncio.Future[Exception]
    ) -> Outcome:
        try:
            found = self._function(prompt, policy, context)
            if not inspect.isawaitable(found):
                raise self._failure(prompt, "is not async; define it with async def, and await the policy")
            found = await self._in_time(prompt, found, failed, self._clock(context))
        except COST_THEIR_GROUP:
            raise
        except RequestRefused as error:
            raise self._failure(
                prompt, f"a request was refused ({error}); catch RequestRefused, and return what the rollout is worth"
            ) from error
        except ProgramFailed as error:
            raise self._failure(prompt, str(error)) from None
        except Failed as error:
            raise self._failure(prompt, str(error)) from (UserTraceback(error.trace) if error.trace else None)
        except Exception as error:
            raise self._failure(prompt, f"raised {type(error).__name__}: {error}") from error
        return Outcome.of(found)

    def _clock(self, context: Context) -> Gate:
        """Return the gate whose pauses count for no time limit.

        None stops an evaluation, during which the worker's gate may be closed all the while.
        """
        return self._gate if context.evaluation is None else Gate()

    async def _in_time(
        self, prompt: Prompt, agent: Awaitable[Any], failed: asyncio.Future[Exception], gate: Gate
    ) -> Any:
        """Return what an agent returns. It is ended when its time is over, or when a turn that it asked for fails."""
        running = asyncio.ensure_future(agent)

        async def first() -> Any:
            await asyncio.wait({running, failed}, return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                raise failed.result()
            return running.result()

        limit, waited = self._config.rollout.agent.timeout_s, asyncio.create_task(first())
        try:
            _, late = await wait_in_time([waited], gate, limit)
            if late:
                raise self._failure(prompt, f"has not ended after {limit:g} s (rollout.agent.timeout_s)")
            return waited.result()
        finally:
            for task in (waited, running):
                task.cancel()
            await asyncio.gather(waited, running, return_exceptions=True)

    async def _program(self, prompt: Prompt, policy: Policy, context: Context) -> Any:
        address = Address(policy.base_url, policy.api_key, policy.model)
        row = {"prompt": prompt.text, **prompt.fields}
        return await run_program(self._command, row, address, context.rollout_id, context.evaluation)

    async def _played(self, prompt: Prompt, policy: Policy, context: Context) -> Outcome:
        assert self._environments is not None
        gate = self._clock(context)
        played = await self._environments.play(prompt, policy, context.rollout_id, context.seed, gate)
        end: RolloutEnd | None = "truncated" if played.truncated else None
        return Outcome(played.reward, end, metrics=played.metrics, turn_rewards=played.turn_rewards or None)

    def _record(self, prompt: Prompt, session: Session, outcome: Outcome) -> RolloutRecord:
        cut = session.truncated or session.cut_off
        try:
            score, metrics = score_of(outcome.reward), numbers_of(outcome.metrics)
            turns = session.ended_turns
            turn_rewards = turn_rewards_of(outcome.turn_rewards or {}, sum(map(len, turns)))
        except ValueError as error:
            raise self._failure(prompt, f"{error}") from None
        if score is None:
            raise RewardNotApplicable(f"{self._named}: no reward for prompt {prompt.prompt_id}")
        return RolloutRecord(
            rollout_id=session.rollout_id,
            reward=score.reward,
            trajectories=session.trajectories(),
            end=outcome.end or ("truncated" if cut else "done"),
            reward_parts=score.parts,
            trainable=outcome.trainable,
            metrics=metrics,
            turns=turns,
            turn_rewards=turn_rewards,
        )

    def _failure(self, prompt: Prompt, what: str) -> AsyncRLError:
        where = f"prompt {prompt.prompt_id} (dataset row {prompt.row})"
        return AgentFailure(f"{self._named}, {where}: {what}")


def _seed(rollout_id: str) -> int:
    return zlib.crc32(rollout_id.encode())
