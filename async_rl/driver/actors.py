"""The actors of a run as the driver calls them: the trainer's ranks as one object, the rollout workers by replica.

``TrainerRanks`` and ``RolloutHandle`` have one typed method per remote call, so that arguments are checked across the
process boundary. This module creates the actors and calls them. It does not decide what follows when one dies.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray

from async_rl.config.schema import RunConfig
from async_rl.driver.places import Place, Places
from async_rl.driver.remote_files import RemoteFiles
from async_rl.errors import TrainerDied
from async_rl.metrics.records import StepReport
from async_rl.queue.client import Payload
from async_rl.rollout.actor import RolloutActor
from async_rl.rollout.engine.interface import Score
from async_rl.rollout.evaluation import EvalProblem, EvalResult
from async_rl.rollout.moments import SavedGroup
from async_rl.rollout.parts import EnginePart
from async_rl.rollout.stats import WorkerStats
from async_rl.runtime import timeouts
from async_rl.runtime.failures import (
    brief,
    is_lost_peer,
    is_machine_fault,
    is_process_death,
    is_worker_lost,
    user_facing_error,
)
from async_rl.runtime.manifest import Entries
from async_rl.runtime.process import run_token
from async_rl.trainer.actor import TrainerActor
from async_rl.types import ExpertIds, Float32Array, Int32Array
from async_rl.weights.sides import Replica

# Ray's own default for asynchronous actors, written down: ``run`` and every probe and weight sync share one event loop.
_MAX_CONCURRENT_CALLS = 1000

# oneDNN keeps what it generated for each shape of a matrix product, 1024 of them by default, some hundred KiB each: an
# engine grows by 300 MiB within minutes. More than one step needs is useless, because shapes hardly ever recur.
_ONEDNN_CACHE = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}

# Threads of a GPU rank's work on the CPU: packing, checkpoints, export. GPU hosts have a dozen cores or more per GPU,
# and Ray sets one thread where nothing is set.
_GPU_RANK_THREADS = 8

_GPU_RANK_ENVIRONMENT = {
    # Megatron's overlap of communication and computation under tensor parallelism relies on kernels that start in the
    # order in which they were launched, which GPUs before Blackwell do on a single queue.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Microbatches have ever other lengths, whose blocks the allocator could else not use for each other.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
# Transformer Engine multiplies float32 matrices in TF32 whatever torch is told; this tells NVIDIA's libraries.
_EXACT_FLOAT32 = {"NVIDIA_TF32_OVERRIDE": "0"}
_TF32 = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}

T = TypeVar("T")

Shares = Sequence[Sequence[Mapping[str, Payload]]]
"""By rank: the rank's groups of each mini-batch of a step, by group id."""


class TrainerRanks:
    """The ranks of trainer.parallel, always called together; when one dies, all of them are replaced.

    Each method calls the method of ``TrainerWorker`` that has its name on every rank at once. ``shares`` hold one entry
    per rank. Methods with a result return that of rank 0, because the ranks compute it together. Each method raises
    TrainerDied when the process of a rank is gone, or a rank has lost a peer in a collective, else what a rank raised.
    Those that train also raise TrainerDied for what other faults of a machine raise in a library: memory that is short.
    """

    def __init__(self, config: RunConfig, places: Places) -> None:
        self._config = config
        self._places = places
        self._remote = RemoteFiles(config)
        self._ranks: list[Any] = []  # until ``start``

    def __len__(self) -> int:
        return len(self._ranks)

    @property
    def actors(self) -> list[Any]:
        return list(self._ranks)

    async def start(self, checkpoint: Path | None = None) -> None:
        """Create the ranks at their places, build the model on each, and load ``checkpoint`` where one is given."""
        if not self._ranks:
            places = await self._places.of_trainer()
            one_host = self._places.one_host
            self._ranks = [
                start_trainer(self._config, rank, place, one_host=one_host) for rank, place in enumerate(places)
            ]
        if checkpoint is not None:
            await self._remote.deliver(checkpoint, self._addresses)
        store = None
        if len(self._ranks) > 1:
            store = await self._together("open_store", [rank.open_store.remote() for rank in self._ranks])
        await self._together("start", [rank.start.remote(checkpoint, store) for rank in self._ranks])
        if checkpoint is not None:
            await self._remote.clear()

    async def _addresses(self) -> list[str]:
        """Return the address of each rank's host."""
        return await self._all("address", [rank.address.remote() for rank in self._ranks])

    async def fetch(self, shares: Shares) -> list[str]:
        """Have every rank read its groups ahead of the call that computes on them.

        Returns the ids of groups that a rank cannot read, because they are lost.
        """
        each = await self._trained("fetch", [rank.fetch.remote(share) for rank, share in self._with(shares)])
        return list(dict.fromkeys(group_id for lost in each for group_id in lost))

    async def train_step(self, shares: Shares, version: int, oldest_version: int) -> list[StepReport]:
        """Do one optimizer update per mini-batch."""
        calls = [rank.train_step.remote(share, version, oldest_version) for rank, share in self._with(shares)]
        reports: list[list[StepReport]] = await self._trained("train_step", calls)
        return reports[0]

    async def accumulate(self, shares: Shares, version: int, oldest_version: int, *, first: bool) -> None:
        """Compute the gradients of a part of a step's groups; ``first`` begins the step."""
        calls = [
            rank.accumulate.remote(share, version, oldest_version, first=first) for rank, share in self._with(shares)
        ]
        await self._trained("accumulate", calls)

    async def finish_step(self) -> StepReport:
        """Do the optimizer update of the step whose groups were accumulated."""
        reports: list[StepReport] = await self._trained(
            "finish_step", [rank.finish_step.remote() for rank in self._ranks]
        )
        return reports[0]

    async def connect(self, replicas: Sequence[Replica]) -> None:
        """Set up weight transfer to these replicas, in place of earlier ones."""
        actors = [replica.actor for replica in replicas]
        await self._together("connect", [rank.connect.remote(actors) for rank in self._ranks])

    async def stage_weights(self) -> Sequence[Mapping[str, Any]] | None:
        """Copy the weights to where replicas take them from, and return what ``RolloutHandle.receive`` needs for it.

        That is of each replica, in the order in which they were connected. None where ``send_weights`` must be called.
        """
        return await self._together("stage_weights", [rank.stage_weights.remote() for rank in self._ranks])

    async def send_weights(self, version: int, only: int | None = None) -> float:
        """Transfer the weights as policy version ``version`` to all connected replicas, or to that at index ``only``.

        Returns the seconds that it took.
        """
        return await self._together("send_weights", [rank.send_weights.remote(version, only) for rank in self._ranks])

    async def logprobs(
        self, sequences: Sequence[Int32Array], routed_experts: Sequence[ExpertIds] | None
    ) -> list[Float32Array]:
        """Score the canary's probe, with ``routed_experts`` replayed where given."""
        calls = [rank.logprobs.remote(sequences, routed_experts) for rank in self._ranks]
        return await self._together("logprobs", calls)

    async def fingerprints(
        self, sequences: Sequence[Int32Array], routed_experts: Sequence[ExpertIds] | None
    ) -> list[Float32Array]:
        """Fingerprint the residual stream layer by layer, with ``routed_experts`` replayed where given."""
        calls = [rank.fingerprints.remote(sequences, routed_experts) for rank in self._ranks]
        return await self._together("fingerprints", calls)

    async def native_routing(self, sequences: Sequence[Int32Array]) -> list[Int32Array]:
        """Return the experts that the trainer's own routers choose, [N-1, L, K] for each sequence."""
        return await self._together("native_routing", [rank.native_routing.remote(sequences) for rank in self._ranks])

    async def begin_save(self, folder: Path) -> None:
        """Begin to write the trainer's state into ``folder``. Returns once every rank has copied its part."""
        await self._together("begin_save", [rank.begin_save.remote(folder) for rank in self._ranks])

    async def is_saved(self) -> bool:
        """Return whether the files of all ranks are written; asked between the calls of a step."""
        return all(await self._all("is_saved", [rank.is_saved.remote() for rank in self._ranks]))

    async def finish_save(self) -> list[Entries]:
        """Complete the save. Returns the entries of each rank's files."""
        return await self._all("finish_save", [rank.finish_save.remote() for rank in self._ranks])

    async def export(self, folder: Path) -> None:
        """Write the model as a Hugging Face checkpoint folder."""
        await self._together("export", [rank.export.remote(folder) for rank in self._ranks])
        await self._remote.collect(folder)

    def shutdown(self) -> list[Awaitable[None]]:
        """Ask every rank to close. Returns one call per rank."""
        return [rank.shutdown.remote() for rank in self._ranks]

    def replace(self) -> None:
        """End every rank, so that ``start`` creates new ones in their place."""
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []

    def _with(self, shares: Sequence[T]) -> list[tuple[Any, T]]:
        return list(zip(self._ranks, shares, strict=True))

    async def _trained(self, method: str, calls: Sequence[Awaitable[T]]) -> list[T]:
        """Await the calls of all ranks as ``_all`` does; a machine's fault in one of them is a TrainerDied."""
        try:
            return await self._all(method, calls)
        except Exception as error:
            if not is_machine_fault(error):
                raise
            # The other ranks wait for one that has left the step, or have done other parts of it.
            raise TrainerDied(f"the trainer failed in {method}: {brief(error)}") from error

    async def _together(self, method: str, calls: Sequence[Awaitable[T]]) -> T:
        """Await the calls of all ranks and return the result of rank 0."""
        return (await self._all(method, calls))[0]

    async def _all(self, method: str, calls: Sequence[Awaitable[T]]) -> list[T]:
        """Await the calls of all ranks and return their results."""
        futures = [asyncio.ensure_future(call) for call in calls]
        try:
            return await asyncio.gather(*futures)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            await asyncio.wait(futures, timeout=0 if is_process_death(error) else timeouts.RANK_DEATH_S)
            for rank, future in enumerate(futures):
                raised = future.exception() if future.done() and not future.cancelled() else None
                if raised is not None and is_process_death(raised):
                    raise TrainerDied(f"trainer rank {rank} died during {method}") from raised
            if is_lost_peer(error):
                # Peers on other hosts notice a dead one before Ray does, which takes it for alive for up to a minute.
                raise TrainerDied(f"the trainer lost a rank during {method}: {brief(error)}") from error
            raise user_facing_error(error) from error


class RolloutHandle:
    """One rollout worker's actor: a typed method per remote call, which is sent at once and awaited by the caller.

    Each calls the method of ``RolloutActor`` that has its name. Awaiting raises what Ray raises.
    """

    def __init__(self, actor: Any, parts: Sequence[Any] = ()) -> None:
        self.actor = actor
        """The Ray actor itself, for vLLM's weight transfer, which calls it directly."""
        self.actors = [actor, *parts]
        """It, and those of its engine's other hosts."""

    def start(self) -> Awaitable[None]:
        """Start the engine."""
        return _typed(self.actor.start.remote())

    def groups(self) -> AsyncIterator[Any]:
        """Run the worker, and stream what it finishes; see ``queue.handover``."""
        stream: AsyncIterator[Any] = self.actor.groups.options(num_returns="streaming").remote()
        return stream

    def accepted(self, group_id: str) -> None:
        """Tell the worker that the queue has a group of its stream. Does not wait."""
        self.actor.accepted.remote(group_id)

    def pause(self, *, end_calls: bool) -> Awaitable[None]:
        """Stop generation as partial_rollout.mode says; ``end_calls`` ends calls that it would freeze."""
        return _typed(self.actor.pause.remote(end_calls=end_calls))

    def receive(self, update: Mapping[str, Any], version: int) -> Awaitable[None]:
        """Take weights that the trainer has staged, as policy version ``version``."""
        return _typed(self.actor.receive.remote(update, version))

    def wake(self) -> Awaitable[None]:
        """Let the engine compute again, for the canary and evaluation; rollouts still wait."""
        return _typed(self.actor.wake.remote())

    def resume(self) -> Awaitable[None]:
        """Resume interrupted generations and take new work."""
        return _typed(self.actor.resume.remote())

    def stop(self) -> Awaitable[None]:
        """Begin no more work and end what is under way; the engine can still evaluate."""
        return _typed(self.actor.stop.remote())

    def unanswered(self) -> Awaitable[str | None]:
        """Return the engine call of a weight sync that is still without an answer; None if there is none."""
        return _typed(self.actor.unanswered.remote())

    def score(self, sequences: Sequence[Int32Array]) -> Awaitable[list[Score]]:
        """Score the canary's probe under the engine's weights."""
        return _typed(self.actor.score.remote(sequences))

    def wake_and_score(self, sequences: Sequence[Int32Array]) -> Awaitable[list[Score]]:
        """Do ``wake`` and then ``score``."""
        return _typed(self.actor.wake_and_score.remote(sequences))

    def probed_routing(self) -> Awaitable[list[ExpertIds]]:
        """Return the routed experts that the last ``wake_and_score`` left behind."""
        return _typed(self.actor.probed_routing.remote())

    def fingerprints(self, sequences: Sequence[Int32Array]) -> Awaitable[list[Float32Array | None]]:
        """Fingerprint the engine's residual stream layer by layer; None if it cannot."""
        return _typed(self.actor.fingerprints.remote(sequences))

    def evaluate(self, problems: Sequence[EvalProblem]) -> Awaitable[EvalResult]:
        """Answer and score ``problems``."""
        return _typed(self.actor.evaluate.remote(problems))

    def freeze(self, step: int) -> Awaitable[None]:
        """Keep references to the groups in flight as they are now, for the checkpoint of ``step``."""
        return _typed(self.actor.freeze.remote(step))

    def write_in_flight(self, step: int, folder: Path) -> Awaitable[dict[str, SavedGroup]]:
        """Write what was kept for ``step`` into ``folder``, and return it by group id."""
        return _typed(self.actor.write_in_flight.remote(step, folder))

    def salvage(self) -> AsyncIterator[Any]:
        """Stream id and message of each group in flight of a worker whose engine has died."""
        stream: AsyncIterator[Any] = self.actor.salvage.options(num_returns="streaming").remote()
        return stream

    def adopt(self, messages: Sequence[Any]) -> Awaitable[list[str]]:
        """Resume groups of other workers, given as files or references to their messages.

        Returns the ids of those that fit the settings. Messages do not pass through the driver.
        """
        return _typed(self.actor.adopt.remote(*messages))

    def read_message(self, path: Path) -> Sequence[Any]:
        """Have the worker read a message from a file. Returns references to the message, and to its size in bytes.

        The message lies in the object store of the worker's host, and belongs to this process.
        """
        references: Sequence[Any] = self.actor.read_message.options(num_returns=2).remote(path)
        return references

    def stats(self) -> Awaitable[WorkerStats]:
        """Return the worker's counters."""
        return _typed(self.actor.stats.remote())

    def shutdown(self) -> Awaitable[None]:
        """End the engine with its processes."""
        return _typed(self.actor.shutdown.remote())


class RolloutWorkers:
    """The rollout worker of each replica that has one, by number. The counters of workers that have died are kept."""

    def __init__(self, config: RunConfig, queue: Any, places: Places) -> None:
        self._config = config
        self._queue = queue
        self._places = places
        self.silent: list[int] = []
        """Replicas that did not respond when they were last asked for their stats."""
        self._ended: dict[int, WorkerStats] = {}
        self._last: dict[int, WorkerStats] = {}
        self.workers: dict[int, RolloutHandle] = {}

    @property
    def actors(self) -> list[Any]:
        return [actor for worker in self.workers.values() for actor in worker.actors]

    async def placed(self, replica: int) -> None:
        """Return once a replica has a place; see ``Places.placed``."""
        await self._places.placed(replica)

    async def has_left(self, replica: int, error: BaseException) -> bool:
        """Return whether the host of a worker that died of ``error`` is gone; see ``Places.has_left``."""
        return await self._places.has_left(replica, error)

    async def until_gone(self, replica: int) -> None:
        """Return once the host of a replica is gone; see ``Places.until_gone``."""
        await self._places.until_gone(replica)

    def replace(self, replica: int) -> RolloutHandle:
        """Create a worker at the place of its replica, which is not started yet. An earlier one is ended."""
        self._end(replica)
        places = self._places.of_replica(replica)
        self.workers[replica] = start_rollout_worker(self._config, replica, self._queue, places)
        return self.workers[replica]

    def remove(self, replica: int) -> None:
        """Give up the worker of a replica, and its place, because its host is gone."""
        self._end(replica)
        self.workers.pop(replica, None)
        self._places.give_up(replica)

    def _end(self, replica: int) -> None:
        self.kill(replica)
        if (last := self._last.pop(replica, None)) is not None:
            self._ended[replica] = _sum(last, self._ended.get(replica))

    def kill(self, replica: int) -> None:
        """End a worker's process, if there is one, and its engine with it. Calls of it that are under way fail."""
        if replica in self.workers:
            for actor in self.workers[replica].actors:
                ray.kill(actor)

    async def stats(self, timeout_s: float) -> list[WorkerStats]:
        """Return each replica's counters, including those of workers that are gone by now.

        A worker that does not respond within ``timeout_s`` is reported as it last was.
        """
        asked = dict(self.workers)
        calls = {replica: asyncio.ensure_future(worker.stats()) for replica, worker in asked.items()}
        if calls:  # none while no replica has a host
            await asyncio.wait(calls.values(), timeout=timeout_s)
        self.silent = [replica for replica, call in calls.items() if not call.done()]
        for replica, call in calls.items():
            if not call.done():
                call.cancel()
            elif (error := call.exception()) is None:
                if asked[replica] is self.workers.get(replica):
                    self._last[replica] = call.result()
            elif not is_worker_lost(error):
                raise error
        gone = {replica: WorkerStats(replica, gone=True) for replica in self._ended}
        known = gone | {replica: self._last.get(replica, WorkerStats(replica)) for replica in self.workers}
        return [_sum(stats, self._ended.get(replica)) for replica, stats in sorted(known.items())]


def _typed(call: Awaitable[T]) -> Awaitable[T]:
    """Return Ray's untyped reference with the type that the caller declares."""
    return call


def _sum(stats: WorkerStats, before: WorkerStats | None) -> WorkerStats:
    """Add up the counters; momentary values are those of ``stats``, the later ones."""
    if before is None:
        return stats
    momentary = {"replica", "gone", "version", "running_trajectories"}
    names = [field.name for field in dataclasses.fields(stats) if field.name not in momentary]
    return dataclasses.replace(stats, **{name: getattr(stats, name) + getattr(before, name) for name in names})


def start_rollout_worker(config: RunConfig, replica: int, queue: Any, places: Sequence[Place]) -> RolloutHandle:
    """Create the actors of one replica, whose engine is not started yet. ``queue`` is the queue's actor.

    The first of ``places`` is that of the worker, the others those of its engine's other hosts.
    """
    options = {
        "num_cpus": 0,
        "num_gpus": config.engine_gpus if config.resources.device == "cuda" else 0,
        "max_concurrency": _MAX_CONCURRENT_CALLS,
        "runtime_env": {"env_vars": _process_environment(config.resources.engine_threads)},
    }
    own, *others = places
    parts = [
        ray.remote(EnginePart).options(**options, **place.options).remote(config, replica, number, place.cores)
        for number, place in enumerate(others, start=1)
    ]
    worker = ray.remote(RolloutActor).options(**options, **own.options)
    return RolloutHandle(worker.remote(config, replica, queue, own.cores, parts), parts)


def start_trainer(config: RunConfig, rank: int, place: Place, *, one_host: bool) -> Any:
    """Create the actor of one rank of trainer.parallel, whose model is not built yet."""
    on_gpu = config.resources.device == "cuda"
    environment = _process_environment(_GPU_RANK_THREADS if on_gpu else config.resources.trainer_threads)
    if on_gpu:
        environment |= gpu_rank_environment(config)
    return (
        ray.remote(TrainerActor)
        .options(
            num_cpus=0,
            num_gpus=config.rank_gpus if on_gpu else 0,
            runtime_env={"env_vars": environment},
            **place.options,
        )
        .remote(config, rank, place.cores, one_host=one_host)
    )


def gpu_rank_environment(config: RunConfig) -> dict[str, str]:
    """Return the variables of a trainer rank on a GPU; one that the driver's environment has keeps its value."""
    defaults = _GPU_RANK_ENVIRONMENT | (_TF32 if config.trainer.tf32 else _EXACT_FLOAT32)
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


def _process_environment(threads: int) -> dict[str, str]:
    """Set thread pools of that size whose idle threads sleep: spinning ones take cores from processes with work.

    Of the driver's own environment, other hosts get the token of the run.
    """
    return (
        _ONEDNN_CACHE
        | run_token()
        | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "KMP_BLOCKTIME": "0",
        }
    )
