"""Which backend takes weights to the engines of a run: what auto becomes, and what cannot work on several hosts."""

from __future__ import annotations

import ray

from async_rl.config.schema import RunConfig
from async_rl.errors import ConfigError


def with_backend(config: RunConfig) -> RunConfig:
    """Return the config with sync.backend resolved, for the run folder and for actors in other environments."""
    sync = config.sync.model_copy(update={"backend": config.sync_backend})
    return config.model_copy(update={"sync": sync})


def require_backend(config: RunConfig) -> None:
    """Raise ConfigError for sync.backend shm on a cluster of several hosts, where engines may be on any of them."""
    hosts = sum(node["Alive"] for node in ray.nodes())
    if config.sync_backend == "shm" and hosts > 1:
        raise ConfigError(
            f"sync.backend is shm, which reaches engines on the trainer's host alone, but the cluster has {hosts} "
            "hosts; set sync.backend to auto"
        )
