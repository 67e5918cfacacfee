"""The actors of a run as the training loop uses them: the trainer's ranks as one, and the rollout workers by replica.

Knows ``cluster``, which makes actors; takes no decision about what follows when one dies.
"""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from async_rl.config.schema import RunConfig
from async_rl.driver.cluster import Placement
from async_rl.errors import TrainerDied
from async_rl.rollout.actor import RolloutActor
from async_rl.rollout.stats import WorkerStats
from async_rl.runtime.failures import is_process_death, is_worker_lost, user_facing_error
from async_rl.trainer.actor import TrainerActor
from async_rl.trainer.parallel import world_size

# Ranks compute together: when one dies the others fail, or wait for it for ever. This long after the first failure it
# is known whether a process has died.
_VERDICT_S = 5.0
# Ray's own default for asynchronous actors, written down: ``run`` and every probe and push share the one event loop.
_MAX_CONCURRENT_CALLS = 1000


# oneDNN keeps what it generated for each shape of a matrix product, 1024 of them by default, some hundred KiB each: an
# engine grows by 300 MiB within minutes. More than one step needs is of no use, as shapes hardly ever come again.
_ONEDNN_CACHE = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}


class TrainerRanks:
    """All ranks of trainer.parallel, called together; one that dies takes the others along."""

    def __init__(self, config: RunConfig, placement: Placement) -> None:
        self._config = config
        self._placement = placement
        self._ranks = start_trainers(config, placement)

    def __len__(self) -> int:
        return len(self._ranks)

    @property
    def actors(self) -> list[Any]:
        return list(self._ranks)

    async def start(self, checkpoint: Path | None = None) -> None:
        """Build the model on every rank, and go on from ``checkpoint``."""
        await self.call("start", checkpoint)

    async def call(
        self, method: str, *arguments: Any, shares: Sequence[Any] | None = None, **keywords: Any
    ) -> list[Any]:
        """Call a method of every rank at once, each with its share as first argument where there are shares.

        Raises TrainerDied when a rank's process is gone, else what a rank raised.
        """
        calls = [
            asyncio.ensure_future(
                getattr(rank, method).remote(*([] if shares is None else [shares[index]]), *arguments, **keywords)
            )
            for index, rank in enumerate(self._ranks)
        ]
        try:
            return await asyncio.gather(*calls)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            await asyncio.wait(calls, timeout=0 if is_process_death(error) else _VERDICT_S)
            for rank, call in enumerate(calls):
                raised = call.exception() if call.done() and not call.cancelled() else None
                if raised is not None and is_process_death(raised):
                    raise TrainerDied(f"trainer rank {rank} died during {method}") from error
            raise user_facing_error(error) from error

    def replace(self) -> None:
        """End every rank, and put new ones in their place, which are not started yet."""
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = start_trainers(self._config, self._placement)


class RolloutWorkers:
    """One worker per replica, by its number. What workers counted that have died is kept."""

    def __init__(self, config: RunConfig, queue: Any, placement: Placement) -> None:
        self._config = config
        self._queue = queue
        self._placement = placement
        self.silent: list[int] = []
        """ReplicaSupervisor that did not answer when they were last asked for their stats."""
        self._ended: dict[int, WorkerStats] = {}
        self._last: dict[int, WorkerStats] = {}
        self.workers = {replica: self._make(replica) for replica in range(config.rollout.replicas)}

    def replace(self, replica: int) -> Any:
        """End a worker, and put another in its place, which is not started yet."""
        self.kill(replica)
        if (last := self._last.pop(replica, None)) is not None:
            self._ended[replica] = _sum(last, self._ended.get(replica))
        self.workers[replica] = self._make(replica)
        return self.workers[replica]

    def kill(self, replica: int) -> None:
        """End a worker's process, and its engine with it. What waits for an answer of it fails."""
        ray.kill(self.workers[replica])

    async def stats(self, timeout_s: float) -> list[WorkerStats]:
        """What the workers have counted, also before they were replaced; of one that does not answer, the last."""
        asked = dict(self.workers)
        calls = {replica: asyncio.ensure_future(worker.stats.remote()) for replica, worker in asked.items()}
        done, _ = await asyncio.wait(calls.values(), timeout=timeout_s)
        self.silent = [replica for replica, call in calls.items() if call not in done]
        for replica, call in calls.items():
            if call not in done:
                call.cancel()
            elif (error := call.exception()) is None:
                if asked[replica] is self.workers[replica]:
                    self._last[replica] = call.result()
            elif not is_worker_lost(error):
                raise error
        known = {replica: self._last.get(replica, WorkerStats(replica)) for replica in self.workers}
        return [_sum(stats, self._ended.get(replica)) for replica, stats in known.items()]

    def _make(self, replica: int) -> Any:
        return start_rollout_worker(self._config, replica, self._queue, self._placement)


def _sum(stats: WorkerStats, before: WorkerStats | None) -> WorkerStats:
    """Counters add up; what is of the moment is of the later one."""
    if before is None:
        return stats
    of_the_moment = {"replica", "version", "running_trajectories"}
    names = [field.name for field in dataclasses.fields(stats) if field.name not in of_the_moment]
    return dataclasses.replace(stats, **{name: getattr(stats, name) + getattr(before, name) for name in names})


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


def _process_environment(threads: int) -> dict[str, str]:
    """Thread pools of that size, whose idle threads sleep: spinning ones take the core from whoever has work."""
    return _ONEDNN_CACHE | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
