"""RolloutWorker: keeps one engine full, interrupts it at a push, resumes, scores, publishes complete groups.

A thin shell, made a Ray actor by ``cluster``. Decisions live in ``partial`` (what a resumed call sends) and in the
queue's broker (what may be issued). Knows the queue by its client; does not know the trainer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

from async_rl.config.schema import RunConfig
from async_rl.errors import EngineDied, EnvironmentFailure, RewardError, WireError
from async_rl.metrics.timeline import Timeline
from async_rl.queue.broker import TIMEOUT
from async_rl.queue.client import QueueClient
from async_rl.rollout import in_flight
from async_rl.rollout.engine.interface import PauseMode, RolloutEngine, Sampling, Score
from async_rl.rollout.environments.turns import Environment
from async_rl.rollout.evaluation import EvalResult, evaluate
from async_rl.rollout.in_flight import InFlight
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.responses import Responses
from async_rl.rollout.rewards.runner import RewardRunner
from async_rl.rollout.routing_policies import check_probe
from async_rl.runtime import logs
from async_rl.types import Float32Array, Group, Int32Array, Prompt, Trajectory

log = structlog.get_logger(__name__)

_WATCH_PERIOD_S = 1.0

# What the engine is asked to do with running requests at a push, by async_training.partial_rollout.mode.
PAUSE_MODE: dict[str, PauseMode] = {"resume": "abort", "in_flight": "keep", "drain": "wait"}


@dataclass(slots=True)
class WorkerStats:
    """Counters since the start of the worker; seconds for times."""

    replica: int
    version: int = 0
    generated_tokens: int = 0
    resumed_prefill_tokens: int = 0
    partial_rollouts: int = 0
    trajectories: int = 0
    groups: int = 0
    cut_groups: int = 0
    running_trajectories: int = 0
    busy_s: float = 0.0
    paused_s: float = 0.0


def worker_id(replica: int) -> str:
    """Of a worker, in the queue's books and in messages."""
    return f"rollout-{replica}"


class Stopwatch:
    """Seconds for which a condition held, with the clock read at its changes only."""

    def __init__(self) -> None:
        self._total = 0.0
        self._since: float | None = None

    def set(self, running: bool) -> float:
        """Seconds since it began to run, 0 where it did not."""
        now = time.monotonic()
        ran = 0.0 if self._since is None else now - self._since
        self._total += ran
        self._since = now if running else None
        return ran

    @property
    def seconds(self) -> float:
        return self._total + (time.monotonic() - self._since if self._since is not None else 0.0)


class RolloutWorker:
    """One replica: an engine and the groups that it works on.

    ``engine`` is made by the caller, so that tests can bring their own.
    """

    def __init__(
        self,
        config: RunConfig,
        replica: int,
        queue: QueueClient,
        engine: RolloutEngine,
        tokenizer: Any,
        rewards: RewardRunner,
        environment: Environment | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self._config = config
        self._name = worker_id(replica)
        self._queue = queue
        self._engine = engine
        self._responses = Responses(config, engine, tokenizer, rewards, environment)
        self._timeline = timeline
        self._sampling = Sampling(config.rollout.temperature, config.rollout.top_p, greedy=False)
        # Twice what fills the engine: a group whose last response is long must not leave its siblings' places
        # empty, and finished groups that wait for room in the queue must not pile up.
        self._max_groups = 2 * -(-config.rollout.max_num_seqs // config.rollout.n)
        self._in_flight: dict[str, InFlight] = {}  # groups taken and not yet handed in
        self._adopted: list[InFlight] = []  # of another worker, to be gone on with
        self._unfinished = 0  # responses of these that are not finished
        self._room = asyncio.Event()  # set while the engine has free places
        self._room.set()
        self._work: asyncio.Task[None] | None = None
        self._open = asyncio.Event()  # closed from the start of a push to its end: no engine call is begun
        self._open.set()
        self._calls = 0  # engine calls under way
        self._quiet = asyncio.Event()  # set while there are none
        self._quiet.set()
        self._stopping = False
        self._asked: str | None = None  # of the engine, for a push, and not answered yet
        self._busy, self._paused = Stopwatch(), Stopwatch()
        self._stats = WorkerStats(replica)

    # -- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine. Raises EngineError when it does not come up."""
        began = time.monotonic()
        await self._engine.start()
        log.info("engine ready", seconds=round(time.monotonic() - began, 1))

    async def run(self) -> None:
        """Work until ``stop``. Raises what a group raised: the run must not go on as if nothing had happened."""
        self._work = asyncio.create_task(self._keep_engine_full())
        watch = asyncio.create_task(self._watch_engine())
        try:
            await asyncio.wait({self._work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done() and not self._stopping:
                watch.result()
            await self._work
        except asyncio.CancelledError:
            if not self._stopping:
                raise
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        finally:
            watch.cancel()
            self._work.cancel()

    async def _watch_engine(self) -> None:
        """Raise soon after the engine died: during a push no generation is under way that would notice. And when it has
        not answered for watchdog.stall_s, pushes aside, which have a limit of their own: it hangs."""
        limit = self._config.watchdog.stall_s
        ping = asyncio.ensure_future(self._engine.ping())
        waited = 0.0
        try:
            while True:
                await asyncio.sleep(_WATCH_PERIOD_S)
                self._engine.check_alive()
                if ping.done():
                    ping.result()
                    ping = asyncio.ensure_future(self._engine.ping())
                    waited = 0.0
                elif self._open.is_set():
                    waited += _WATCH_PERIOD_S
                if waited > limit:
                    raise EngineDied(f"{self._name}: the engine has not answered for {limit:g} s (watchdog.stall_s)")
        finally:
            ping.cancel()

    async def _keep_engine_full(self) -> None:
        async with asyncio.TaskGroup() as groups:

            def begin(group: InFlight) -> None:
                self._in_flight[group.group_id] = group
                self._unfinished += self._config.rollout.n
                groups.create_task(self._sample_and_publish(group))

            for group in self._adopted:
                begin(group)
            self._adopted = []
            self._look_for_room()
            while True:
                await self._room.wait()
                tickets = await self._queue.take(self._name, self._free_groups())
                if not tickets:
                    return  # the dataset is exhausted or the queue closed; what runs is finished first
                for ticket in tickets:
                    begin(InFlight.begin(ticket, self._config.rollout.n))
                self._look_for_room()

    async def stop(self) -> None:
        """Begin no more work and end what runs; partials are given up, and their groups stay outstanding in the queue.

        The engine can still be asked for an evaluation.
        """
        self._stopping = True
        self._open.clear()
        await self._engine.pause("abort")
        await self._quiet.wait()
        self._cancel_work()
        await self._engine.resume()

    async def shutdown(self) -> None:
        """End the engine with its processes, whatever it is at."""
        self._stopping = True
        self._open.clear()
        self._cancel_work()
        self._responses.close()
        await self._engine.shutdown()
        if self._timeline is not None:
            self._timeline.close()

    def snapshot(self) -> dict[str, npt.NDArray[np.uint8]]:
        """Every group that was taken and is not handed in, as it stands, for ``adopt`` of another worker; by id.

        Tokens of calls under way are in it once a pause has ended them.
        """
        waiting = {group.group_id: group for group in self._adopted}
        return {name: in_flight.encode(group) for name, group in (waiting | self._in_flight).items()}

    def adopt(self, messages: Mapping[str, Any]) -> list[str]:
        """Go on with groups of a ``snapshot`` when ``run`` is called; their ids, but for those that do not fit the
        settings of now, which are left out and named in the log."""
        settings, policy = self._config.rollout, self._config.async_training.partial_rollout.routing
        for message in messages.values():
            try:
                group = in_flight.decode(
                    message,
                    n=settings.n,
                    max_response_tokens=settings.max_response_tokens,
                    stop_token_ids=self._engine.stop_token_ids,
                    policy=policy,
                )
            except WireError as error:
                log.warning("a group in flight cannot be gone on with", reason=str(error))
                continue
            self._adopted.append(group)
        return [group.group_id for group in self._adopted]

    def stats(self) -> WorkerStats:
        self._stats.version = self._engine.version
        self._stats.running_trajectories = self._calls
        self._stats.busy_s, self._stats.paused_s = self._busy.seconds, self._paused.seconds
        return self._stats

    # -- work ---------------------------------------------------------------------------------------------------

    def _free_groups(self) -> int:
        """Groups that fill the engine's free places, the last one in part; 0 when there are none."""
        free = self._config.rollout.max_num_seqs - self._unfinished
        return max(0, min(-(-free // self._config.rollout.n), self._max_groups - len(self._in_flight)))

    def _look_for_room(self) -> None:
        if self._free_groups() > 0:
            self._room.set()
        else:
            self._room.clear()

    def _cancel_work(self) -> None:
        if self._work is not None:
            self._work.cancel()

    async def _sample_and_publish(self, group: InFlight) -> None:
        """A failure of the user's reward or environment fails the group or the run, as configured."""
        group_id = group.group_id
        try:
            trajectories = await self._trajectories(group)
        except (RewardError, EnvironmentFailure) as error:
            if self._responses.is_fatal(error):
                raise
            log.warning("group failed", group=group_id, reason=str(error))
            await self._queue.fail(group_id, "reward" if isinstance(error, RewardError) else "environment")
        else:
            if trajectories is None:
                await self._queue.return_group(group_id, TIMEOUT)
            else:
                await self._queue.put(Group(group_id, group.ticket.prompt, trajectories))
                self._stats.groups += 1
                self._stats.trajectories += len(trajectories)
                self._stats.partial_rollouts += sum(t.is_partial for t in trajectories)
        # Not where this was cancelled or has raised: it may be gone on with elsewhere, as it stands.
        del self._in_flight[group_id]
        self._look_for_room()

    async def _trajectories(self, group: InFlight) -> tuple[Trajectory, ...] | None:
        """The group's responses: all, or after rollout.group_timeout_s those that are finished, if they are enough."""
        settings = self._config.rollout
        tasks = [asyncio.create_task(self._trajectory(group, index)) for index in range(settings.n)]
        try:
            done, late = await asyncio.wait(
                tasks, timeout=settings.group_timeout_s, return_when=asyncio.FIRST_EXCEPTION
            )
            finished = tuple(task.result() for task in tasks if task in done)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not late:
            return finished
        needed = settings.min_group_size or settings.n
        log.warning("group over its time", group=group.group_id, finished=len(finished), needed=needed)
        if len(finished) < needed:
            return None
        self._stats.cut_groups += 1
        return finished

    async def _trajectory(self, group: InFlight, index: int) -> Trajectory:
        prompt = group.ticket.prompt

        def keep(partial: PartialRollout) -> None:
            group.partials[index] = partial

        start = group.partials[index] or self._responses.begin(f"{group.group_id}/{index}", prompt)
        try:
            partial = await self._responses.complete(start, prompt, self._sample, keep)
        finally:
            self._unfinished -= 1
            self._look_for_room()
        reward = group.rewards[index]
        if reward is None:
            reward = group.rewards[index] = await self._responses.reward(prompt, partial)
        return partial.to_trajectory(reward)

    async def _sample(self, partial: PartialRollout, request_id: str) -> PartialRollout:
        """One engine call for what is left of ``partial``, begun once no push is under way."""
        await self._open.wait()
        token_ids, max_tokens, first_row = partial.next_request()
        self._enter()
        began = time.monotonic()
        try:
            output = await self._engine.generate(request_id, token_ids, self._sampling, max_tokens, first_row)
        finally:
            self._leave()
        if self._timeline is not None:
            self._timeline.add(
                "call",
                time.monotonic() - began,
                trajectory=partial.trajectory_id,
                tokens=len(output.token_ids),
                end=output.finish_reason,
            )
        self._stats.generated_tokens += len(output.token_ids)
        if partial.interrupted and len(output.token_ids):
            self._stats.resumed_prefill_tokens += len(token_ids)
        return partial.absorb(output)

    def _enter(self) -> None:
        self._calls += 1
        self._quiet.clear()
        if self._calls == 1:
            self._busy.set(self._open.is_set())

    def _leave(self) -> None:
        self._calls -= 1
        if self._calls == 0:
            self._quiet.set()
            self._busy.set(False)

    # -- a push -------------------------------------------------------------------------------------------------

    async def pause(self, end_calls: bool = False) -> None:
        """Begin no engine call, and bring the engine to a stop as partial_rollout.mode says.

        end_calls: do not freeze running calls ("in_flight"), but end them as "resume" does, for a ``snapshot``.
        """
        self._open.clear()
        mode = PAUSE_MODE[self._config.async_training.partial_rollout.mode]
        if end_calls and mode == "keep":
            mode = "abort"
        if mode == "wait":
            # The engine works on while it drains: that time is generation, not pause.
            await self._quiet.wait()
        self._busy.set(False)
        self._paused.set(True)
        with self._asking("pause"):
            await self._engine.pause(mode)
        if mode != "keep":
            await self._quiet.wait()

    async def wake(self) -> None:
        """Let the engine compute again, for the canary and for evaluation; rollouts still wait."""
        with self._asking("resume"):
            await self._engine.resume()

    async def unanswered(self) -> str | None:
        """What the engine was asked to do for a push and has not answered yet; None where it owes nothing.

        Raises EngineDied.
        """
        self._engine.check_alive()
        return self._asked

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        self._asked = what
        try:
            yield
        finally:
            self._asked = None

    async def resume(self) -> None:
        """Go on with what was interrupted, and take new work."""
        stood = self._paused.set(False)
        if self._timeline is not None and stood:
            self._timeline.add("pause", stood)
        self._busy.set(self._calls > 0)
        self._open.set()

    # What vLLM's RayVLLMWeightSyncClient calls on each rollout actor.

    async def init_weight_transfer_engine(self, request: Any) -> None:
        if "rank_offset" in request.init_info:
            # NCCL: the sender is rank 0, and each replica's ranks follow those of the one before it.
            request.init_info["rank_offset"] += self._stats.replica * self._config.rollout.tensor_parallel_size
        with self._asking("init_weight_transfer_engine"):
            await self._engine.init_weight_transfer_engine(request)

    async def start_weight_update(self) -> None:
        with self._asking("start_weight_update"):
            await self._engine.start_weight_update()

    async def update_weights(self, request: Any) -> None:
        with self._asking("update_weights"):
            await self._engine.update_weights(request)

    async def finish_weight_update(self) -> None:
        with self._asking("finish_weight_update"):
            await self._engine.finish_weight_update()

    async def update_weight_version(self, version: str) -> None:
        with self._asking("update_weight_version"):
            await self._engine.update_weight_version(version)
        logs.bind(version=self._engine.version)

    # -- probes -------------------------------------------------------------------------------------------------

    async def score(self, sequences: Sequence[Int32Array]) -> list[Score]:
        """Log-probs and routing of fixed token sequences under the engine's weights, for the canary."""
        with self._asking("score"):
            scores = await self._engine.score(list(sequences))
        routed = [score.routed_experts for score in scores if score.routed_experts is not None]
        if self._engine.routing_spec is not None and scores:
            check_probe(routed, [len(sequence) for sequence in sequences], self._engine.routing_spec)
        return scores

    async def fingerprints(self, sequences: Sequence[Int32Array]) -> list[Float32Array | None]:
        """Of the engine's residual stream, layer by layer; to find the layer at fault when the canary disagrees."""
        return await self._engine.fingerprints(list(sequences))

    async def evaluate(self, prompts: Sequence[Prompt]) -> EvalResult:
        """Greedy responses to ``prompts`` and their mean reward. The weights must not change meanwhile."""
        return await evaluate(prompts, self._engine, self._responses)
