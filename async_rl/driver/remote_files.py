"""The files of a run on hosts that do not have its folder, as the driver asks for them; see ``driver.courier``.

Where all hosts have the run folder (cluster.shared_fs), or there is one host, every call does nothing at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import structlog
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from async_rl.config.schema import RunConfig
from async_rl.driver.courier import Collected, CourierProcess
from async_rl.errors import TrainerDied
from async_rl.runtime.failures import brief, user_facing_error
from async_rl.runtime.manifest import Entries

log = structlog.get_logger(__name__)

# Calls at the same time: a checkpoint, and the messages of one that is restored.
_THREADS = 8
# For the last lines of all hosts.
_FINISH_S = 90.0


@contextlib.contextmanager
def courier(config: RunConfig) -> Iterator[None]:
    """Have files brought to the run folder for the block, and what is left of them at its end."""
    if config.cluster.run_host is None:
        yield
        return
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": _name(), "num_cpus": 0, "max_concurrency": _THREADS, "max_restarts": -1, "max_task_retries": 2}
    actor = ray.remote(CourierProcess).options(scheduling_strategy=here, **options).remote(config)
    try:
        yield
    finally:
        try:
            ray.get(actor.finish.remote(), timeout=_FINISH_S)
        except RayError as error:
            log.warning("last_lines_lost", reason=brief(error))
        ray.kill(actor)


class RemoteFiles:
    """Asks the courier of this run, if it has one."""

    def __init__(self, config: RunConfig) -> None:
        self.spooled = config.cluster.run_host is not None
        """Whether the driver's host alone has the run folder."""
        self._actor: Any = None

    @property
    def _courier(self) -> Any:
        if self._actor is None:
            self._actor = ray.get_actor(_name())
        return self._actor

    async def clear(self) -> None:
        """Have all other hosts remove what they have of checkpoints."""
        if self.spooled:
            await self._courier.clear.remote()

    async def complete(self, partial: Path, entries: Entries) -> list[str]:
        """Bring the files of a checkpoint here that other hosts have written; returns those that are lost with a host.

        Raises CheckpointError.
        """
        if not self.spooled:
            return []
        collected: Collected = await _facing_user(self._courier.collect.remote(partial, entries))
        if not (collected.missing and collected.lost_hosts):
            return []  # if one is missing without a reason, ``checkpoint_folder.commit`` names it
        hosts = ", ".join(collected.lost_hosts)
        log.warning("checkpoint_files_lost", folder=partial.name, files=len(collected.missing), hosts=hosts)
        return collected.missing

    async def collect(self, folder: Path) -> None:
        """Bring all files of ``folder`` here that other hosts have written. Raises CheckpointError."""
        if self.spooled:
            await _facing_user(self._courier.collect.remote(folder))

    async def deliver(self, checkpoint: Path, addresses: Callable[[], Awaitable[Sequence[str]]]) -> None:
        """Send the trainer's files of a checkpoint to the hosts of its ranks, which ``addresses`` returns.

        Raises CheckpointDamaged, CheckpointError, and TrainerDied if one of the hosts is lost.
        """
        if not self.spooled:
            return
        lost = await _facing_user(self._courier.deliver.remote(checkpoint, sorted(set(await addresses()))))
        if lost is not None:
            raise TrainerDied(f"the host {lost} of a trainer rank was lost before it had the checkpoint")

    def read_message(self, path: Path) -> Sequence[Any]:
        """Have a message of a checkpoint read on this host; see ``RolloutHandle.read_message``."""
        references: Sequence[Any] = self._courier.read_message.options(num_returns=2).remote(path)
        return references


def _name() -> str:
    # Of this driver: that of an earlier one, which was killed, may take a moment to end.
    return f"courier-{ray.get_runtime_context().get_job_id()}"


async def _facing_user(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except Exception as error:
        raise user_facing_error(error) from error
