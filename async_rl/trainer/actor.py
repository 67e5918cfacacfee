"""The actor class of one trainer rank. ``driver.actors`` makes it a Ray actor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from async_rl.config.schema import RunConfig
from async_rl.metrics.exporter import serve_metrics
from async_rl.runtime import logs, spool
from async_rl.runtime.cores import CoreShare
from async_rl.runtime.numa import own_cores
from async_rl.runtime.process import pin
from async_rl.trainer.rendezvous import LOOPBACK
from async_rl.trainer.worker import TrainerWorker

if TYPE_CHECKING:
    from async_rl.runtime.manifest import Entries


class TrainerActor(TrainerWorker):
    """A ``TrainerWorker`` in a process of its own, with its log, its /metrics and its cores."""

    def __init__(self, config: RunConfig, rank: int, cores: CoreShare | None, *, one_host: bool) -> None:
        """Set the process up; ``one_host``: whether all of the run's processes are on this host."""
        self._paths = spool.on_this_host(config)
        config = self._paths.config
        logs.configure(config.run_dir, f"trainer-{rank}", console=False)
        if (own := own_cores(cores, config.resources)) is not None:
            pin(own)
        super().__init__(config, rank, LOOPBACK if one_host else ray.util.get_node_ip_address())
        self._metrics = serve_metrics(config, "trainer", rank, order=1 + config.rollout.replica_range.max + rank)

    def address(self) -> str:
        """Return the address of this host."""
        return self._host

    # Paths are those that the driver has. This host may have another for the same.

    def start(self, checkpoint: Path | None = None, store: str | None = None) -> None:
        with self._paths.errors_name_the_run_folder():
            super().start(None if checkpoint is None else self._paths.here(checkpoint), store)

    def stage_weights(self) -> Sequence[Mapping[str, Any]] | None:
        updates = super().stage_weights()
        if (published := self.published) is not None:
            for kind, count in published.publications.items():
                self._metrics.count_to("sync_publications_total", count, kind=kind)
                self._metrics.count_to("sync_published_bytes_total", published.nbytes[kind], kind=kind)
            if published.changed is not None:
                self._metrics.set("sync_changed_ratio", published.changed)
        return updates

    def begin_save(self, folder: Path) -> None:
        super().begin_save(self._paths.folder(folder))

    def finish_save(self) -> Entries:
        with self._paths.errors_name_the_run_folder():
            return super().finish_save()

    def export(self, folder: Path) -> None:
        super().export(self._paths.here(folder))

    def shutdown(self) -> None:
        self._metrics.close()
        super().shutdown()
