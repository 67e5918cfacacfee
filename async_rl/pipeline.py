"""The run, from top to bottom: wires the parts, runs the loops, owns the policy version. Knows everyone.

    prompts ──► RolloutWorker × N ──► QueueActor ──► training loop ──► TrainerWorker × ranks
                     ▲                                                      │
                     └──────────────── WeightSync, version v+1 ◄────────────┘

In the driver's event loop run at once: the training loop; for each replica ``_tend``, which hands in what the worker
finishes and puts another in its place when it dies; and the monitor, which publishes what the actors count. The first
that raises ends the run.

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
import contextlib
import importlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import ray
import structlog

from async_rl import doctor, logs, run_state
from async_rl.cluster import place, ray_cluster
from async_rl.config import RunConfig
from async_rl.errors import AsyncRLError, ConfigError, ProcessLost, ReplicaFailed, StalledError, TrainerDied
from async_rl.failures import cause_of, explain
from async_rl.fleet import Rollouts, Trainers, worker_lost
from async_rl.metrics.watchdog import Situation, account
from async_rl.model_config import read_model_config
from async_rl.queue.ray_queue import Payload, start_queue
from async_rl.queue.records import GroupMeta
from async_rl.queue.staleness import oldest_allowed_version
from async_rl.recorder import Recorder
from async_rl.recovery import Restarts
from async_rl.rollout.prompts import Dataset, DatasetCursor, read_jsonl
from async_rl.rollout.tokenization import load_tokenizer
from async_rl.rollout.worker import name_of
from async_rl.run_state import RunState
from async_rl.stacks import dump_stacks
from async_rl.trainer import checkpoint
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
# An actor that has not answered the monitor for so long does not count as alive.
_ANSWER_S = 5.0
# An orderly end asks the actors to close; one that does not answer in time is ended with its process.
_SHUTDOWN_S = 8.0


def run(config: RunConfig, *, resume: bool = False) -> int:
    """Run ``config`` to its end. Returns the exit code: 0 finished, 130 interrupted. Raises AsyncRLError on failure.

    resume: go on with the run of this name from its newest sound checkpoint; from the beginning where it has none.
    summary.json is written in every case once the run folder exists.
    """
    started = time.monotonic()
    doctor.require(config)
    if config.prepare is not None:
        _load(config.prepare)(config)
        doctor.require(config)
    config = _resolved(config, resume=resume)
    tokenizer = load_tokenizer(config)
    train_set, eval_set = _read_data(config, tokenizer)
    eval_prompts = [] if eval_set is None else list(eval_set.first(config.eval.n, label="eval", key="eval.n"))
    with Recorder(config, started, tokenizer.decode, resume=resume) as recorder:
        logs.configure(config.run_dir, "pipeline", console=True)
        recorder.data(train=len(train_set.bad_rows), eval=0 if eval_set is None else len(eval_set.bad_rows))
        found = checkpoint.newest_sound(recorder.checkpoints) if resume else None
        if resume:
            state = None if found is None else run_state.read(found)
            recorder.resumed(0 if state is None else state.step, None if state is None else state.recorder)
        try:
            with ray_cluster(config):
                asyncio.run(_until_interrupted(Pipeline(config, recorder, train_set, eval_prompts, found).run()))
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
        self._resumed = None if found is None else run_state.read(found)
        self._step = 0 if self._resumed is None else self._resumed.step
        self._version = 0 if self._resumed is None else self._resumed.version
        self._eval_prompts = eval_prompts
        self._restarts = Restarts(config.recovery)
        cursor = DatasetCursor(train_set, shuffle=config.data.shuffle, seed=config.seed)
        placement = place(config, sorted(os.sched_getaffinity(0)))
        recorder.journal.unlink(missing_ok=True)
        state = None if self._resumed is None else self._resumed.queue
        self._queue = start_queue(config, cursor, journal=recorder.journal.absolute(), state=state)
        self._trainers = Trainers(config, placement)
        self._rollouts = Rollouts(config, self._queue.actor, placement)
        self._model = read_model_config(config.model.path)
        self._sync = WeightSync(config, self._model, self._trainers)
        self._joining: dict[int, asyncio.Future[None]] = {}  # replicas that wait for weights
        self._somebody_joins = asyncio.Event()
        self._saved: dict[int, dict[str, Any]] = {}  # groups in flight of replicas that were left out
        self._doing = ("start", time.monotonic())

    async def run(self) -> None:
        try:
            await self._start()
            await self._evaluate()
            self._recorder.training_begins()
            await _first_failure(self._train(), self._monitor(), *(self._tend(r) for r in self._rollouts.workers))
            await asyncio.gather(*(self._sync.on(replica, "stop") for replica in self._sync.members))
            await self._count()
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
        if self._resumed is not None:
            await self._take_up(self._resumed)
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
        groups, replicas = list(state.in_flight.items()), list(self._rollouts.workers)
        adopted: list[str] = []
        for place_, replica in enumerate(replicas):
            share = dict(groups[place_ :: len(replicas)])
            fitting = await self._rollouts.workers[replica].adopt.remote(share)
            adopted += await self._queue.adopt(name_of(replica), fitting)
        for name in (await self._queue.stats()).running:
            await self._queue.worker_lost(name, keep=adopted)
        # The engines have loaded the checkpoint that the run began with.
        version = state.version if state.pushed else state.version + 1
        await self._sync.push(version)
        if version > state.version:
            await self._queue.advance(version)
        self._version = version
        await self._sync.resume()
        self._recorder.event(f"{len(state.queued)} groups were queued, {len(adopted)} are gone on with")

    # -- the training loop --------------------------------------------------------------------------------------

    async def _train(self) -> None:
        while self._step < self._config.trainer.steps:
            try:
                if self._joining:
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
            with self._at("groups"):
                reports = await (self._streamed_update(leased) if self._config.streams else self._update(leased))
        except (TrainerDied, _PushWanted):
            await self._queue.release([meta.group_id for meta, _ in leased])
            raise
        step, version = self._step + 1, self._version
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
                self._recorder.step(step, version, reports, leased, step_s=step_s)
            finally:
                state = await pushing
        else:
            self._recorder.step(step, version, reports, leased, step_s=step_s)
            state = await self._snapshot() if due else None
        if state is not None:
            await self._checkpoint(state)

    async def _update(self, leased: Leased) -> list[StepReport]:
        """The updates of one training step once all its groups are there; rank 0's reports, which speak for all."""
        required, size = self._config.required_groups, self._config.trainer.groups_per_step
        leased += await self._lease(required, required)
        batches = [leased[first : first + size] for first in range(0, len(leased), size)]
        by_rank = list(zip(*(self._shares(batch) for batch in batches), strict=True))
        with self._at("update"):
            calls = self._trainers.call("train_step", *self._versions(), shares=by_rank)
            reports, _ = await asyncio.gather(calls, self._count())
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
            with self._at("update"):
                await self._trainers.call("accumulate", *versions, shares=self._shares(part, loads), first=first)
        with self._at("update"):
            reports, _ = await asyncio.gather(self._trainers.call("finish_step"), self._count())
        return [reports[0]]

    async def _lease(self, n: int, at_least: int) -> Leased:
        """Raises _PushWanted while there are not enough groups and a new worker waits for weights."""
        while True:
            leased = await self._queue.lease("trainer", n, timeout_s=_LOOK_S, at_least=at_least)
            if leased:
                return leased
            if self._joining:
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
        version = self._version + 1
        in_flight: dict[str, Any] = {}

        async def paused(replica: int) -> None:
            in_flight.update(await self._sync.on(replica, "snapshot"))

        with self._at("push"):
            while True:
                await self._admit()
                in_flight.clear()
                try:
                    record = await self._sync.push(version, paused=paused if snapshot else None, end_calls=snapshot)
                    break
                except ReplicaFailed as error:
                    await self._lose(error)
        self._version = version
        every = self._config.eval.every
        if every and self._version % every == 0:
            await self._evaluate()
        await self._queue.advance(self._version)
        state = await self._state(in_flight, pushed=True) if snapshot else None
        self._recorder.sync(record)
        await self._sync.resume()
        for replica, joined in list(self._joining.items()):
            if replica in self._sync.members:
                del self._joining[replica]
                joined.set_result(None)
        return state

    async def _evaluate(self) -> None:
        """Greedy evaluation at the current version, the problems spread over the replicas."""
        while self._eval_prompts and self._sync.members:
            replicas = list(self._sync.members)
            shares = {replica: self._eval_prompts[place_ :: len(replicas)] for place_, replica in enumerate(replicas)}
            try:
                with self._at("evaluation"):
                    results = await asyncio.gather(
                        *(self._sync.on(replica, "evaluate", share) for replica, share in shares.items() if share)
                    )
            except ReplicaFailed as error:
                await self._lose(error)
                continue
            self._recorder.evaluation(results)
            return

    # -- checkpoints --------------------------------------------------------------------------------------------

    async def _snapshot(self) -> RunState:
        """What a checkpoint needs besides the trainer, after a step without a push."""
        in_flight: dict[str, Any] = {}

        async def paused(replica: int) -> None:
            in_flight.update(await self._sync.on(replica, "snapshot"))

        with self._at("checkpoint"):
            while True:
                try:
                    await self._sync.stand_still(paused)
                    break
                except ReplicaFailed as error:
                    await self._lose(error)
        return await self._state(in_flight, pushed=False)

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
        with self._at("checkpoint"):
            partial = await asyncio.to_thread(checkpoint.begin, folder, state.step)
            await asyncio.to_thread(_write_state, partial, state, self._recorder.state())
            await self._trainers.call("save", partial)
            await asyncio.to_thread(checkpoint.commit, partial, keep=self._config.checkpoint.keep)
        await self._queue.checkpointed(checkpoint.oldest_step(folder))
        self._recorder.event(f"checkpoint of step {state.step} in {time.monotonic() - began:.1f} s")

    # -- what dies ----------------------------------------------------------------------------------------------

    async def _tend(self, replica: int) -> None:
        """Hand in what a replica's worker finishes; put another in its place when it, or its engine, dies."""
        while True:
            try:
                await self._collect(self._rollouts.workers[replica])
            except Exception as error:
                if not worker_lost(error):
                    raise
                await self._replace(replica, error)
            else:
                # The dataset has no end, so a worker that stops early means groups that nobody makes.
                raise AsyncRLError("a rollout worker stopped before the last training step")

    async def _collect(self, worker: Any) -> None:
        stream = worker.groups.options(num_returns="streaming").remote()
        async for first in stream:
            meta = await first
            await self._queue.put_stored(meta, [await anext(stream)])
            worker.accepted.remote(meta.group_id)

    async def _replace(self, replica: int, error: BaseException) -> None:
        """Start another worker, give it what can be saved of the groups in flight, and wait until it has weights."""
        name = name_of(replica)
        self._sync.members.pop(replica, None)
        saved = self._saved.pop(replica, None)
        if saved is None:
            saved = await self._salvage(replica)
        while True:
            self._rollouts.kill(replica)
            lost = await self._queue.worker_lost(name, keep=list(saved))
            await self._wait_before_restart(
                name, error, f"{len(lost)} of its groups are issued again, {len(saved)} are gone on with"
            )
            try:
                worker = self._rollouts.replace(replica)
                await worker.start.remote()
                adopted = await worker.adopt.remote(saved)
                await self._queue.worker_lost(name, keep=adopted)
                joined = self._joining[replica] = asyncio.get_running_loop().create_future()
                self._somebody_joins.set()
                await joined
                self._recorder.event(f"{name} is back")
                return
            except Exception as again:
                if not (worker_lost(again) or isinstance(again, ReplicaFailed)):
                    raise
                error = again

    async def _salvage(self, replica: int) -> dict[str, Any]:
        """The groups in flight of a worker whose engine has died; of one that is dead itself, none."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                # Copies: what is returned belongs to the worker's process when it is large.
                saved = await self._rollouts.workers[replica].snapshot.remote()
                return {group_id: np.array(message) for group_id, message in saved.items()}
        except Exception as error:  # noqa: BLE001 - whatever it is, the groups are issued again
            log.info("nothing can be saved of a worker", worker=name_of(replica), reason=str(error).partition("\n")[0])
            return {}

    async def _lose(self, failed: ReplicaFailed) -> None:
        """A replica could not take part in a push: end it, so that ``_tend`` puts another in its place."""
        log.warning("a replica is left out", reason=str(failed))
        if self._sync.members.pop(failed.replica, None) is not None:
            self._saved[failed.replica] = await self._salvage(failed.replica)
            self._rollouts.kill(failed.replica)
        if (joined := self._joining.pop(failed.replica, None)) is not None:
            joined.set_exception(failed)

    async def _admit(self) -> None:
        """Make members of the workers that wait for weights; while there is no member at all, wait for one."""
        while True:
            for replica in self._joining:
                self._sync.members[replica] = self._rollouts.workers[replica]
            if self._sync.members:
                return
            self._somebody_joins.clear()
            await self._somebody_joins.wait()

    async def _go_back(self, error: TrainerDied) -> None:
        """Start the trainer again from the last checkpoint; what was trained since is issued again."""
        while True:
            found = await asyncio.to_thread(checkpoint.newest_sound, self._recorder.checkpoints)
            if found is None:
                raise TrainerDied(
                    f"{error}, and there is no checkpoint to go on from; with checkpoint.every the trainer is started "
                    f"again from the last one (logs: {self._config.run_dir / 'logs'})"
                ) from error
            state = await asyncio.to_thread(run_state.read, found)
            with self._at("restart"):
                await self._wait_before_restart("trainer", error, f"it goes on after step {state.step}")
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

    async def _wait_before_restart(self, kind: str, error: BaseException, consequence: str) -> None:
        """Raises ProcessLost where it has died too often."""
        reason = " ".join(str(cause_of(error)).split())[:200]
        delay = self._restarts.again(kind, time.monotonic())
        if delay is None:
            settings = self._config.recovery
            raise ProcessLost(
                f"{kind} died once more, after {settings.max_restarts} restarts within {settings.period_s:g} s "
                f"(recovery.max_restarts): {reason} (logs: {self._config.run_dir / 'logs'})"
            ) from error
        log.warning("a process died", process=kind, reason=reason, restart_in_s=delay)
        self._recorder.restarted(kind.partition("-")[0])
        self._recorder.event(f"{kind} died and is started again; {consequence}")
        await asyncio.sleep(delay)

    # -- beside it ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _at(self, what: str) -> Iterator[None]:
        """For the watchdog: what the training loop is at."""
        before, self._doing = self._doing, (what, time.monotonic())
        try:
            yield
        finally:
            self._doing = (before[0], time.monotonic())

    async def _monitor(self) -> None:
        """Raises StalledError when nothing has moved for watchdog.abort_s."""
        settings, told = self._config.watchdog, False
        while True:
            await asyncio.sleep(_MONITOR_PERIOD_S)
            stalled_s, situation = await self._count()
            if stalled_s < settings.stall_s:
                told = False
            elif not told:
                told = True
                line = account(situation, stalled_s)
                log.warning(line)
                self._recorder.event(line)
            if stalled_s >= settings.abort_s:
                await self._stalled(account(situation, stalled_s))

    async def _stalled(self, line: str) -> NoReturn:
        await dump_stacks([self._queue.actor, *self._rollouts.workers.values(), *self._trainers.actors])
        raise StalledError(
            f"{line}; the stacks of every process are in {self._config.run_dir / 'logs'} "
            f"(watchdog.abort_s = {self._config.watchdog.abort_s:g})"
        )

    async def _count(self) -> tuple[float, Situation]:
        """Publish what was counted; seconds for which nothing has moved, and what everybody is at."""
        stats, workers = await asyncio.gather(_in_time(self._queue.stats()), self._rollouts.stats(_ANSWER_S))
        queue = stats or self._recorder.queue
        doing, since = self._doing
        silent = [name_of(replica) for replica in self._rollouts.silent]
        absent = [name_of(r) for r in self._rollouts.workers if r not in self._sync.members]
        situation = Situation(
            trainer=doing,
            trainer_s=time.monotonic() - since,
            queued_groups=0 if queue is None else queue.queued_groups,
            required_groups=self._config.required_groups,
            running={} if queue is None else queue.running,
            refusal=None if queue is None else queue.refusal,
            silent=[*silent, *(["the queue"] if stats is None else [])],
            absent=absent,
        )
        if queue is None:
            return 0.0, situation
        return self._recorder.counted(queue, workers, situation), situation

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
    messages = dict(zip(state.queued, ray.get([reference for (reference,) in state.queued.values()]), strict=True))
    run_state.write(folder, replace(state, recorder=recorder, queued=messages))


async def _in_time(call: Awaitable[Any]) -> Any:
    """What it answers; None where it does not within _ANSWER_S."""
    try:
        async with asyncio.timeout(_ANSWER_S):
            return await call
    except TimeoutError:
        return None


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


def _resolved(config: RunConfig, *, resume: bool) -> RunConfig:
    """The config with what depends on this machine filled in: the device, and a free name (name, name-2, ...) unless
    the run of this name is gone on with."""
    device = "cuda" if doctor.uses_gpu(config) else "cpu"
    config = config.model_copy(update={"resources": config.resources.model_copy(update={"device": device})})
    if resume:
        return config
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
