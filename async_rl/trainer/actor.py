"""The actor class of one trainer rank. ``driver.actors`` makes it a Ray actor."""

from __future__ import annotations

import ray

from async_rl.config.schema import RunConfig
from async_rl.metrics.exporter import serve_metrics
from async_rl.runtime import logs
from async_rl.runtime.cores import CoreShare
from async_rl.runtime.numa import own_cores
from async_rl.runtime.process import pin
from async_rl.trainer.rendezvous import LOOPBACK
from async_rl.trainer.worker import TrainerWorker


class TrainerActor(TrainerWorker):
    """A ``TrainerWorker`` in a process of its own, with its log, its /metrics and its cores."""

    def __init__(self, config: RunConfig, rank: int, cores: CoreShare | None, *, one_host: bool) -> None:
        """Set the process up; ``one_host``: whether all of the run's processes are on this host."""
        logs.configure(config.run_dir, f"trainer-{rank}", console=False)
        if (own := own_cores(cores, config.resources)) is not None:
            pin(own)
        super().__init__(config, rank, LOOPBACK if one_host else ray.util.get_node_ip_address())
        self._metrics = serve_metrics(config, "trainer", rank, order=1 + config.rollout.replica_range.max + rank)

    def shutdown(self) -> None:
        self._metrics.close()
        super().shutdown()
