"""One weight sync: pause, transfer, canary, resume. Drives both sides through ``Trainer`` and ``Replica``.

    stage     the trainer copies its weights to where they are sent from, and scores a fixed probe under them
    pause     a replica stops generating, as partial_rollout.mode says
    transfer  the replica takes the weights, and stamps the new version
    canary    it scores the probe under the weights that it received
    resume    its rollouts continue

Each replica goes through this by itself and resumes as soon as its own canary agreed, however long the others take.
With sync.rolling they take turns, so that the others generate meanwhile. Once the weights are staged, the trainer is
asked again only where it sends the weights itself (sync.backend nccl), where the canary replays the engine's routing,
and after a failure: see ``needs_trainer``.

A replica is resumed only after its canary agreed. If it disagrees, or the transfer to it failed, its sync is tried once
more. After a second failure the layers are compared, and the run ends. A replica that did not agree stays paused: no
tokens are better than tokens of unknown weights. A replica that is dead or does not respond is named by
``ReplicaFailed``, once the others are through. The caller then removes it from ``members`` and runs the sync again, in
which replicas that have agreed take no part.

The policy version is the caller's: this module does not count it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from async_rl.weights.canary_check import Agreement, CanaryCheck, Expected, ProbedTrainer, Verdict

if TYPE_CHECKING:
    from async_rl.rollout.engine.interface import Score
    from async_rl.rollout.evaluation import EvalResult
    from async_rl.rollout.moments import SavedGroup

log = structlog.get_logger(__name__)

T = TypeVar("T")


Paused = Callable[[int], Awaitable[None]]
"""Called with each replica while it is paused under its new weights, before it is resumed."""

AllPaused = Callable[[], Awaitable[None]]
"""Called once no replica generates under the old weights any more."""


class Replica(Protocol):
    """What a sync needs of a rollout worker; ``driver.actors.RolloutHandle`` is the real one."""

    actor: Any

    def pause(self, *, end_calls: bool) -> Awaitable[None]: ...
    def receive(self, update: Mapping[str, Any], version: int) -> Awaitable[None]: ...
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
    async def stage_weights(self) -> Mapping[str, Any] | None: ...
    async def send_weights(self, version: int, only: int | None = None) -> float: ...


@dataclass(slots=True)
class _Progress:
    """What replicas have reached of one version."""

    version: int | None = None
    agreed: dict[int, Replica] = field(default_factory=dict)
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    phases: dict[int, dict[str, float]] = field(default_factory=dict)
    """Seconds of each phase, by replica."""
    retries: Counter[str] = field(default_factory=Counter)
    """Why an attempt was repeated."""


@dataclass(frozen=True, slots=True)
class _Order:
    """What a sync is to do."""

    progress: _Progress
    version: int
    peers: Mapping[int, Replica]
    """The replicas that the trainer is connected to."""
    end_calls: bool = False
    held: bool = False
    paused: Paused | None = None
    all_paused: AllPaused | None = None


@dataclass(frozen=True, slots=True)
class _Staged:
    """The trainer's part of a sync, done while the engines generate."""

    update: Mapping[str, Any] | None
    """What a replica needs in order to take the weights by itself; None where the trainer sends them."""
    expected: Expected


class WeightSync:
    """Syncs the trainer's weights to the replicas that are ``members``; ``prompts`` are token ids for the canary."""

    def __init__(
        self, config: RunConfig, model: ModelConfig, trainer: Trainer, prompts: Iterable[Int32Array] = ()
    ) -> None:
        self._config = config
        self._trainer = trainer
        self.members: dict[int, Replica] = {}
        self._connected: dict[int, Replica] = {}
        self._progress = _Progress()
        self._trainer_sends = False
        self.canary = CanaryCheck(config, model, trainer, self, prompts)

    async def begin(self) -> Agreement:
        """Complete the probe and compare both sides on the weights that they have, before anything is sampled.

        Under R3 the engine's routing is also replayed, so that the run ends here if that routing means something else
        to the trainer (other expert ids, other layers). Raises WeightSyncMismatch, and InvalidTrajectory for routing
        that cannot be of this model.
        """
        await self.canary.reach_experts(next(iter(self.members)), BATCHES)
        return await self.canary.check(list(self.members), replay=self._config.trainer.router_replay == "R3")

    @property
    def needs_trainer(self) -> bool:
        """Whether replicas need the trainer after the weights are staged, known once they are.

        If not, the trainer may compute meanwhile, but must keep its weights until the sync is over: a second attempt
        sends and compares the same ones.
        """
        return self._trainer_sends or self.canary.replays

    def reconnect(self) -> None:
        """Connect the trainer again before the next transfer, because it was replaced or a transfer failed."""
        self._connected = {}

    async def run(
        self,
        version: int,
        *,
        paused: Paused | None = None,
        all_paused: AllPaused | None = None,
        end_calls: bool = False,
        held: bool = False,
    ) -> SyncRecord:
        """Bring every member to ``version``, save those that an earlier call has brought to it.

        Each resumes when its canary agreed and ``paused`` is done with it. With ``held`` they stay paused until
        ``resume``, except with sync.rolling. ``end_calls`` ends engine calls that would be frozen, so that ``paused``
        finds all of their tokens. With sync.rolling ``all_paused`` is called at the end.

        Raises WeightSyncMismatch when the canary disagrees twice, WeightSyncError when a transfer fails twice or
        sync.timeout_s is over, ReplicaFailed.
        """
        if self._progress.version != version:
            self._progress = _Progress(version)
        progress, rolling, limit = self._progress, self._config.sync.rolling, self._config.sync.timeout_s
        order = _Order(
            progress,
            version,
            self.members,
            end_calls=end_calls,
            held=held and not rolling,
            paused=paused,
            all_paused=None if rolling else all_paused,
        )
        pending = [replica for replica, worker in self.members.items() if progress.agreed.get(replica) is not worker]
        if pending and self._trainer_sends and not rolling:
            pending = list(self.members)  # its broadcast reaches every engine at once
        try:
            for turn in [[replica] for replica in pending] if rolling else [pending]:
                async with asyncio.timeout(limit):
                    await self._turn(order, turn)
            async with asyncio.timeout(limit):
                if rolling and all_paused is not None:
                    await all_paused()
                verdicts = {
                    replica: progress.verdicts[replica] for replica in self.members if replica in progress.agreed
                }
                agreement = await self.canary.conclude(verdicts or progress.verdicts)
        except TimeoutError:
            raise await self._too_long(f"weight sync to version {version}", progress) from None
        return self._record(progress, agreement)

    async def join(self, replica: int, version: int) -> None:
        """Bring one member that has just started to ``version``, which the others have, and let it resume.

        The others generate meanwhile. Raises ReplicaFailed, also for a canary that disagrees: the weights are those
        that the others were checked with, so that the fault is the replica's.
        """
        try:
            async with asyncio.timeout(self._config.sync.timeout_s):
                self._require_members([replica])
                # Connected to it alone: with nccl the others would have to take part.
                await self._turn(_Order(_Progress(version), version, {replica: self.members[replica]}), [replica])
        except ReplicaFailed:
            raise
        except WeightSyncError as error:
            raise ReplicaFailed(replica, str(error)) from error
        except TimeoutError:
            raise ReplicaFailed(
                replica, f"had no weights within sync.timeout_s = {self._config.sync.timeout_s:g} s"
            ) from None

    async def resume(self) -> None:
        """Let every member that was held resume. A failure here is found by the stream of the replica's groups."""
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
            raise await self._too_long("pause for a checkpoint", _Progress()) from None
        await self.resume()

    async def _turn(self, order: _Order, replicas: list[int]) -> None:
        """Bring these replicas to the version, those that need it at a second attempt."""
        failed = await self._attempt(order, replicas)
        if not failed:
            return
        error = next(iter(failed.values()))
        log.warning("weight_sync_retried", version=order.version, replicas=list(failed), reason=str(error))
        self.reconnect()
        order.progress.retries["canary" if isinstance(error, WeightSyncMismatch) else "transfer"] += 1
        for error in (await self._attempt(order, list(failed))).values():
            raise error

    async def _attempt(self, order: _Order, replicas: list[int]) -> dict[int, WeightSyncError]:
        """Sync these replicas once. Returns the faults that may be tried again, by replica; raises the others.

        Returns when none of the replicas moves any more, so that the caller finds each either resumed or paused.
        """
        self._require_members(replicas)
        try:
            staged = await self._stage(order.peers) if replicas else None
        except ReplicaFailed:
            raise
        except WeightSyncError as error:
            return dict.fromkeys(replicas, error)
        self._require_members(replicas)
        pausing = {replica: asyncio.ensure_future(self._pause(order, replica)) for replica in replicas}
        opening = self._when_all_paused(order, pausing.values())
        if staged is None:
            await opening
            return {}
        sending = None
        if staged.update is None:
            sending = asyncio.ensure_future(self._send(order, replicas, pausing))
        every = [self._bring(order, replica, pausing[replica], staged, sending) for replica in replicas]
        others = [opening] if sending is None else [opening, sending]
        results = await asyncio.gather(*every, *others, return_exceptions=True)
        frozen = self._config.async_training.partial_rollout.mode == "in_flight"
        _raise_final([result for result in results if result is not None], frozen=frozen)
        failed = {
            replica: result
            for replica, result in zip(replicas, results, strict=False)
            if isinstance(result, WeightSyncError)
        }
        if failed and sending is not None:
            return dict.fromkeys(replicas, next(iter(failed.values())))  # its second broadcast reaches all of them
        return failed

    async def _stage(self, peers: Mapping[int, Replica]) -> _Staged:
        """Have the trainer do its part, connected to ``peers``."""
        if self._connected != peers:
            await self._of_trainer("connect", self._trainer.connect(list(peers.values())))
            self._connected = dict(peers)
        update = await self._of_trainer("stage_weights", self._trainer.stage_weights())
        self._trainer_sends = update is None
        return _Staged(update, await self.canary.expect())

    async def _pause(self, order: _Order, replica: int) -> None:
        with _timed(order.progress.phases.setdefault(replica, {}), "pause"):
            await self.on(replica, lambda worker: worker.pause(end_calls=order.end_calls))

    async def _when_all_paused(self, order: _Order, pausing: Iterable[asyncio.Future[None]]) -> None:
        """Tell the caller when all have paused; not if one failed to, which ends this attempt."""
        if order.all_paused is None:
            return
        if waited := list(pausing):
            await asyncio.wait(waited)
        if all(not pause.cancelled() and pause.exception() is None for pause in waited):
            await order.all_paused()

    async def _send(self, order: _Order, replicas: Sequence[int], pausing: Mapping[int, asyncio.Future[None]]) -> None:
        """Have the trainer send the weights to these replicas, of which all must be paused."""
        await asyncio.wait(pausing.values())
        for pause in pausing.values():
            pause.result()
        only = None if len(replicas) == len(self._connected) else list(self._connected).index(replicas[0])
        await self._of_trainer("send_weights", self._trainer.send_weights(order.version, only))

    async def _bring(
        self,
        order: _Order,
        replica: int,
        pausing: asyncio.Future[None],
        staged: _Staged,
        sending: asyncio.Future[None] | None,
    ) -> None:
        """Take one replica through the sync, from its pause on."""
        await pausing
        phases = order.progress.phases[replica]
        with _timed(phases, "transfer"):
            if sending is not None:
                await sending
            elif staged.update is not None:
                await self._receive(replica, staged.update, order.version)
        with _timed(phases, "wake"):
            await self.on(replica, lambda worker: worker.wake())
        with _timed(phases, "canary"):
            verdict = await self.canary.compare(replica, staged.expected)
        if order.paused is not None:
            await order.paused(replica)
        order.progress.verdicts[replica] = verdict
        order.progress.agreed[replica] = self.members[replica]
        if not order.held:
            await self.on(replica, lambda worker: worker.resume())

    async def _receive(self, replica: int, update: Mapping[str, Any], version: int) -> None:
        """Have one replica take the staged weights. Raises WeightSyncError, ReplicaFailed."""
        try:
            await self.on(replica, lambda worker: worker.receive(update, version))
        except WeightSyncError:
            raise
        except Exception as error:
            raise WeightSyncError(f"rollout-{replica}: receive: {brief(error)}") from error

    def _record(self, progress: _Progress, agreement: Agreement) -> SyncRecord:
        """Return the record of a sync: the phases of the replica that took longest, or of all that took turns."""
        each = list(progress.phases.values())
        if not self._config.sync.rolling:
            each = [max(each, key=lambda phases: sum(phases.values()))]
        phases: Counter[str] = Counter()
        for one in each:
            phases.update(one)
        return SyncRecord(
            policy_version=progress.version or 0,
            seconds=sum(phases.values()),
            phases=phases,
            canary=agreement.report.max_abs_diff,
            unreached_experts=agreement.unreached_experts,
            retries=progress.retries,
        )

    async def _of_trainer(self, what: str, call: Awaitable[T]) -> T:
        """Await a call of the trainer in which it calls the engines. Raises ReplicaFailed if one of them failed."""
        try:
            return await call
        except TrainerDied:
            raise
        except Exception as error:
            await self._raise_failed_replica()
            if isinstance(error, WeightSyncError):
                raise
            raise WeightSyncError(f"{what}: {brief(error)}") from error

    async def _too_long(self, what: str, progress: _Progress) -> WeightSyncError:
        """Return the error to raise when sync.timeout_s is over."""
        try:
            await self._raise_failed_replica()
        except ReplicaFailed as failed:
            return failed
        mode = self._config.async_training.partial_rollout.mode
        phases = dict.fromkeys(phase for each in progress.phases.values() for phase in each)
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


def _raise_final(errors: Sequence[BaseException], *, frozen: bool) -> None:
    """Raise the first and worst of what ended an attempt, unless all of it may be tried once more.

    ``frozen``: whether frozen generations resumed with the canary, under weights that are unknown if it disagreed.
    """
    order: tuple[Callable[[BaseException], bool], ...] = (
        lambda error: not isinstance(error, WeightSyncError),
        lambda error: frozen and isinstance(error, WeightSyncMismatch),
        lambda error: isinstance(error, ReplicaFailed),
    )
    for is_final in order:
        for error in errors:
            if is_final(error):
                raise error


@contextlib.contextmanager
def _timed(phases: dict[str, float], phase: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    phases[phase] = phases.get(phase, 0.0) + time.monotonic() - start
