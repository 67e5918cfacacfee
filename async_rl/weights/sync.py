"""One weight sync: pause, transfer, canary, resume. Drives both sides through ``Trainer`` and ``Replica``.

              the trainer writes its weights where they are sent from, and scores a fixed probe under them
    pause     a replica stops generating, as partial_rollout.mode says
    transfer  trainer rank 0 drives vLLM's start / update / finish on it, which stamps the new version
    canary    the replica scores the probe under the weights that it received
    resume    rollouts continue

All replicas are synced together, or with sync.rolling one after the other, so that the others generate meanwhile.

A replica is resumed only after its canary agreed. If it disagrees, or the transfer failed, the sync is tried once more.
After a second failure the layers are compared, and the run ends. On any failure the engines stay paused: no tokens are
better than tokens of unknown weights. A replica that is dead or does not respond is named by ``ReplicaFailed``. The
caller then removes it from ``members`` and runs the sync again.

The policy version is the caller's: this module does not count it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import structlog

from async_rl.config.schema import RunConfig
from async_rl.errors import ReplicaFailed, TrainerDied, WeightSyncError, WeightSyncMismatch
from async_rl.metrics.records import SyncRecord
from async_rl.models.config import ModelConfig
from async_rl.runtime import timeouts
from async_rl.runtime.failures import brief, is_worker_lost, unwrap_ray_error, user_facing_error
from async_rl.types import Float32Array, Int32Array, Prompt
from async_rl.weights.canary import BATCHES
from async_rl.weights.canary_check import Agreement, CanaryCheck, ProbedTrainer

if TYPE_CHECKING:
    from async_rl.rollout.engine.interface import Score
    from async_rl.rollout.evaluation import EvalResult
    from async_rl.rollout.moments import SavedGroup

log = structlog.get_logger(__name__)

T = TypeVar("T")


Paused = Callable[[int], Awaitable[None]]
"""Called with each replica while it is paused under its new weights, before it is resumed."""


class Replica(Protocol):
    """What a sync needs of a rollout worker; ``driver.actors.RolloutHandle`` is the real one."""

    actor: Any

    def pause(self, *, end_calls: bool) -> Awaitable[None]: ...
    def wake(self) -> Awaitable[None]: ...
    def resume(self) -> Awaitable[None]: ...
    def stop(self) -> Awaitable[None]: ...
    def unanswered(self) -> Awaitable[str | None]: ...
    def score(self, sequences: Sequence[Int32Array]) -> Awaitable[list[Score]]: ...
    def fingerprints(self, sequences: Sequence[Int32Array]) -> Awaitable[list[Float32Array | None]]: ...
    def evaluate(self, prompts: Sequence[Prompt]) -> Awaitable[EvalResult]: ...
    def freeze(self, step: int) -> Awaitable[None]: ...
    def write_in_flight(self, step: int, folder: Path) -> Awaitable[dict[str, SavedGroup]]: ...


class Trainer(ProbedTrainer, Protocol):
    """What a sync needs of the trainer; ``driver.actors.TrainerRanks`` is the real one."""

    async def connect(self, replicas: Sequence[Replica]) -> None: ...
    async def stage_weights(self) -> None: ...
    async def send_weights(self, version: int, only: int | None = None) -> float: ...


class WeightSync:
    """Syncs the trainer's weights to the replicas that are ``members``; ``prompts`` are token ids for the canary."""

    def __init__(
        self, config: RunConfig, model: ModelConfig, trainer: Trainer, prompts: Iterable[Int32Array] = ()
    ) -> None:
        self._config = config
        self._trainer = trainer
        self.members: dict[int, Replica] = {}
        self._connected: dict[int, Replica] = {}
        self.canary = CanaryCheck(config, model, trainer, self, prompts)

    async def begin(self) -> Agreement:
        """Complete the probe and compare both sides on the weights that they have, before anything is sampled.

        Under R3 the engine's routing is also replayed, so that the run ends here if that routing means something else
        to the trainer (other expert ids, other layers). Raises WeightSyncMismatch, and InvalidTrajectory for routing
        that cannot be of this model.
        """
        await self.canary.reach_experts(next(iter(self.members)), BATCHES)
        return await self.canary.check(list(self.members), replay=self._config.trainer.router_replay == "R3")

    def reconnect(self) -> None:
        """Connect the trainer again before the next transfer, because it was replaced or a transfer failed."""
        self._connected = {}

    async def run(self, version: int, *, paused: Paused | None = None, end_calls: bool = False) -> SyncRecord:
        """Bring every member to ``version``.

        Rollouts stay paused until ``resume``, or with sync.rolling until their replica's turn is over. ``end_calls``
        ends engine calls that would be frozen, so that ``paused`` finds all of their tokens.

        Raises WeightSyncMismatch when the canary disagrees twice, WeightSyncError when a transfer fails twice or
        sync.timeout_s is over, ReplicaFailed.
        """
        phases: dict[str, float] = {}
        agreements: list[Agreement] = []
        retries: Counter[str] = Counter()
        turns = [[replica] for replica in self.members] if self._config.sync.rolling else [list(self.members)]
        try:
            for turn in turns:
                async with asyncio.timeout(self._config.sync.timeout_s):
                    agreements.append(
                        await self._turn(version, self.members, turn, phases, retries, end_calls=end_calls)
                    )
                    if paused is not None:
                        await asyncio.gather(*(paused(replica) for replica in turn))
                if self._config.sync.rolling:
                    await self._all(turn, lambda worker: worker.resume())
        except TimeoutError:
            raise await self._too_long(f"weight sync to version {version}", phases) from None
        return SyncRecord(
            policy_version=version,
            seconds=sum(phases.values()),
            phases=phases,
            canary=max(agreement.report.max_abs_diff for agreement in agreements),
            unreached_experts=max(agreement.unreached_experts for agreement in agreements),
            retries=retries,
        )

    async def join(self, replica: int, version: int) -> None:
        """Bring one member that has just started to ``version``, which the others have, and let it resume.

        The others generate meanwhile. Raises ReplicaFailed, also for a canary that disagrees: the weights are those
        that the others were checked with, so that the fault is the replica's.
        """
        try:
            async with asyncio.timeout(self._config.sync.timeout_s):
                self._require_members([replica])
                # Connected to it alone: with nccl the others would have to take part.
                alone = {replica: self.members[replica]}
                await self._turn(version, alone, [replica], {}, Counter(), end_calls=False)
                await self._all([replica], lambda worker: worker.resume())
        except ReplicaFailed:
            raise
        except WeightSyncError as error:
            raise ReplicaFailed(replica, str(error)) from error
        except TimeoutError:
            raise ReplicaFailed(
                replica, f"had no weights within sync.timeout_s = {self._config.sync.timeout_s:g} s"
            ) from None

    async def resume(self) -> None:
        """Let every member resume its rollouts. A failure here is found by the stream of the replica's groups."""
        await asyncio.gather(*(worker.resume() for worker in self.members.values()), return_exceptions=True)

    async def while_paused(self, paused: Paused) -> None:
        """Pause every member without a weight sync, for as long as ``paused`` takes.

        Raises ReplicaFailed, and WeightSyncError when sync.timeout_s is over.
        """
        replicas = list(self.members)
        try:
            async with asyncio.timeout(self._config.sync.timeout_s):
                await self._all(replicas, lambda worker: worker.pause(end_calls=True))
                await asyncio.gather(*(paused(replica) for replica in replicas))
                await self._all(replicas, lambda worker: worker.wake())
        except TimeoutError:
            raise await self._too_long("pause for a checkpoint", {}) from None
        await self.resume()

    async def _turn(
        self,
        version: int,
        peers: Mapping[int, Replica],
        replicas: list[int],
        phases: dict[str, float],
        retries: Counter[str],
        *,
        end_calls: bool,
    ) -> Agreement:
        """Sync these replicas of ``peers``, at the second try if need be; ``retries`` counts why it was needed."""
        try:
            return await self._attempt(version, peers, replicas, phases, end_calls=end_calls)
        except ReplicaFailed:
            raise
        except WeightSyncError as error:
            disagreed = isinstance(error, WeightSyncMismatch)
            if disagreed and self._config.async_training.partial_rollout.mode == "in_flight":
                raise  # frozen generations resumed meanwhile, with weights that are unknown
            log.warning("weight_sync_retried", version=version, reason=str(error))
            self.reconnect()
            retries["canary" if disagreed else "transfer"] += 1
            return await self._attempt(version, peers, replicas, phases, end_calls=end_calls)

    async def _attempt(
        self,
        version: int,
        peers: Mapping[int, Replica],
        replicas: list[int],
        phases: dict[str, float],
        *,
        end_calls: bool,
    ) -> Agreement:
        """Sync these replicas once, with ``peers`` connected; adds the seconds of each phase to ``phases``."""
        self._require_members(replicas)
        if self._connected != peers:
            await self._transfer("connect", self._trainer.connect(list(peers.values())))
            self._connected = dict(peers)
        # What needs no engine, while the engines generate.
        await self._transfer("stage_weights", self._trainer.stage_weights())
        expected = await self.canary.expect()
        self._require_members(replicas)
        only = None if len(replicas) == len(self._connected) else list(self._connected).index(replicas[0])
        with _timed(phases, "pause"):
            await self._all(replicas, lambda worker: worker.pause(end_calls=end_calls))
        with _timed(phases, "transfer"):
            await self._transfer("send_weights", self._trainer.send_weights(version, only))
        with _timed(phases, "wake"):
            await self._all(replicas, lambda worker: worker.wake())
        with _timed(phases, "canary"):
            return await self.canary.check(replicas, replay=False, expected=expected)

    async def _transfer(self, what: str, call: Awaitable[Any]) -> None:
        """Await a call of the trainer in which it calls the engines. Raises ReplicaFailed if one of them failed."""
        try:
            await call
        except TrainerDied:
            raise
        except Exception as error:
            await self._raise_failed_replica()
            if isinstance(error, WeightSyncError):
                raise
            raise WeightSyncError(f"{what}: {brief(error)}") from error

    async def _too_long(self, what: str, phases: dict[str, float]) -> WeightSyncError:
        """Return the error to raise when sync.timeout_s is over."""
        try:
            await self._raise_failed_replica()
        except ReplicaFailed as failed:
            return failed
        mode = self._config.async_training.partial_rollout.mode
        return WeightSyncError(
            f"{what} took longer than sync.timeout_s = {self._config.sync.timeout_s:g} s; "
            f"finished phases: {', '.join(phases) or 'none'}. "
            + ("In mode drain a weight sync waits for the longest generation in flight. " if mode == "drain" else "")
            + "Raise sync.timeout_s, or see the logs of the rollout workers"
        )

    async def _raise_failed_replica(self) -> None:
        """Raise ReplicaFailed if a member is dead, hangs, or its engine has not answered a call."""
        # Not those that were connected and have died since: their deaths are known, and the fault is another one.
        for replica in list(self.members):
            try:
                async with asyncio.timeout(timeouts.ANSWER_S):
                    unanswered = await self.on(replica, lambda worker: worker.unanswered())
            except TimeoutError:
                raise ReplicaFailed(replica, f"process did not respond within {timeouts.ANSWER_S:g} s") from None
            if unanswered is not None:
                raise ReplicaFailed(replica, f"engine did not respond to `{unanswered}`")

    def _require_members(self, replicas: Sequence[int]) -> None:
        for replica in replicas:
            if replica not in self.members:
                raise ReplicaFailed(replica, "died before the weight sync reached it")

    async def _all(self, replicas: Sequence[int], call: Callable[[Replica], Awaitable[T]]) -> list[T]:
        return await asyncio.gather(*(self.on(replica, call) for replica in replicas))

    async def on(self, replica: int, call: Callable[[Replica], Awaitable[T]]) -> T:
        """Await a call of one member. Raises ReplicaFailed if the member or its engine is dead."""
        self._require_members([replica])
        try:
            return await call(self.members[replica])
        except Exception as error:
            if is_worker_lost(error):
                raise ReplicaFailed(replica, str(unwrap_ray_error(error)).partition("\n")[0]) from error
            raise user_facing_error(error) from error


@contextlib.contextmanager
def _timed(phases: dict[str, float], phase: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    phases[phase] = phases.get(phase, 0.0) + time.monotonic() - start
