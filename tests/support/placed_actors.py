"""Stand-ins for a run's actors that say where they are, for tests of placement. They load no model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from async_rl.config.schema import RunConfig
from async_rl.runtime.cores import CoreShare
from async_rl.runtime.interfaces import use_interface
from async_rl.trainer import rendezvous
from async_rl.trainer.actor import TrainerActor


@dataclass(frozen=True)
class Seen:
    """Where an actor is, and what it was given."""

    host: str
    """Ray's id of the host."""
    address: str
    gpus: tuple[str, ...]
    cores: CoreShare | None
    environment: dict[str, str]


def seen(cores: CoreShare | None) -> Seen:
    """Return where the calling actor is."""
    context = ray.get_runtime_context()
    gpus = tuple(context.get_accelerator_ids()["GPU"])
    return Seen(context.get_node_id(), ray.util.get_node_ip_address(), gpus, cores, dict(os.environ))


class PlacedRank:
    """Stands in for ``TrainerActor``."""

    def __init__(self, config: RunConfig, rank: int, cores: CoreShare | None, *, one_host: bool) -> None:
        self._rank, self._cores, self._store = rank, cores, None

    def open_store(self) -> str | None:
        return ray.util.get_node_ip_address() if self._rank == 0 else None

    def start(self, checkpoint: Path | None = None, store: str | None = None) -> None:
        self._store = store

    def where(self) -> tuple[Seen, str | None]:
        return seen(self._cores), self._store


class PlacedWorker:
    """Stands in for ``RolloutActor``."""

    def __init__(
        self, config: RunConfig, replica: int, queue: Any, cores: CoreShare | None, parts: Sequence[Any] = ()
    ) -> None:
        self._cores = cores

    def where(self) -> Seen:
        return seen(self._cores)


class MeetingRank(TrainerActor):
    """A ``TrainerActor`` that meets the other ranks over Gloo and builds no model."""

    def start(self, checkpoint: Path | None = None, store: str | None = None) -> None:
        import torch

        assert store is not None
        self._address = store
        if self._rank != 0:
            self._store = rendezvous.join_store(store)
        use_interface(self._config.cluster.interface, rendezvous.host_and_port(store)[0])
        torch.distributed.init_process_group("gloo", store=self._store, rank=self._rank, world_size=2)
        total = torch.tensor(self._rank + 1.0)
        torch.distributed.all_reduce(total)
        self._total = float(total)

    def met(self) -> tuple[Seen, str, float]:
        return seen(None), self._address, self._total
