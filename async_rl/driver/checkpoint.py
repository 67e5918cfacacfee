"""Checkpoints of a run: one moment of it, taken, written and restored.

A moment lies between two training steps, while the engines are paused. Only references are taken then. The files are
written after the engines have resumed and while training continues, on the hosts that have their content:

    rollout workers   their groups in flight     ``rollout.moments``
    trainer's ranks   the trainer's state        ``trainer.megatron.distributed_checkpoint``
    tasks of Ray      finished groups            ``driver.queued_groups``, also how the rollout workers load them
    driver            the rest                   ``driver.run_state``

Hosts that do not have the run folder write what is theirs to a spool, from where ``driver.remote_files`` brings it.

Each returns size and checksum of its files. When all have returned, ``driver.checkpoint_folder`` makes the folder a
checkpoint; until then the one before is the newest. When checkpoints are due and what follows a failure is decided by
``driver.loop``.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from async_rl.config.schema import RunConfig
from async_rl.driver import checkpoint_folder, queued_groups, run_state
from async_rl.driver.actors import RolloutWorkers, TrainerRanks
from async_rl.driver.checkpoint_schedule import CheckpointSchedule
from async_rl.driver.monitor import Monitor
from async_rl.driver.recorder import Recorder
from async_rl.driver.remote_files import RemoteFiles
from async_rl.driver.replicas import ReplicaSupervisor
from async_rl.driver.run_state import RunState
from async_rl.errors import CheckpointDamaged, ReplicaFailed, TrainerDied
from async_rl.queue.client import QueueClient
from async_rl.rollout.moments import SavedGroup
from async_rl.rollout.stats import worker_id
from async_rl.runtime import logs
from async_rl.runtime.failures import unwrap_ray_error
from async_rl.runtime.manifest import Entries
from async_rl.weights.canary import Noise
from async_rl.weights.sides import Replica
from async_rl.weights.sync import WeightSync

log = structlog.get_logger(__name__)

# How often the trainer's ranks are asked whether they have written their files.
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class RunMoment:
    """A moment of the run: its state, and the messages of the groups that are to be written with it."""

    state: RunState
    """The state without its files."""
    queued: dict[str, list[Any]]
    """References to the messages of finished groups in the object store, one for each copy, by group id."""


class Checkpointer:
    """Takes, writes and restores the checkpoints of one run."""

    def __init__(
        self,
        config: RunConfig,
        *,
        queue: QueueClient,
        rollouts: RolloutWorkers,
        trainers: TrainerRanks,
        sync: WeightSync,
        replicas: ReplicaSupervisor,
        monitor: Monitor,
        recorder: Recorder,
    ) -> None:
        self._keep = config.checkpoint.keep
        self._remote = RemoteFiles(config)
        self._schedule = CheckpointSchedule(config.checkpoint, time.monotonic())
        self.latest_step = 0
        """The step of the checkpoint that was written or restored last; 0 before the first."""
        self._frozen: dict[int, Replica] = {}  # workers that keep their groups in flight for the next checkpoint
        self._writing: asyncio.Task[None] | None = None
        self._writing_queued = asyncio.Lock()  # of an earlier checkpoint, which nothing waits for if its trainer died
        self._failed = asyncio.Event()
        self._error: Exception | None = None  # of what was written in the background
        self._damaged: dict[Path, str] = {}  # checkpoints whose damage was found when they were loaded
        self._queue = queue
        self._rollouts = rollouts
        self._trainers = trainers
        self._sync = sync
        self._replicas = replicas
        self._monitor = monitor
        self._recorder = recorder

    # -- due ----------------------------------------------------------------------------------------------------

    def request(self) -> None:
        """Have a checkpoint written at the end of the current training step."""
        self._schedule.request()

    def due(self, step: int) -> bool:
        """Return whether a checkpoint of ``step``, which has just ended, is to be written."""
        return self._schedule.due(step, time.monotonic())

    # -- taken --------------------------------------------------------------------------------------------------

    async def pause_and_take(self, step: int, version: int, *, synced: bool) -> RunMoment:
        """Take the run's state without a weight sync, for which the replicas are paused.

        ``synced``: whether the weights of ``step`` are those of ``version``.
        """
        with self._monitor.phase("checkpoint", step):
            while True:
                try:
                    await self._sync.while_paused(functools.partial(self.freeze, step))
                    break
                except ReplicaFailed as error:
                    self._replicas.evict(error)
        return await self.take(step, version, synced=synced)

    async def freeze(self, step: int, replica: int) -> None:
        """Have a paused replica keep its groups in flight as they are, for the checkpoint of ``step``."""
        await self._sync.on(replica, lambda worker: worker.freeze(step))
        self._frozen[replica] = self._sync.members[replica]

    async def take(self, step: int, version: int, *, synced: bool) -> RunMoment:
        """Return the run's state with the queue as it is now. The messages of finished groups are still references."""
        queue = await self._queue.state()
        finished = [group_id for ((group_id, *_), _) in [*queue["queued"], *queue["leased"]]]
        payloads = {group_id: self._queue.payload(group_id) for group_id in finished}
        state = RunState(
            step=step,
            version=version,
            synced=synced,
            queue=queue,
            recorder={},
            queued={},
            in_flight={},
            canary=None if self._sync.canary.noise is None else asdict(self._sync.canary.noise),
        )
        # With queue.backend redis the payloads are addresses of messages that outlive the run there.
        return RunMoment(state, {i: [*payload] for i, payload in payloads.items() if isinstance(payload, list)})

    # -- written ------------------------------------------------------------------------------------------------

    async def write(self, moment: RunMoment) -> None:
        """Begin to write a checkpoint of ``moment`` and of the trainer, once the one before is written.

        Returns when the trainer's state is copied, so that training may continue. ``finish`` waits for the rest.
        """
        with self._monitor.phase("checkpoint", moment.state.step):
            await self.finish()
            began = time.monotonic()
            partial = await asyncio.to_thread(checkpoint_folder.begin, self._recorder.checkpoints, moment.state.step)
            await self._remote.clear()  # an attempt that was given up
            members = self._sync.members
            frozen = {replica: worker for replica, worker in self._frozen.items() if members.get(replica) is worker}
            self._frozen = {}
            moment = replace(moment, state=replace(moment.state, recorder=self._recorder.state()))
            await self._trainers.begin_save(partial)
        self._writing = asyncio.create_task(self._write_parts(partial, moment, frozen, began))

    async def finish(self) -> None:
        """Wait until the checkpoint that is being written is complete. Raises what it raised."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
            self._writing = None
        if self._error is not None:
            raise self._error

    async def watch(self) -> None:
        """Wait, and raise what a checkpoint raised while it was written."""
        await self._failed.wait()
        await self.finish()

    async def _write_parts(self, partial: Path, moment: RunMoment, frozen: dict[int, Replica], began: float) -> None:
        """Have each part written where it is, all at once, then make the folder a checkpoint.

        If the trainer dies meanwhile there is no such checkpoint: the training loop finds the same death.
        """
        step = moment.state.step
        try:
            in_flight, queued, trainer = await asyncio.gather(
                self._write_in_flight(partial, step, frozen),
                self._write_queued(partial, moment.queued),
                self._trainer_files(),
            )
            in_flight = await self._complete(partial, trainer, in_flight)
            state = replace(moment.state, queued=_paths(queued), in_flight=_paths(in_flight))
            entries = trainer | await asyncio.to_thread(run_state.write_head, partial, state)
            entries |= _entries(run_state.QUEUED, queued) | _entries(run_state.IN_FLIGHT, in_flight)
            scores = await asyncio.to_thread(self._recorder.eval_scores)
            final = await asyncio.to_thread(checkpoint_folder.commit, partial, entries, keep=self._keep, scores=scores)
            self._damaged.pop(final, None)
            await self._queue.checkpointed(checkpoint_folder.oldest_step(self._recorder.checkpoints))
            self.latest_step = step
            self._recorder.checkpointed(step, time.monotonic() - began)
        except TrainerDied as error:
            log.warning("checkpoint_given_up", step=step, reason=str(error))
        except Exception as error:  # noqa: BLE001 - raised by ``watch`` and ``finish``
            self._error = error
            self._failed.set()

    async def _write_in_flight(self, partial: Path, step: int, frozen: dict[int, Replica]) -> dict[str, SavedGroup]:
        """Have each worker write its groups in flight. The groups of one that cannot are issued again at a restore."""
        folder = partial / run_state.IN_FLIGHT
        calls = [worker.write_in_flight(step, folder) for worker in frozen.values()]
        saved: dict[str, SavedGroup] = {}
        for replica, written in zip(frozen, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(written, BaseException):
                reason = " ".join(str(unwrap_ray_error(written)).split())[:200]
                log.warning("in_flight_not_saved", worker=worker_id(replica), step=step, reason=reason)
            else:
                saved |= written
        return saved

    async def _write_queued(self, partial: Path, payloads: dict[str, list[Any]]) -> dict[str, SavedGroup]:
        async with self._writing_queued:
            folder = partial / run_state.QUEUED
            return await queued_groups.write(folder, payloads, everywhere=not self._remote.spooled)

    async def _complete(
        self, partial: Path, trainer: Entries, in_flight: dict[str, SavedGroup]
    ) -> dict[str, SavedGroup]:
        """Have the files that other hosts have written brought here. Returns the groups in flight that are here.

        Raises TrainerDied if a file of the trainer is lost with its host.
        """
        written = _entries(run_state.IN_FLIGHT, in_flight)
        lost = set(await self._remote.complete(partial, trainer | written))
        if gone := sorted(lost.difference(written)):
            raise TrainerDied(f"{len(gone)} files of the trainer were lost with the host that wrote them: {gone[0]}")
        return {i: saved for i, saved in in_flight.items() if f"{run_state.IN_FLIGHT}/{saved.file}" not in lost}

    async def _trainer_files(self) -> Entries:
        """Return the entries of the trainer's files once all are written. Its ranks train meanwhile."""
        while True:
            if await self._trainers.is_saved():
                each = await self._trainers.finish_save()
                return {name: entry for entries in each for name, entry in entries.items()}
            await asyncio.sleep(_POLL_S)

    # -- restored -----------------------------------------------------------------------------------------------

    async def latest(self) -> Path | None:
        """Return the folder of the latest checkpoint that is not known as damaged; None if there is no checkpoint."""
        await self.finish()
        folder = self._recorder.checkpoints
        found = await asyncio.to_thread(checkpoint_folder.latest_valid, folder, self._damaged)
        self.latest_step = 0 if found is None else checkpoint_folder.step_of(found)
        return found

    def pass_over(self, damaged: CheckpointDamaged) -> None:
        """Note that a checkpoint was found damaged when it was loaded: ``latest`` returns an earlier one."""
        self._damaged[Path(damaged.path)] = damaged.damage

    async def restore(self, found: Path) -> int:
        """Restore queued groups, groups in flight and weights of a run that ended; the trainer has loaded ``found``.

        Returns the policy version that every replica has now.
        """
        state = await asyncio.to_thread(run_state.read, found)
        self.latest_step = state.step
        for group_id, message in (await self._load(state.queued)).items():
            self._queue.hold(group_id, [message])
        newest = await self._queue.recover(state.step)
        resumed = await self._adopt(state)
        stats = await self._queue.stats()
        # A queue that outlived the run may have seen versions that were synced after the checkpoint.
        seen = max(state.version, stats.version, newest)
        version = seen if state.synced and seen == state.version else seen + 1
        # The engines have loaded the checkpoint that the run began with, and the trainer another one: what the canary
        # measures now is no scale, so the run's own is restored.
        self._sync.canary.noise = None if state.canary is None else Noise(**state.canary)
        await self._sync.run(version)
        logs.bind(version=version)
        if version > stats.version:
            await self._queue.advance(version)
        await self._sync.resume()
        self._recorder.event("work_restored", step=state.step, queued=stats.queued_groups, resumed=len(resumed))
        return version

    async def _load(self, files: Mapping[str, Path]) -> dict[str, Any]:
        """Have messages read from files, by group id, on hosts that have them; return references to them."""
        workers = [self._rollouts.workers[replica] for replica in self._sync.members]  # others may not have started
        return await queued_groups.load(files, [self._remote] if self._remote.spooled else workers)

    async def _adopt(self, state: RunState) -> list[str]:
        """Spread the groups in flight over the replicas. Returns the ids of those that are resumed."""
        in_flight = await self._load(state.in_flight) if self._remote.spooled else state.in_flight
        groups, replicas = list(in_flight.items()), list(self._sync.members)
        shares = {replica: dict(groups[index :: len(replicas)]) for index, replica in enumerate(replicas)}
        for replica, share in shares.items():
            await self._queue.adopt(worker_id(replica), share)
        # The names of the other workers are those of the run that ended, which may have had more of them.
        for name in (await self._queue.stats()).in_flight:
            await self._queue.worker_lost(name, keep=list(in_flight))
        adopted: list[str] = []
        for replica, share in shares.items():
            adopted += await self._replicas.hand_over(replica, share)
        return adopted


def _entries(folder: str, groups: dict[str, SavedGroup]) -> Entries:
    return {f"{folder}/{saved.file}": saved.entry for saved in groups.values()}


def _paths(groups: dict[str, SavedGroup]) -> dict[str, Path]:
    return {group_id: Path(saved.file) for group_id, saved in groups.items()}
