"""The Ray cluster of a run, and which cores each of its processes computes on. Knows no actor.

On one CPU host each engine and each trainer rank gets cores of its own: two compute-thread pools that share cores spin
against each other, and an engine client in the trainer's process would share its interpreter lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import ray

from async_rl.config.schema import RunConfig
from async_rl.doctor.sizes import object_store_bytes
from async_rl.driver import local_ray
from async_rl.errors import ResourceError
from async_rl.runtime.addresses import with_port
from async_rl.runtime.process import ignore_interrupts, interrupt_once
from async_rl.trainer.parallel import world_size

# Set in every process of the run, before its libraries are imported.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",  # checkpoints come from folders; a typo must not become a download
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Finished calls that Ray's control process remembers: about 3 KiB each, a hundred a second. By default it grows by
    # 300 MiB before it forgets the first, and then keeps the ids of a million that it has forgotten.
    "RAY_task_events_max_num_task_in_gcs": "5000",
    "RAY_task_events_max_dropped_task_attempts_tracked_per_job_in_gcs": "1000",
    # Ray starts its two daemons on jemalloc, which by default has four arenas per core. Each keeps freed pages: the
    # raylet would grow by a tenth within half an hour.
    "RAY_JEMALLOC_PROFILE": "raylet,gcs_server",
    "RAY_JEMALLOC_CONF": "narenas:1,dirty_decay_ms:0,muzzy_decay_ms:0",
}


@dataclass(frozen=True, slots=True)
class CoreAssignment:
    """The cores of each process; None where it may use any."""

    engines: tuple[tuple[int, ...] | None, ...]
    """By replica."""
    trainers: tuple[tuple[int, ...] | None, ...]
    """By trainer rank."""


def assign_cores(config: RunConfig, cores: Sequence[int]) -> CoreAssignment:
    """Give engines and trainer ranks disjoint cores, engines first; no process is pinned if there are not enough."""
    replicas, ranks = config.rollout.replicas, world_size(config.trainer.parallel)
    engine_threads, trainer_threads = config.resources.engine_threads, config.resources.trainer_threads
    needed = replicas * engine_threads + ranks * trainer_threads
    if not config.resources.pin_cores or needed > len(cores):
        return CoreAssignment((None,) * replicas, (None,) * ranks)
    free = iter(cores)
    return CoreAssignment(
        tuple(tuple(next(free) for _ in range(engine_threads)) for _ in range(replicas)),
        tuple(tuple(next(free) for _ in range(trainer_threads)) for _ in range(ranks)),
    )


@contextlib.contextmanager
def ray_cluster(config: RunConfig) -> Iterator[None]:
    """Connect to the Ray cluster at RAY_ADDRESS, or start one on this host that ends with the block."""
    os.environ.update(_ENVIRONMENT)
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False, namespace=config.name)
        else:
            local_ray.start(
                num_cpus=os.cpu_count(),
                object_store_memory=object_store_bytes(config.queue.max_bytes, shutil.disk_usage("/dev/shm").free),
                include_dashboard=False,
                log_to_driver=False,
                namespace=config.name,
                logging_level="warning",
            )
    except SystemExit:  # the answer to SIGTERM of a handler that Ray has installed
        ignore_interrupts()
        raise KeyboardInterrupt from None
    except Exception as error:  # a plain Exception when a daemon of Ray has not answered in time
        raise ResourceError(
            f"Ray did not start: {error} (logs: session_latest/logs in /tmp/ray or RAY_TMPDIR); if the machine is "
            "busy, start the run again when it is less so"
        ) from error
    interrupt_once()
    try:
        yield
    finally:
        # A second signal, within Ray's libraries, would abort the process before it has written how the run ended.
        ignore_interrupts()
        ray.shutdown()


def ray_exporters() -> list[str]:
    """Return host:port of each node on which Ray serves its own metrics, which needs the packages of ray[default]."""
    # Without those packages the port is -1.
    nodes = (node for node in ray.nodes() if node["Alive"] and node.get("MetricsExportPort", -1) > 0)
    return [with_port(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in nodes]


async def free_resources() -> str:
    """Return the CPUs and GPUs that no actor has taken, for example ``1 CPU, 0 GPU``."""
    free = await asyncio.to_thread(ray.available_resources)
    return ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
