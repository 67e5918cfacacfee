"""The actor class of one trainer rank. ``driver.actors`` makes it a Ray actor."""

from __future__ import annotations

from async_rl.config.schema import RunConfig
from async_rl.metrics.exporter import serve_metrics
from async_rl.runtime import logs
from async_rl.runtime.process import pin
from async_rl.trainer.worker import TrainerWorker


class TrainerActor(TrainerWorker):
    """A ``TrainerWorker`` in a process of its own, with its log, its /metrics and its cores."""

    def __init__(self, config: RunConfig, rank: int, init_method: str | None, cores: tuple[int, ...] | None) -> None:
        logs.configure(config.run_dir, f"trainer-{rank}", console=False)
        if cores is not None:
            pin(cores)
        super().__init__(config, rank, init_method)
        self._metrics = serve_metrics(config, "trainer", rank, order=1 + config.rollout.replicas + rank)

    def shutdown(self) -> None:
        self._metrics.close()
        super().shutdown()
