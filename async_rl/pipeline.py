"""The run, from top to bottom: wires the parts, runs the loops, owns the policy version. Knows everyone.

    prompts ──► RolloutWorker × N ──► QueueActor ──► training loop ──► TrainerWorker × ranks
                     ▲                                                      │
                     └──────────────── WeightSync, version v+1 ◄────────────┘

Three things run at once in the driver's event loop: the rollout workers' ``run`` calls, the training loop, and the
monitor, which publishes what the actors count. The first that raises ends the run.

    who            waits for                                    released by
    rollout        admission (staleness budget)                 a push, or a group that is given back
    rollout        room in the queue, by groups or bytes        a lease
    rollout        the end of a push                            resume
    training loop  groups_per_step × require_batches groups     put
                   (trainer.streaming: one, or one per rank)
    push           running generations (mode drain only)        their end
"""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from async_rl import doctor, logs
from async_rl.cluster import (
    place,
    ray_cluster,
    start_rollout_workers,
    start_trainers,
)
from async_rl.config import RunConfig
from async_rl.errors import AsyncRLError, ConfigError
from async_rl.failures import explain
from async_rl.model_config import read_model_config
from async_rl.queue.ray_queue import Payload, start_queue
from async_rl.queue.records import GroupMeta
from async_rl.queue.staleness import oldest_allowed_version
from async_rl.recorder import Recorder
from async_rl.rollout.prompts import Dataset, DatasetCursor, read_jsonl
from async_rl.rollout.tokenization import load_tokenizer
from async_rl.trainer.packing import split_over_ranks
from async_rl.trainer.parallel import Place
from async_rl.trainer.report import StepReport
from async_rl.types import Prompt
from async_rl.weights.sync import WeightSync

log = structlog.get_logger(__name__)

Leased = list[tuple[GroupMeta, Payload]]

_MONITOR_PERIOD_S = 1.0
# An orderly end asks the actors to close; one that does not answer in time is ended with its process.
_SHUTDOWN_S = 8.0


def run(config: RunConfig) -> int:
    """Run ``config`` to its end. Returns the exit code: 0 finished, 130 interrupted. Raises AsyncRLError on failure.

    summary.json is written in every case once the run folder exists.
    """
    started = time.monotonic()
    doctor.require(config)
    if config.prepare is not None:
        _load(config.prepare)(config)
        doctor.require(config)
    config = _resolved(config)
    tokenizer = load_tokenizer(config)
    train_set, eval_set = _read_data(config, tokenizer)
    eval_prompts = [] if eval_set is None else list(eval_set.first(config.eval.n, label="eval", key="eval.n"))
    with Recorder(config, started, tokenizer.decode) as recorder:
        logs.configure(config.run_dir, "pipeline", console=True)
        recorder.data(train=len(train_set.bad_rows), eval=0 if eval_set is None else len(eval_set.bad_rows))
        try:
            with ray_cluster(config):
                asyncio.run(_until_interrupted(Pipeline(config, recorder, train_set, eval_prompts).run()))
        except (_Interrupted, KeyboardInterrupt):  # the latter before the event loop took over signals
            recorder.finish("interrupted")
            return 130
        except BaseException as error:
            failure = explain(error, config.run_dir)
            recorder.finish(f"failed: {failure}")
            raise failure from error
        recorder.finish("finished")
    return 0


class Pipeline:
    """One run on a cluster that is up."""

    def __init__(
        self, config: RunConfig, recorder: Recorder, train_set: Dataset, eval_prompts: Sequence[Prompt]
    ) -> None:
        self._config = config
        self._recorder = recorder
        self._version = 0
        self._eval_prompts = eval_prompts
        cursor = DatasetCursor(train_set, shuffle=config.data.shuffle, seed=config.seed)
        placement = place(config, sorted(os.sched_getaffinity(0)))
        self._queue = start_queue(config, cursor)
        self._trainers = start_trainers(config, placement)
        self._workers = start_rollout_workers(config, self._queue, placement)
        self._model = read_model_config(config.model.path)
        self._sync = WeightSync(config, self._model, self._trainers, self._workers)

    async def run(self) -> None:
        try:
            await self._start()
            await self._evaluate()
            self._recorder.training_begins()
            await _first_failure(self._train(), self._monitor(), *(self._roll_out(worker) for worker in self._workers))
            await asyncio.gather(*(worker.stop.remote() for worker in self._workers))
            await self._count()
            self._recorder.training_ended()
            await self._evaluate()
            await asyncio.gather(*(trainer.export.remote(self._recorder.final_model) for trainer in self._trainers))
        finally:
            await self._shut_down()

    async def _start(self) -> None:
        """Engines and trainers come up side by side; then they must agree on the weights before anything is sampled."""
        await asyncio.gather(*(actor.start.remote() for actor in [*self._trainers, *self._workers]))
        await asyncio.gather(*(trainer.connect.remote(self._workers) for trainer in self._trainers))
        agreement = await self._sync.begin()
        unreached = agreement.unreached_experts
        self._recorder.event(
            f"engine and trainer agree to {agreement.report.max_abs_diff:.1e} on the checkpoint's weights"
            + (f"; {unreached} experts are not reached by the probe" if unreached else "")
        )

    # -- the training loop --------------------------------------------------------------------------------------

    async def _train(self) -> None:
        config = self._config
        for step in range(1, config.trainer.steps + 1):
            began = time.monotonic()
            leased, reports = await (self._streamed_update() if config.streams else self._update())
            await self._queue.ack([meta.group_id for meta, _ in leased])
            step_s, version = time.monotonic() - began, self._version
            async with asyncio.TaskGroup() as concurrently:
                if step % config.async_training.trigger_parameter_sync_step == 0 or step == config.trainer.steps:
                    concurrently.create_task(self._push())
                    await asyncio.sleep(0)  # its first calls are on their way while the step is written down
                self._recorder.step(step, version, reports, leased, step_s=step_s)
            every = config.checkpoint.every
            if every and step % every == 0:
                folder = self._recorder.checkpoints
                seconds = await asyncio.gather(*(trainer.save.remote(folder, step) for trainer in self._trainers))
                self._recorder.event(f"checkpoint of step {step} in {max(seconds):.1f} s")

    async def _update(self) -> tuple[Leased, list[StepReport]]:
        """The updates of one training step once all its groups are there; rank 0's reports, which speak for all."""
        leased = await self._queue.lease("trainer", self._config.required_groups)
        size = self._config.trainer.groups_per_step
        batches = [leased[first : first + size] for first in range(0, len(leased), size)]
        by_rank = list(zip(*(self._shares(batch) for batch in batches), strict=True))
        reports, _ = await asyncio.gather(self._trainers_call("train_step", by_rank, *self._versions()), self._count())
        return leased, reports[0]

    async def _streamed_update(self) -> tuple[Leased, list[StepReport]]:
        """The update of one training step, whose microbatches are computed as soon as groups are there."""
        leased: Leased = []
        versions, ranks = self._versions(), self._config.trainer.parallel.dp
        loads = [0.0] * ranks
        while (missing := self._config.required_groups - len(leased)) > 0:
            # Enough that every data-parallel rank has something to do.
            part = await self._queue.lease("trainer", missing, at_least=min(ranks, missing))
            shares = self._shares(part, loads)
            await self._trainers_call("accumulate", shares, *versions, first=not leased)
            leased += part
        reports, _ = await asyncio.gather(self._trainers_call("finish_step"), self._count())
        return leased, [reports[0]]

    def _versions(self) -> tuple[int, int]:
        """The version that consumes tokens now, and the oldest that may have sampled them."""
        return self._version, oldest_allowed_version(self._version, self._config.async_training.max_staleness)

    def _shares(self, batch: Leased, loads: list[float] | None = None) -> list[list[Payload]]:
        """The groups of each rank, balanced by cost over the data-parallel ranks, on top of ``loads``, which grow."""
        sizes = self._config.trainer.parallel
        costs = [sum(self._model.sequence_cost(length) for length in meta.lengths) for meta, _ in batch]
        by_replica = split_over_ranks(costs, sizes.dp, loads or ())
        if loads is not None:
            for replica, indices in enumerate(by_replica):
                loads[replica] += sum(costs[index] for index in indices)
        return [
            [batch[index][1] for index in by_replica[Place.of(sizes, rank).dp]] for rank in range(len(self._trainers))
        ]

    async def _trainers_call(
        self, method: str, shares: Sequence[Any] | None = None, *arguments: Any, **keywords: Any
    ) -> list[Any]:
        """Call every rank at once, each with its share where there are shares."""
        return await asyncio.gather(
            *(
                getattr(trainer, method).remote(*([] if shares is None else [shares[rank]]), *arguments, **keywords)
                for rank, trainer in enumerate(self._trainers)
            )
        )

    async def _push(self) -> None:
        """Weights of the last update become version v+1 everywhere, and the next window opens."""
        record = await self._sync.push(self._version + 1)
        self._version += 1
        every = self._config.eval.every
        if every and self._version % every == 0:
            await self._evaluate()
        await self._queue.advance(self._version)
        self._recorder.sync(record)
        await self._sync.resume()

    async def _evaluate(self) -> None:
        """Greedy evaluation at the current version, the problems spread over the replicas."""
        if not self._eval_prompts:
            return
        count = len(self._workers)
        results = await asyncio.gather(
            *(
                worker.evaluate.remote(self._eval_prompts[replica::count])
                for replica, worker in enumerate(self._workers)
                if self._eval_prompts[replica::count]
            )
        )
        self._recorder.evaluation(results)

    # -- beside it ----------------------------------------------------------------------------------------------

    async def _roll_out(self, worker: Any) -> None:
        await worker.run.remote()
        # The dataset has no end, so a worker that stops early means groups that nobody makes.
        raise AsyncRLError("a rollout worker stopped before the last training step")

    async def _monitor(self) -> None:
        while True:
            await asyncio.sleep(_MONITOR_PERIOD_S)
            await self._count()

    async def _count(self) -> None:
        queue, workers = await asyncio.gather(
            self._queue.stats(), asyncio.gather(*(worker.stats.remote() for worker in self._workers))
        )
        self._recorder.counted(queue, workers)

    async def _shut_down(self) -> None:
        actors = [*self._workers, *self._trainers]
        ends = asyncio.gather(*(actor.shutdown.remote() for actor in actors), return_exceptions=True)
        try:
            await asyncio.wait_for(ends, _SHUTDOWN_S)
        except TimeoutError:
            log.warning("not every actor closed in time; their processes are ended", seconds=_SHUTDOWN_S)


class _Interrupted(Exception):
    """Ctrl-C or SIGTERM."""


async def _until_interrupted(work: Any) -> None:
    """Await ``work``; on Ctrl-C or SIGTERM cancel it, let it clean up, and raise _Interrupted."""
    task = asyncio.ensure_future(work)
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupt)
    try:
        await task
    except asyncio.CancelledError:
        if interrupted:
            raise _Interrupted from None
        raise


async def _first_failure(main: Any, *others: Any) -> None:
    """Await ``main``; whatever of ``others`` raises first is raised instead. All are ended on return."""
    leader = asyncio.ensure_future(main)
    tasks = {leader, *(asyncio.ensure_future(other) for other in others)}
    try:
        while not leader.done():
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _read_data(config: RunConfig, tokenizer: Any) -> tuple[Dataset, Dataset | None]:
    """Rows for training and evaluation, tokenized. Bad ones are reported as data.on_bad_row says."""

    def read(path: Path) -> Dataset:
        dataset = read_jsonl(
            path,
            encode=tokenizer.encode,
            prompt_field=config.data.prompt_field,
            max_prompt_tokens=config.data.max_prompt_tokens,
            on_bad_row=config.data.on_bad_row,
        )
        if (report := dataset.bad_row_report()) is not None:
            log.warning("rows skipped", report=report)
        return dataset

    return read(config.data.train), None if config.data.eval is None else read(config.data.eval)


def _resolved(config: RunConfig) -> RunConfig:
    """The config with what depends on this machine filled in: a free name (name, name-2, ...) and the device."""
    device = "cuda" if doctor.uses_gpu(config) else "cpu"
    config = config.model_copy(update={"resources": config.resources.model_copy(update={"device": device})})
    number, candidate = 1, config
    while candidate.run_dir.exists() and any(candidate.run_dir.iterdir()):
        number += 1
        candidate = config.model_copy(update={"name": f"{config.name}-{number}"})
    return candidate


def _load(name: str) -> Callable[[RunConfig], None]:
    module, _, function = name.partition(":")
    try:
        loaded: Callable[[RunConfig], None] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"prepare: cannot load {name}: {error}") from error
    return loaded
