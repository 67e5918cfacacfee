"""What follows when the trainer fails: a restart from a checkpoint, without a batch that it has failed on twice.

``Suspects`` is pure. ``TrainerRecovery`` asks the trainer, the queue and the records. Does not know the training loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import structlog

from async_rl.config.schema import RunConfig
from async_rl.driver import run_state
from async_rl.driver.actors import TrainerRanks
from async_rl.driver.checkpoint import Checkpointer
from async_rl.driver.recorder import Recorder
from async_rl.driver.restarts import Recovery
from async_rl.driver.starting import wait_started
from async_rl.errors import CheckpointDamaged, TrainerDied, TrainerError
from async_rl.queue.client import QueueClient
from async_rl.runtime.failures import brief, is_host_lost, is_lost_peer, is_machine_fault

log = structlog.get_logger(__name__)

# The reason under which groups that the trainer fails on are counted as failed.
TRAINER = "trainer"


class Suspects:
    """Remembers the groups that the trainer was computing when it failed."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def blame(self, group_ids: Iterable[str]) -> list[str]:
        """Note that the trainer failed on these groups. Returns those that it has failed on before."""
        blamed = list(group_ids)
        again = [group_id for group_id in blamed if group_id in self._seen]
        # Only of the latest failure: a batch that was trained meanwhile is no suspect any more.
        self._seen = set(blamed).difference(again)
        return again


class TrainerRecovery:
    """Brings the trainer of one run back after a failure."""

    def __init__(
        self,
        config: RunConfig,
        *,
        queue: QueueClient,
        trainers: TrainerRanks,
        checkpointer: Checkpointer,
        recovery: Recovery,
        recorder: Recorder,
        free: Callable[[], Awaitable[str]],
    ) -> None:
        """``free`` returns what the cluster has left, and what waits for a place, in words."""
        self._config = config
        self._queue = queue
        self._trainers = trainers
        self._checkpointer = checkpointer
        self._recovery = recovery
        self._recorder = recorder
        self._free = free
        self._suspects = Suspects()

    async def give_back(self, group_ids: list[str], error: Exception) -> None:
        """Put the groups of a step that ``error`` ended back into the queue, except those that are set aside."""
        if isinstance(error, TrainerDied):
            group_ids = await self.set_aside(group_ids, error)
        await self._queue.release(group_ids)

    async def set_aside(self, group_ids: list[str], error: TrainerDied) -> list[str]:
        """Give up those of a failed step's groups that the trainer failed on before. Returns the others.

        The loss of a host is not blamed on the groups that were computed on it.
        """
        if error.__cause__ is not None and (is_host_lost(error.__cause__) or is_lost_peer(error.__cause__)):
            return group_ids
        again = self._suspects.blame(group_ids)
        for group_id in again:
            await self._queue.fail(group_id, TRAINER)
        if again:
            self._recorder.event("batch_set_aside", groups=" ".join(again), reason=str(error)[:200])
        return [group_id for group_id in group_ids if group_id not in again]

    async def restart(self, error: TrainerDied) -> tuple[int, int]:
        """Restart the trainer from the latest valid checkpoint; groups that it trained since are issued again.

        Returns the checkpoint's step and the number of these groups. Raises TrainerDied if the trainer fails again,
        TrainerError if there is no checkpoint, ProcessLost if the trainer has failed too often, and StalledError if
        there is no place for it.
        """
        while True:
            # The queue remembers what was trained since a checkpoint only where checkpoints are periodic.
            found = await self._checkpointer.latest() if self._config.checkpoint.periodic else None
            if found is None:
                raise TrainerError(
                    f"{error}, and there is no checkpoint to restart it from; set checkpoint.every to have some "
                    f"(logs: {self._config.run_dir / 'logs'})"
                ) from error
            try:
                state = await asyncio.to_thread(run_state.read, found)
                await self._recovery.wait("trainer", error, step=state.step)
                self._trainers.replace()
                await self._start(found)
                break
            except CheckpointDamaged as damaged:
                self._checkpointer.pass_over(damaged)
        reissued = await self._queue.rewind(state.step)
        await self._recorder.samples.finished()
        await asyncio.to_thread(self._recorder.rewind, state.step, state.recorder)
        return state.step, len(reissued)

    async def _start(self, checkpoint: Path) -> None:
        """Start new ranks. The host of a former one may be gone: ranks without a place are named while they wait."""
        start = self._trainers.start(checkpoint)
        try:
            await wait_started({"trainer": start}, self._config.watchdog, self._recorder.event, self._free)
        except Exception as error:
            if is_machine_fault(error):  # memory that a former rank still has, for example
                raise TrainerDied(f"the trainer failed in start: {brief(error)}") from error
            raise
