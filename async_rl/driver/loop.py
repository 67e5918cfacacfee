"""The run, from top to bottom: wires the parts, runs the loops, owns the policy version. Knows everyone.

    prompts ──► RolloutWorker × N ──► QueueActor ──► training loop ──► TrainerWorker × ranks
                     ▲                                                      │
                     └──────────────── WeightSync, version v+1 ◄────────────┘

In the driver's event loop run at once: the training loop; for each replica ``ReplicaSupervisor.tend``, which hands in
what the worker finishes and puts another in its place when it dies; and the monitor, which publishes what the actors
count. The first that raises ends the run.

    who            waits for                                    released by
    rollout        admission (staleness budget)                 a push, or a group that is given back
    rollout        room in the queue, by groups or bytes        a lease
    rollout        the end of a push                            resume
    training loop  groups_per_step × require_batches groups     put
                   (trainer.streaming: one, or one per rank)
    push           running generations (mode drain only)        their end
    new worker     weights                                      the next push, which its coming asks for

What dies, and what follows: docs/reliability.md.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import structlog

from async_rl import doctor
from async_rl.config.schema import RunConfig
from async_rl.data.prompts import Dataset, DatasetCursor
from async_rl.data.tokenizer import load_tokenizer
from async_rl.driver import checkpoint, checkpoint_folder, inputs
from async_rl.driver.actors import RolloutWorkers, TrainerRanks
from async_rl.driver.checkpoint import RunState
from async_rl.driver.cluster import place, ray_cluster, ray_exporters
from async_rl.driver.monitor import Monitor
from async_rl.driver.recorder import Recorder
from async_rl.driver.replicas import ReplicaSupervisor
from async_rl.driver.restarts import Recovery
from async_rl.errors import ReplicaFailed, TrainerDied
from async_rl.models.config import read_model_config
from async_rl.queue.actor import start_queue
from async_rl.queue.client import Payload
from async_rl.queue.records import GroupMeta
from async_rl.queue.staleness import oldest_allowed_version
from async_rl.rollout.stats import worker_id
from async_rl.runtime import logs
from async_rl.runtime.failures import explain
from async_rl.runtime.interrupt import Interrupted, first_failure, until_interrupted
from async_rl.trainer.packing import split_over_ranks
from async_rl.trainer.parallel import Place
from async_rl.trainer.report import StepReport
from async_rl.types import Prompt
from async_rl.weights.sync import WeightSync

log = structlog.get_logger(__name__)

Leased = list[tuple[GroupMeta, Payload]]

_MONITOR_PERIOD_S = 1.0
# While the trainer waits for groups it looks this often whether a new worker waits for weights.
_LOOK_S = 0.5
# An orderly end asks the actors to close; one that does not answer in time is ended with its process.
_SHUTDOWN_S = 8.0


def run(config: RunConfig, *, resume: bool = False) -> int:
    """Run ``config`` to its end. Returns the exit code: 0 finished, 130 interrupted. Raises AsyncRLError on failure.

    resume: go on with the run of this name from its newest sound checkpoint; from the beginning where it has none.
    summary.json is written in every case once the run folder exists.
    """
    started = time.monotonic()
    doctor.require(config)
    inputs.prepare(config)
    config = inputs.resolved(config, resume=resume)
    tokenizer = load_tokenizer(config)
    train_set, eval_set = inputs.read_data(config, tokenizer)
    eval_prompts = [] if eval_set is None else list(eval_set.first(config.eval.n, label="eval", key="eval.n"))
    with Recorder(config, started, tokenizer.decode, resume=resume) as recorder:
        logs.configure(config.run_dir, "pipeline", console=True)
        recorder.data(train=len(train_set.bad_rows), eval=0 if eval_set is None else len(eval_set.bad_rows))
        try:
            found = checkpoint_folder.latest_valid(recorder.checkpoints) if resume else None
            inputs.prepare_store(config, resume=resume, anew=found is None)
            if resume:
                recorder.go_on(None if found is None else checkpoint.read_head(found))
            with ray_cluster(config):
                recorder.ray(ray_exporters())
                asyncio.run(until_interrupted(Pipeline(config, recorder, train_set, eval_prompts, found).run()))
        except (Interrupted, KeyboardInterrupt):  # the latter before the event loop took over signals
            recorder.finish("interrupted")
            return 130
        except BaseException as error:
            failure = explain(error, config.run_dir)
            recorder.finish(f"failed: {failure}")
            raise failure from error
        recorder.finish("finished")
    return 0


class Pipeline:
    """One run on a cluster that is up; ``found``: the checkpoint that it goes on from."""

    def __init__(
        self,
        config: RunConfig,
        recorder: Recorder,
        train_set: Dataset,
        eval_prompts: Sequence[Prompt],
        found: Path | None = None,
    ) -> None:
        self._config = config
        self._recorder = recorder
        self._found = found
        resumed = None if found is None else checkpoint.read_head(found)
        self._step = 0 if resumed is None else resumed.step
        self._version = 0 if resumed is None else resumed.version
        self._announced = self._version  # the last version that a push was begun with
        self._eval_prompts = eval_prompts
        self._recovery = Recovery(config, recorder)
        cursor = DatasetCursor(train_set, shuffle=config.data.shuffle, seed=config.seed)
        placement = place(config, sorted(os.sched_getaffinity(0)))
        recorder.journal.unlink(missing_ok=True)
        state = None if resumed is None else resumed.queue
        self._queue = start_queue(config, cursor, journal=recorder.journal.absolute(), state=state)
        self._trainers = TrainerRanks(config, placement)
        self._rollouts = RolloutWorkers(config, self._queue.actor, placement)
        self._model = read_model_config(config.model.path)
        self._sync = WeightSync(config, self._model, self._trainers)
        self._replicas = ReplicaSupervisor(self._rollouts, self._queue, self._sync, self._recovery, recorder)
        self._monitor = Monitor(config, self._queue, self._rollouts, self._trainers, self._sync, recorder)

    async def run(self) -> None:
        try:
            await self._start()
            await self._evaluate()
            self._recorder.training_begins()
            await first_failure(
                self._train(), self._monitor.run(), *(self._replicas.tend(r) for r in self._rollouts.workers)
            )
            await self._replicas.stop()
            await self._monitor.count()
            self._recorder.training_ended()
            await self._evaluate()
            await self._trainers.call("export", self._recorder.final_model)
        finally:
            await self._shut_down()

    async def _start(self) -> None:
        """Engines and trainers come up side by side; then they must agree on the weights before anything is sampled."""
        workers = self._rollouts.workers
        await asyncio.gather(self._trainers.start(self._found), *(worker.start.remote() for worker in workers.values()))
        self._sync.members = dict(workers)
        if self._found is not None:
            await self._take_up(await asyncio.to_thread(checkpoint.read, self._found))
        agreement = await self._sync.begin()
        unreached = agreement.unreached_experts
        self._recorder.event(
            f"engine and trainer agree to {agreement.report.max_abs_diff:.1e} on the checkpoint's weights"
            + (f"; {unreached} experts are not reached by the probe" if unreached else "")
        )

    async def _take_up(self, state: RunState) -> None:
        """Go on with the work of a run that ended: what was queued, what was in flight, and the weights."""
        for group_id, message in state.queued.items():
            self._queue.hold(group_id, [ray.put(np.frombuffer(message, dtype=np.uint8))])
        newest = await self._queue.recover(state.step)
        groups, replicas = list(state.in_flight.items()), list(self._rollouts.workers)
        adopted: list[str] = []
        shares = {replica: dict(groups[place_ :: len(replicas)]) for place_, replica in enumerate(replicas)}
        for replica, share in shares.items():
            await self._queue.adopt(worker_id(replica), share)
        # The names of the other workers are those of the run that ended, of which there may have been more.
        for name in (await self._queue.stats()).running:
            await self._queue.worker_lost(name, keep=state.in_flight)
        for replica, share in shares.items():
            adopted += await self._replicas.hand_over(replica, share)
        # The engines have loaded the checkpoint that the run began with.
        stats = await self._queue.stats()
        # A queue that outlived the run may have seen versions that were pushed after the checkpoint.
        seen = max(state.version, stats.version, newest)
        self._version = seen if state.pushed and seen == state.version else seen + 1
        await self._sync.push(self._version)
        logs.bind(version=self._version)
        if self._version > stats.version:
            await self._queue.advance(self._version)
        await self._sync.resume()
        self._recorder.event(f"{stats.queued_groups} groups are queued, {len(adopted)} in flight are gone on with")

    # -- the training loop --------------------------------------------------------------------------------------

    async def _train(self) -> None:
        while self._step < self._config.trainer.steps:
            try:
                if self._replicas.push_wanted:
                    await self._push()
                await self._train_step()
            except _PushWanted:
                continue
            except TrainerDied as error:
                await self._go_back(error)

    async def _train_step(self) -> None:
        began = time.monotonic()
        leased: Leased = []
        try:
            with self._monitor.at("groups", self._step + 1):
                reports = await (self._streamed_update(leased) if self._config.streams else self._update(leased))
        except (TrainerDied, _PushWanted):
            await self._queue.release([meta.group_id for meta, _ in leased])
            raise
        step, version = self._step + 1, self._version
        trained = await asyncio.to_thread(self._recorder.fetch, leased)
        await self._queue.ack([meta.group_id for meta, _ in leased], step)
        self._step = step
        step_s = time.monotonic() - began
        last = step == self._config.trainer.steps
        every = self._config.checkpoint.every
        due = bool(every) and step % every == 0
        state: RunState | None = None
        if last or step % self._config.async_training.trigger_parameter_sync_step == 0:
            pushing = asyncio.ensure_future(self._push(snapshot=due))
            await asyncio.sleep(0)  # its first calls are on their way while the step is written down
            try:
                self._recorder.step(step, version, reports, trained, step_s=step_s)
            finally:
                state = await pushing
        else:
            self._recorder.step(step, version, reports, trained, step_s=step_s)
            state = await self._snapshot() if due else None
        if state is not None:
            await self._checkpoint(state)

    async def _update(self, leased: Leased) -> list[StepReport]:
        """The updates of one training step once all its groups are there; rank 0's reports, which speak for all."""
        required, size = self._config.required_groups, self._config.trainer.groups_per_step
        leased += await self._lease(required, required)
        batches = [leased[first : first + size] for first in range(0, len(leased), size)]
        by_rank = list(zip(*(self._shares(batch) for batch in batches), strict=True))
        with self._monitor.at("update", self._step + 1):
            calls = self._trainers.call("train_step", *self._versions(), shares=by_rank)
            reports, _ = await asyncio.gather(calls, self._monitor.count())
        first: list[StepReport] = reports[0]
        return first

    async def _streamed_update(self, leased: Leased) -> list[StepReport]:
        """The update of one training step, whose microbatches are computed as soon as groups are there."""
        versions, ranks = self._versions(), self._config.trainer.parallel.dp
        loads = [0.0] * ranks
        while (missing := self._config.required_groups - len(leased)) > 0:
            # Enough that every data-parallel rank has something to do.
            part = await self._lease(missing, min(ranks, missing))
            first = not leased
            leased += part
            with self._monitor.at("update", self._step + 1):
                await self._trainers.call("accumulate", *versions, shares=self._shares(part, loads), first=first)
        with self._monitor.at("update", self._step + 1):
            reports, _ = await asyncio.gather(self._trainers.call("finish_step"), self._monitor.count())
        return [reports[0]]

    async def _lease(self, n: int, at_least: int) -> Leased:
        """Raises _PushWanted while there are not enough groups and a new worker waits for weights."""
        while True:
            leased = await self._queue.lease("trainer", n, timeout_s=_LOOK_S, at_least=at_least)
            if leased:
                return leased
            if self._replicas.push_wanted:
                raise _PushWanted

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

    async def _push(self, *, snapshot: bool = False) -> RunState | None:
        """The trainer's weights become version v+1 everywhere, also in new workers, and the next window opens.

        snapshot: also what a checkpoint needs of the rest, as it is while the engines stand still.
        """
        # Never the version of a push that was given up, which engines may have sampled with: its weights were others.
        version = self._announced = max(self._version, self._announced) + 1
        in_flight: dict[str, Any] = {}
        paused = functools.partial(self._hand_over, in_flight) if snapshot else None
        with self._monitor.at("push", self._step):
            while True:
                await self._replicas.admit()
                in_flight.clear()
                try:
                    record = await self._sync.push(version, paused=paused, end_calls=snapshot)
                    break
                except ReplicaFailed as error:
                    await self._replicas.lose(error)
        self._version = version
        logs.bind(version=version)
        every = self._config.eval.every
        if every and self._version % every == 0:
            await self._evaluate()
        # Before the window opens: what is issued then is not in flight yet.
        state = await self._state(in_flight, pushed=True) if snapshot else None
        await self._queue.advance(self._version)
        self._recorder.sync(record)
        await self._sync.resume()
        self._replicas.pushed()
        return state

    async def _evaluate(self) -> None:
        """Greedy evaluation at the current version, the problems spread over the replicas."""
        while self._eval_prompts and self._sync.members:
            replicas = list(self._sync.members)
            shares = {replica: self._eval_prompts[place_ :: len(replicas)] for place_, replica in enumerate(replicas)}
            try:
                with self._monitor.at("evaluation", self._step):
                    results = await asyncio.gather(
                        *(self._sync.on(replica, "evaluate", share) for replica, share in shares.items() if share)
                    )
            except ReplicaFailed as error:
                await self._replicas.lose(error)
                continue
            self._recorder.evaluation(results)
            return

    # -- checkpoints --------------------------------------------------------------------------------------------

    async def _snapshot(self) -> RunState:
        """What a checkpoint needs besides the trainer, after a step without a push."""
        in_flight: dict[str, Any] = {}
        with self._monitor.at("checkpoint", self._step):
            while True:
                try:
                    await self._sync.stand_still(functools.partial(self._hand_over, in_flight))
                    break
                except ReplicaFailed as error:
                    await self._replicas.lose(error)
        return await self._state(in_flight, pushed=False)

    async def _hand_over(self, in_flight: dict[str, Any], replica: int) -> None:
        """Adds the groups in flight of a replica that stands still."""
        in_flight.update(await self._sync.on(replica, "snapshot"))

    async def _state(self, in_flight: dict[str, Any], *, pushed: bool) -> RunState:
        queue = await self._queue.state()
        payloads = {group_id: self._queue.payload(group_id) for ((group_id, *_), _) in queue["queued"]}
        return RunState(
            step=self._step,
            version=self._version,
            pushed=pushed,
            queue=queue,
            recorder={},
            queued={group_id: payload for group_id, payload in payloads.items() if payload is not None},
            in_flight=in_flight,
        )

    async def _checkpoint(self, state: RunState) -> None:
        """Write everything down; generation goes on meanwhile."""
        began, folder = time.monotonic(), self._recorder.checkpoints
        with self._monitor.at("checkpoint", self._step):
            partial = await asyncio.to_thread(checkpoint_folder.begin, folder, state.step)
            await asyncio.to_thread(_write_state, partial, state, self._recorder.state())
            await self._trainers.call("save", partial)
            await asyncio.to_thread(checkpoint_folder.commit, partial, keep=self._config.checkpoint.keep)
        await self._queue.checkpointed(checkpoint_folder.oldest_step(folder))
        self._recorder.checkpointed(state.step, time.monotonic() - began)

    # -- what dies ----------------------------------------------------------------------------------------------

    async def _go_back(self, error: TrainerDied) -> None:
        """Start the trainer again from the last checkpoint; what was trained since is issued again."""
        while True:
            found = await asyncio.to_thread(checkpoint_folder.latest_valid, self._recorder.checkpoints)
            if found is None:
                raise TrainerDied(
                    f"{error}, and there is no checkpoint to go on from; with checkpoint.every the trainer is started "
                    f"again from the last one (logs: {self._config.run_dir / 'logs'})"
                ) from error
            state = await asyncio.to_thread(checkpoint.read_head, found)
            with self._monitor.at("restart", self._step):
                await self._recovery.wait("trainer", error, f"it goes on after step {state.step}")
                try:
                    self._trainers.replace()
                    await self._trainers.start(found)
                    returned = await self._queue.rewind(state.step)
                    self._recorder.rewind(state.step, state.recorder)
                    self._step = state.step
                    self._sync.reconnect()
                    await self._push()
                    self._recorder.event(f"the trainer is back after step {state.step}; {len(returned)} groups again")
                    return
                except TrainerDied as again:
                    error = again

    async def _shut_down(self) -> None:
        actors = [*self._rollouts.workers.values(), *self._trainers.actors]
        ends = asyncio.gather(*(actor.shutdown.remote() for actor in actors), return_exceptions=True)
        try:
            await asyncio.wait_for(ends, _SHUTDOWN_S)
        except TimeoutError:
            log.warning("not every actor closed in time; their processes are ended", seconds=_SHUTDOWN_S)


class _PushWanted(Exception):
    """A new worker waits for weights, and the trainer for groups."""


def _write_state(folder: Path, state: RunState, recorder: dict[str, Any]) -> None:
    # With queue.backend redis they are there, and outlive the run by themselves.
    in_memory = {group_id: payload for group_id, payload in state.queued.items() if not isinstance(payload, str)}
    messages = dict(zip(in_memory, ray.get([reference for (reference,) in in_memory.values()]), strict=True))
    checkpoint.write(folder, replace(state, recorder=recorder, queued=messages))
