"""An engine over several hosts: the actor of each of its hosts but the first, and the first one's hold on them.

    host 1   RolloutActor ── engine core ── ranks 0 to 7           EngineParts
                 │               │ what to compute, over TCP            │ run, shutdown
    host 2   EnginePart ──────── ranks 8 to 15                    ◄─────┘

``driver.actors`` makes the actors, and ends them with the worker. Each has weights of its own host for its ranks. When
one ends, or its ranks do, the engine ends, and its replica is replaced as after any death of an engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import ray
import structlog

from async_rl.config.schema import RunConfig
from async_rl.errors import EngineDied, EngineError
from async_rl.rollout.engine.interface import Part, SpansHosts
from async_rl.rollout.stats import worker_id
from async_rl.runtime import logs, spool, timeouts
from async_rl.runtime.addresses import hold_port
from async_rl.runtime.cores import CoreShare
from async_rl.runtime.failures import brief
from async_rl.runtime.interfaces import interface_address
from async_rl.runtime.numa import own_cores
from async_rl.runtime.process import mark_semaphores, remove_semaphores
from async_rl.weights.on_host import FetchesWeights

log = structlog.get_logger(__name__)


class EnginePart(FetchesWeights):
    """The part ``number`` of a replica's engine, from 1: its ranks on this host, and the host's weights for them."""

    def __init__(self, config: RunConfig, replica: int, number: int, cores: CoreShare | None) -> None:
        from async_rl.rollout.engine.vllm.part import VllmPart

        self._paths = spool.on_this_host(config)
        self._config = config = self._paths.config
        self._number = number
        self._role = f"{worker_id(replica)}-part-{number}"
        logs.configure(config.run_dir, self._role, console=False)
        mark_semaphores(self._role)
        self._ranks = VllmPart(config, replica, self._role, own_cores(cores, config.resources))

    async def run(self, meeting: tuple[str, int]) -> None:
        """Start the ranks, which meet all others at ``meeting``; return once one has ended. Raises EngineError."""
        with self._paths.errors_name_the_run_folder():
            await asyncio.to_thread(self._ranks.run, Part(self._number, _own_address(self._config), meeting))

    async def shutdown(self) -> None:
        """End the ranks, and free the host's weights."""
        await self.free_weights()
        await asyncio.to_thread(self._ranks.shutdown)
        remove_semaphores(self._role)


class EngineParts:
    """The other hosts of a worker's engine; of most engines none. ``actors`` are those of ``EnginePart``, in order."""

    def __init__(self, config: RunConfig, actors: Sequence[Any]) -> None:
        self._config = config
        self.actors = actors
        self._ending = False

    def start(self, engine: Any) -> None:
        """Have the parts start, and ``engine`` meet them when it starts. Raises EngineError, and ResourceError."""
        if not self.actors:
            return
        if not isinstance(engine, SpansHosts):
            raise EngineError(f"{type(engine).__name__} cannot span hosts; set rollout.hosts_per_engine to 1")
        host = _own_address(self._config)
        with hold_port(host, "an engine") as listening:
            meeting = host, int(listening.getsockname()[1])
        engine.span(Part(0, host, meeting))
        for number, actor in enumerate(self.actors, start=1):
            running: Future[None] = actor.run.remote(meeting).future()
            running.add_done_callback(partial(self._ended, engine, number))

    async def hosts(self) -> list[str]:
        """Return the id of each part's host."""
        return list(await asyncio.gather(*(actor.weights_host.remote() for actor in self.actors)))

    async def check(self) -> None:
        """Raise EngineDied if a part is gone. A host that is silent is not known to be gone, and this waits for it."""
        for number, actor in enumerate(self.actors, start=1):
            try:
                await actor.weights_host.remote()
            except Exception as error:
                raise EngineDied(self._of(number, brief(error))) from error

    async def shutdown(self) -> None:
        """End the parts."""
        self._ending = True
        for actor in self.actors:
            with contextlib.suppress(Exception):  # it may be gone already
                await asyncio.wait_for(actor.shutdown.remote(), timeouts.ANSWER_S)

    def _ended(self, engine: SpansHosts, number: int, running: Future[None]) -> None:
        if self._ending:
            return
        error = running.exception()
        why = "one of its ranks has ended" if error is None else brief(error)
        log.error("engine_part_ended", part=number, reason=why)
        engine.lose_part(self._of(number, why))

    def _of(self, number: int, why: str) -> str:
        return f"its part on host {number + 1} of {self._config.rollout.hosts_per_engine}: {why}"


def _own_address(config: RunConfig) -> str:
    """Return the address of this host at which the other hosts of an engine reach it: that of cluster.interface."""
    interface = config.cluster.interface
    address: str = ray.util.get_node_ip_address() if interface is None else interface_address(interface)
    return address
