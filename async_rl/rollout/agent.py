"""One agent of the user's own: a function, a program or an environment with state.

Makes a session and a policy for each rollout, calls the function on the worker's event loop or starts the program, and
makes a rollout record of what it returns. Knows sessions, engine calls and groups in flight; not the queue.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from async_rl.config.functions import load_function
from async_rl.config.inputs import Terms
from async_rl.config.rollouts import AGENT, agent_name, in_section
from async_rl.config.schema import RunConfig
from async_rl.errors import AgentFailure, AsyncRLError, RefusalCode, RequestRefused, RewardNotApplicable
from async_rl.metrics.exporter import Metrics
from async_rl.rollout.agent_program import ProgramFailed, run_program
from async_rl.rollout.aside import aside
from async_rl.rollout.branches import How
from async_rl.rollout.calls import EngineCalls, routing_bytes
from async_rl.rollout.chat import Chat
from async_rl.rollout.deadline import wait_in_time
from async_rl.rollout.environments.drive import Keep
from async_rl.rollout.environments.instance import Failed
from async_rl.rollout.environments.play import Environments
from async_rl.rollout.environments.progress import Progress
from async_rl.rollout.gate import Gate
from async_rl.rollout.in_flight import InFlight
from async_rl.rollout.outcome import Context, Outcome
from async_rl.rollout.parked import Parked
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.policy import Address, Call, Policy
from async_rl.rollout.responses import COST_THEIR_GROUP, Responses
from async_rl.rollout.rewards.score import numbers_of, score_of, turn_rewards_of
from async_rl.rollout.session import Limits, Session
from async_rl.rollout.user_function import UserTraceback
from async_rl.types import Prompt, RolloutEnd, RolloutRecord

if TYPE_CHECKING:
    from async_rl.rollout.gateway.server import Gateway

ARGUMENTS = ("prompt", "policy", "context")


def load_agent(name: str, section: str = AGENT) -> Callable[..., Any]:
    """Import the function that the setting ``function`` of a section names. Raises AgentFailure."""
    return load_function(f"{section}.function", name, ARGUMENTS, AgentFailure)


class Agent:
    """Makes the rollouts of one agent in one worker."""

    def __init__(
        self,
        config: RunConfig,
        section: str,
        responses: Responses,
        calls: EngineCalls,
        gate: Gate,
        tokenizer: Any,
        chat: Chat,
        gateway: Gateway,
    ) -> None:
        """Load the function that the settings of ``section`` name, if it is one. Raises AgentFailure."""
        self._config = config
        self._section = section
        self._settings = settings = config.rollout.agent_sections[section]
        self._named = " ".join(f"{section}.{key} {value}" for key, value in settings.given.items())
        self._command = settings.command or []
        self._environments = Environments(config, section) if settings.environment is not None else None
        self._function = self._program if settings.function is None else load_agent(settings.function, section)
        self._turns_compared = config.trainer.loss.advantage == "turn_return"
        self._responses = responses
        self._calls = calls
        self._gate = gate
        self._tokenizer = tokenizer
        self._chat = chat
        self.gateway = gateway
        self.ways: Counter[How] = Counter()
        """Turns of rollouts in training that have ended, by how they came to their places."""
        self.refused: Counter[RefusalCode] = Counter()
        """Requests of these rollouts that were refused, by why."""
        self.begun_again = 0
        """Rollouts that were begun by another worker, or an earlier run, and could not be continued."""
        self.ended: Counter[str] = Counter()
        """These rollouts, by how they ended: as in ``RolloutRecord.end``, no_reward, failed or cancelled."""
        self.seconds = 0.0
        """Time that these took."""

    async def start(self) -> None:
        """Start what agents of the kind need, so that what is wrong with it is known at once. Raises AgentFailure."""
        if self._environments is not None:
            await self._environments.start()

    async def rollout_of(self, group: InFlight, index: int, call: Call) -> None:
        """Make a rollout of a group, which keeps it once it has ended, and until then what it continues from.

        Makes engine calls by ``call``. Raises as ``rollout``.
        """
        group.made[index] = await self.rollout(
            group.ticket.prompt,
            group.trajectory_id(index),
            call=call,
            parked=group.parked.get(index),
            keep=lambda parked: group.parked.update({index: parked}),
            again=group.adopted,
        )
        group.parked.pop(index, None)

    async def rollout(
        self,
        prompt: Prompt,
        rollout_id: str,
        *,
        call: Call | None = None,
        terms: Terms | None = None,
        parked: Parked | None = None,
        keep: Callable[[Parked], None] = lambda _: None,
        again: bool = False,
    ) -> RolloutRecord:
        """Make one rollout. Raises AgentFailure, RewardNotApplicable, and what an engine call raises.

        call: how an engine call is made, where not as the worker makes them. terms: those of an evaluation's set; None
        in training. An engine call that fails also fails the rollout where the agent catches that. parked: what it
        continues from, if the settings are those with which it began. keep: is called with what it can be continued
        from, whenever that changes. again: whether it had begun before.
        """
        if terms is not None:
            return await self._rollout(prompt, rollout_id, call, terms)
        if parked is None:
            # Else nothing of it is lost: it waited, or was being set up.
            self.begun_again += again and self._settings.recovery == "restart"
        elif not self._continues(parked):
            parked = None
            self.begun_again += 1
        began, end = time.monotonic(), "cancelled"
        try:
            made = await self._rollout(prompt, rollout_id, call, None, parked, keep)
            end = made.end
        except RewardNotApplicable:
            end = "no_reward"
            raise
        except Exception:
            end = "failed"
            raise
        finally:
            self.ended[end] += 1
            self.seconds += time.monotonic() - began
        return made

    async def _rollout(
        self,
        prompt: Prompt,
        rollout_id: str,
        call: Call | None,
        terms: Terms | None,
        parked: Parked | None = None,
        keep: Callable[[Parked], None] = lambda _: None,
    ) -> RolloutRecord:
        session = self._session(rollout_id, terms or self._responses.terms(prompt), parked)
        progress = None if parked is None else parked.progress

        def note(now: Progress | None = None) -> None:
            nonlocal progress
            progress = now or progress
            if progress is not None and self._settings.recovery != "restart":
                keep(Parked(self._named, session.saved(), progress))

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
            kept=note,
        )
        try:
            context = Context(rollout_id, _seed(rollout_id), None if terms is None else terms.name)
            outcome = await self._outcome(prompt, policy, context, failed, progress, note)
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
        """Bring the counters of this agent on /metrics up to date."""
        agent = agent_name(self._section)
        for how, turns in self.ways.items():
            metrics.count_to("agent_turns_total", turns, agent=agent, how=how)
        for why, requests in self.refused.items():
            metrics.count_to("agent_requests_refused_total", requests, agent=agent, code=why)
        for end, rollouts in self.ended.items():
            metrics.count_to("agent_rollouts_total", rollouts, agent=agent, end=end)
        metrics.count_to("agent_rollout_seconds_total", self.seconds, agent=agent)
        for label, read in (("yes", True), ("no", False)):
            metrics.count_to("agent_tool_calls_read_total", self._chat.reader.read[read], agent=agent, read=label)
        recoveries = Counter({"restart": self.begun_again})
        if self._environments is not None:
            self._environments.publish(metrics)
            recoveries.update(self._environments.counts.recoveries)
        for kind, rollouts in recoveries.items():
            metrics.count_to("agent_recoveries_total", rollouts, agent=agent, kind=kind)

    async def close(self) -> None:
        """End what the agent runs in."""
        if self._environments is not None:
            await self._environments.close()

    def _continues(self, parked: Parked) -> bool:
        """Return whether the present settings can continue a rollout; else it is begun again."""
        recovery = self._settings.recovery
        has_state = parked.progress.state is not None
        return parked.environment == self._named and (has_state if recovery == "state" else recovery == "replay")

    def _session(self, rollout_id: str, terms: Terms, parked: Parked | None = None) -> Session:
        settings = self._settings
        limits = Limits(
            context_tokens=context_tokens(self._config),
            response_tokens=terms.max_response_tokens,
            sampled_tokens=settings.max_sampled_tokens,
            turns=settings.max_turns,
            branches=settings.max_branches,
        )
        begin = functools.partial(self._responses.begin_tokens, terms=terms)
        if parked is None:
            return Session(rollout_id, begin, limits)
        return Session.restored(rollout_id, begin, limits, parked.session)

    async def _outcome(
        self,
        prompt: Prompt,
        policy: Policy,
        context: Context,
        failed: asyncio.Future[Exception],
        before: Progress | None,
        keep: Keep,
    ) -> Outcome:
        try:
            if self._environments is None:
                found = self._function(prompt, policy, context)
            else:
                found = self._played(prompt, policy, context, before, keep)
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
            what = in_section(str(error), self._section)
            raise self._failure(prompt, what) from (UserTraceback(error.trace) if error.trace else None)
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

        limit, waited = self._settings.timeout_s, asyncio.create_task(first())
        try:
            _, late = await wait_in_time([waited], gate, limit)
            if late:
                raise self._failure(prompt, f"has not ended after {limit:g} s ({self._section}.timeout_s)")
            return waited.result()
        finally:
            for task in (waited, running):
                task.cancel()
            await asyncio.gather(waited, running, return_exceptions=True)

    async def _program(self, prompt: Prompt, policy: Policy, context: Context) -> Any:
        address = Address(policy.base_url, policy.api_key, policy.model)
        row = {"prompt": prompt.text, **prompt.fields}
        return await run_program(self._command, row, address, context.rollout_id, context.evaluation)

    async def _played(
        self, prompt: Prompt, policy: Policy, context: Context, before: Progress | None, keep: Keep
    ) -> Outcome:
        assert self._environments is not None
        gate = self._clock(context)
        played = await self._environments.play(
            prompt, policy, context.rollout_id, context.seed, gate, before=before, keep=keep
        )
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


def context_tokens(config: RunConfig) -> int:
    """Return the tokens of a context: as many as the engine has room for."""
    return config.data.max_prompt_tokens + config.longest_response


def _seed(rollout_id: str) -> int:
    return zlib.crc32(rollout_id.encode())
