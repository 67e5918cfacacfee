"""Where the processes of a run live: the Ray cluster, which cores each process computes on, and the actors.

On one CPU host the engine and the trainer get cores of their own: two compute-thread pools that share cores spin
against each other, and an engine client in the trainer's process would share its interpreter lock.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from async_rl.config.schema import RunConfig
from async_rl.data.tokenizer import load_tokenizer
from async_rl.errors import ResourceError
from async_rl.metrics.exporter import Metrics
from async_rl.metrics.timeline import Timeline
from async_rl.queue.client import Outbox, open_groups
from async_rl.rollout.worker import RolloutWorker, WorkerStats
from async_rl.runtime import logs
from async_rl.runtime.process import mark_semaphores, pin
from async_rl.trainer.parallel import world_size
from async_rl.trainer.worker import TrainerWorker

# Besides the queue's payloads the object store holds what is in training and the arguments of calls.
_OBJECT_STORE_HEADROOM = 256 * 2**20
_OBJECT_STORE_MINIMUM = 80 * 2**20  # Ray refuses less than 75 MB
# Ray's own default for asynchronous actors, written down: ``run`` and every probe and push share the one event loop.
_MAX_CONCURRENT_CALLS = 1000

# Set in every process of the run, before its libraries are imported.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",  # checkpoints come from folders; a typo must not become a download
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # What Ray's control process remembers of calls that are over: about 3 KiB each, a hundred a second. By default it
    # has grown by 300 MiB before it forgets the first, and then keeps the ids of a million that it has forgotten.
    "RAY_task_events_max_num_task_in_gcs": "5000",
    "RAY_task_events_max_dropped_task_attempts_tracked_per_job_in_gcs": "1000",
    # Ray starts its two daemons on jemalloc, which by default has four arenas per core, each with freed pages of its
    # own: the raylet grows by a tenth within half an hour, of what it no longer uses.
    "RAY_JEMALLOC_PROFILE": "raylet,gcs_server",
    "RAY_JEMALLOC_CONF": "narenas:1,dirty_decay_ms:0,muzzy_decay_ms:0",
}

# oneDNN keeps what it generated for each shape of a matrix product, 1024 of them by default, some hundred KiB each: an
# engine grows by 300 MiB within minutes. More than one step needs is of no use, as shapes hardly ever come again.
_ONEDNN_CACHE = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}


@dataclass(frozen=True, slots=True)
class Placement:
    """Cores of each engine and each trainer rank; None where the process may use any."""

    engines: tuple[tuple[int, ...] | None, ...]
    trainers: tuple[tuple[int, ...] | None, ...]


def place(config: RunConfig, cores: Sequence[int]) -> Placement:
    """Give engines and trainer ranks disjoint cores, engines first; nobody is pinned where there are too few."""
    replicas, ranks = config.rollout.replicas, world_size(config.trainer.parallel)
    engine_threads, trainer_threads = config.resources.engine_threads, config.resources.trainer_threads
    needed = replicas * engine_threads + ranks * trainer_threads
    if not config.resources.pin_cores or needed > len(cores):
        return Placement((None,) * replicas, (None,) * ranks)
    free = iter(cores)
    return Placement(
        tuple(tuple(next(free) for _ in range(engine_threads)) for _ in range(replicas)),
        tuple(tuple(next(free) for _ in range(trainer_threads)) for _ in range(ranks)),
    )


@contextlib.contextmanager
def ray_cluster(config: RunConfig) -> Iterator[None]:
    """A Ray cluster for the length of the block: the one at RAY_ADDRESS, or one on this host that ends with it."""
    os.environ.update(_ENVIRONMENT)
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False, namespace=config.name)
        else:
            ray.init(
                num_cpus=os.cpu_count(),
                object_store_memory=_object_store_bytes(config),
                include_dashboard=False,
                log_to_driver=False,
                namespace=config.name,
                logging_level="warning",
            )
    except (RayError, OSError, ValueError, RuntimeError) as error:
        raise ResourceError(f"Ray did not start: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def ray_exporters() -> list[str]:
    """host:port of each node of the cluster on which Ray serves its own metrics: it does where it was installed as
    ray[default]."""
    # Without those packages the port is -1.
    nodes = (node for node in ray.nodes() if node["Alive"] and node.get("MetricsExportPort", -1) > 0)
    return [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes]


def start_rollout_worker(config: RunConfig, replica: int, queue: Any, placement: Placement) -> Any:
    """The actor of one replica; its engine is not started yet. ``queue``: the queue's actor."""
    return (
        ray.remote(RolloutActor)
        .options(
            num_cpus=0,
            num_gpus=config.rollout.tensor_parallel_size if config.resources.device == "cuda" else 0,
            max_concurrency=_MAX_CONCURRENT_CALLS,
            runtime_env={"env_vars": _process_environment(config.resources.engine_threads)},
        )
        .remote(config, replica, queue, placement.engines[replica])
    )


def start_trainers(config: RunConfig, placement: Placement) -> list[Any]:
    """One actor per rank of trainer.parallel; their models are not built yet."""
    ranks = world_size(config.trainer.parallel)
    init_method = f"tcp://127.0.0.1:{_free_port()}" if ranks > 1 else None
    return [
        ray.remote(TrainerActor)
        .options(
            num_cpus=0,
            num_gpus=1 if config.resources.device == "cuda" else 0,
            runtime_env={"env_vars": _process_environment(config.resources.trainer_threads)},
        )
        .remote(config, rank, init_method, cores)
        for rank, cores in enumerate(placement.trainers)
    ]


class RolloutActor(RolloutWorker):
    """RolloutWorker in a process of its own, with the real engine, tokenizer, reward, logs and metrics."""

    def __init__(self, config: RunConfig, replica: int, queue: Any, cores: tuple[int, ...] | None) -> None:
        from async_rl.rollout.engine.vllm.engine import VllmEngine
        from async_rl.rollout.environments.turns import Environment
        from async_rl.rollout.rewards.runner import RewardRunner

        logs.configure(config.run_dir, f"rollout-{replica}", console=False)
        mark_semaphores()  # vLLM's
        tokenizer = load_tokenizer(config)
        engine = VllmEngine(config, replica, cores=cores)
        multi_turn = config.rollout.environment.function is not None
        environment = Environment(config.rollout.environment, tokenizer) if multi_turn else None
        self._outbox = Outbox(queue, open_groups(config, f"rollout-{replica}"))
        timeline = Timeline(config.run_dir, f"rollout-{replica}", config.metrics.timeline_bytes)
        rewards = RewardRunner(config.reward)
        super().__init__(config, replica, self._outbox, engine, tokenizer, rewards, environment, timeline)
        self._metrics = serve_metrics(config, "rollout", replica, order=1 + replica)
        self._metrics.include("vllm:")

    async def groups(self) -> AsyncIterator[Any]:
        """The stream of what ``run`` finishes, message and meta in turn: for the driver, which hands it in."""
        async for item in self._outbox.stream(self.run()):
            yield item

    async def accepted(self, group_id: str) -> None:
        """The queue has a group of the stream."""
        self._outbox.accepted(group_id)

    def stats(self) -> WorkerStats:
        """The counters; the driver asks every second, and /metrics shows what it was told."""
        stats = super().stats()
        self._metrics.set("policy_version", stats.version)
        self._metrics.count_to("generated_tokens_total", stats.generated_tokens)
        self._metrics.count_to("resumed_prefill_tokens_total", stats.resumed_prefill_tokens)
        self._metrics.count_to("rollout_paused_seconds_total", stats.paused_s)
        self._metrics.count_to("groups_cut_total", stats.cut_groups)
        return stats

    async def shutdown(self) -> None:
        self._metrics.close()
        await super().shutdown()


class TrainerActor(TrainerWorker):
    """TrainerWorker in a process of its own."""

    def __init__(self, config: RunConfig, rank: int, init_method: str | None, cores: tuple[int, ...] | None) -> None:
        logs.configure(config.run_dir, f"trainer-{rank}", console=False)
        if cores is not None:
            pin(cores)
        super().__init__(config, rank, init_method)
        self._metrics = serve_metrics(config, "trainer", rank, order=1 + config.rollout.replicas + rank)

    def shutdown(self) -> None:
        self._metrics.close()
        super().shutdown()


def serve_metrics(config: RunConfig, role: str, replica: int, order: int) -> Metrics:
    """This process's /metrics, on the ``order``-th port from metrics.port, or a free one where that is 0."""
    metrics = Metrics(role, run=config.name, replica=replica)
    port = config.metrics.port + order if config.metrics.port else 0
    metrics.serve(config.metrics.host, port, config.run_dir)
    return metrics


def _process_environment(threads: int) -> dict[str, str]:
    """Thread pools of that size, whose idle threads sleep: spinning ones take the core from whoever has work."""
    return _ONEDNN_CACHE | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
    }


def _object_store_bytes(config: RunConfig) -> int:
    wanted = config.queue.max_bytes + _OBJECT_STORE_HEADROOM
    # Ray falls back to slow disk files above what /dev/shm has.
    available = int(shutil.disk_usage("/dev/shm").free * 0.9)
    return max(_OBJECT_STORE_MINIMUM, min(wanted, available))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
