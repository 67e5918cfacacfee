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
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

import structlog

from async_rl.config.schema import RunConfig
from async_rl.errors import ReplicaFailed, WeightSyncError, WeightSyncMismatch
from async_rl.metrics.records import SyncRecord
from async_rl.models.config import ModelConfig
from async_rl.runtime import timeouts
from async_rl.runtime.failures import is_worker_lost, unwrap_ray_error, user_facing_error
from async_rl.types import Int32Array
from async_rl.weights.canary import BATCHES
from async_rl.weights.canary_check import Agreement, CanaryCheck
from async_rl.weights.sides import Replica, Trainer
from async_rl.weights.sync_attempt import AllPaused, Attempts, Order, Paused, Progress

log = structlog.get_logger(__name__)

T = TypeVar("T")


class WeightSync:
    """Syncs the trainer's weights to the replicas that are ``members``; ``prompts`` are token ids for the canary."""

    def __init__(
        self, config: RunConfig, model: ModelConfig, trainer: Trainer, prompts: Iterable[Int32Array] = ()
    ) -> None:
        self._config = config
        self.members: dict[int, Replica] = {}
        self._progress = Progress()
        self.canary = CanaryCheck(config, model, trainer, self, prompts)
        frozen = config.async_training.partial_rollout.mode == "in_flight"
        self._attempts = Attempts(trainer, self.canary, self, frozen=frozen)

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
        return self._attempts.trainer_sends or self.canary.replays

    def reconnect(self) -> None:
        """Connect the trainer again before the next transfer, because it was replaced or a transfer failed."""
        self._attempts.reconnect()

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
            self._progress = Progress(version)
        progress, rolling, limit = self._progress, self._config.sync.rolling, self._config.sync.timeout_s
        order = Order(
            progress,
            version,
            self.members,
            end_calls=end_calls,
            held=held and not rolling,
            paused=paused,
            all_paused=None if rolling else all_paused,
        )
        pending = [replica for replica, worker in self.members.items() if progress.agreed.get(replica) is not worker]
        if pending and self._attempts.trainer_sends and not rolling:
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
                self.require([replica])
                # Connected to it alone: with nccl the others would have to take part.
                await self._turn(Order(Progress(version), version, {replica: self.members[replica]}), [replica])
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
            raise await self._too_long("pause for a checkpoint", Progress()) from None
        await self.resume()

    async def _turn(self, order: Order, replicas: list[int]) -> None:
        """Bring these replicas to the version, those that need it at a second attempt."""
        failed = await self._attempts.make(order, replicas)
        if not failed:
            return
        error = next(iter(failed.values()))
        log.warning("weight_sync_retried", version=order.version, replicas=list(failed), reason=str(error))
        self.reconnect()
        order.progress.retries["canary" if isinstance(error, WeightSyncMismatch) else "transfer"] += 1
        for error in (await self._attempts.make(order, list(failed))).values():
            raise error

    def _record(self, progress: Progress, agreement: Agreement) -> SyncRecord:
        """Return the record of a sync: the phases of the replica that took longest, or of all that took turns."""
        each = [progress.phases[replica] for replica in progress.agreed]
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

    async def _too_long(self, what: str, progress: Progress) -> WeightSyncError:
        """Return the error to raise when sync.timeout_s is over."""
        try:
            await self.raise_failed()
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

    async def raise_failed(self) -> None:
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

    def require(self, replicas: Sequence[int]) -> list[Replica]:
        """Return these members. Raises ReplicaFailed for one that is no member any more."""
        for replica in replicas:
            if replica not in self.members:
                raise ReplicaFailed(replica, "died before the weight sync reached it")
        return [self.members[replica] for replica in replicas]

    async def _all(self, replicas: Sequence[int], call: Callable[[Replica], Awaitable[T]]) -> list[T]:
        return await asyncio.gather(*(self.on(replica, call) for replica in replicas))

    async def on(self, replica: int, call: Callable[[Replica], Awaitable[T]]) -> T:
        """Await a call of one member. Raises ReplicaFailed if the member or its engine is dead."""
        (worker,) = self.require([replica])
        try:
            return await call(worker)
        except Exception as error:
            if is_worker_lost(error):
                raise ReplicaFailed(replica, str(unwrap_ray_error(error)).partition("\n")[0]) from error
            raise user_facing_error(error) from error
