"""The training loop of a run: creates the actors, and runs every loop of the driver.

    prompts ──► RolloutWorker × N ──► QueueActor ──► TrainingLoop ──► TrainerWorker × ranks
                     ▲                                                      │
                     └──────────────── WeightSync, version v+1 ◄────────────┘

Three kinds of coroutines run at once in the driver's event loop: the training loop; the life of each replica
(``ReplicaSupervisor``), which submits finished groups to the queue and replaces the worker when it dies; and the
monitor, which publishes the actors' counters. The first one that raises ends the run.

    loop              waits for                                    unblocked by
    rollout           admission (staleness budget)                 a weight sync, or a group that is given back
    rollout           room in the queue, by groups or bytes        the ack of trained groups
    rollout           its replica's part of a weight sync          resume
    training loop     groups_per_step × require_batches groups     a finished group
                      (trainer.streaming: one, or one per rank)
    update            the weight sync of the step before           its end
    weight sync       generations in flight (mode drain only)      their end
    new worker        current weights                              the training loop, while it waits for groups

What can die, and what follows: docs/concepts/reliability.md. Checkpoints: ``driver.checkpoint``.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import structlog

from async_rl.config.schema import RunConfig
from async_rl.data.mixture import TrainSet, open_cursor
from async_rl.driver import run_state
from async_rl.driver.actors import RolloutWorkers, TrainerRanks
from async_rl.driver.checkpoint import Checkpointer, RunMoment
from async_rl.driver.evaluation import EvalSet, Evaluator
from async_rl.driver.leases import Leased, LeasedGroups
from async_rl.driver.monitor import Monitor
from async_rl.driver.places import Places
from async_rl.driver.push import Pusher
from async_rl.driver.recorder import Recorder
from async_rl.driver.replicas import ReplicaSupervisor
from async_rl.driver.restarts import Recovery
from async_rl.driver.shares import batch_shares, rank_shares
from async_rl.driver.starting import wait_started
from async_rl.driver.trainer_recovery import TrainerRecovery
from async_rl.errors import TrainerDied
from async_rl.metrics.records import StepReport
from async_rl.models.config import read_model_config
from async_rl.queue.staleness import oldest_allowed_version
from async_rl.queue.start import start_queue
from async_rl.runtime import timeouts
from async_rl.runtime.interrupt import first_failure
from async_rl.weights.sync import WeightSync

log = structlog.get_logger(__name__)

# While the training loop waits for groups, it looks this often whether a restarted worker waits for weights.
_LEASE_POLL_S = 0.5


class TrainingLoop:
    """One run on a Ray cluster that is up; ``found`` is the checkpoint that it is restored from."""

    def __init__(
        self,
        config: RunConfig,
        recorder: Recorder,
        train_set: TrainSet,
        eval_sets: Sequence[EvalSet],
        found: Path | None = None,
    ) -> None:
        self._config = config
        self._recorder = recorder
        self._found = found
        restored = None if found is None else run_state.read(found)
        self._step = 0 if restored is None else restored.step
        self._training = self._stopping = False
        self._recovery = Recovery(config, recorder)
        cursor = open_cursor(train_set, shuffle=config.data.shuffle, seed=config.seed)
        recorder.journal.unlink(missing_ok=True)
        state = None if restored is None else restored.queue
        self._queue = start_queue(config, cursor, journal=recorder.journal.absolute(), state=state)
        self._places = Places(config)
        self._trainers = TrainerRanks(config, self._places)
        self._rollouts = RolloutWorkers(config, self._queue.actor, self._places)
        model = read_model_config(config.model.path)
        self._shares = functools.partial(rank_shares, sizes=config.trainer.parallel, cost=model.sequence_cost)
        self._groups = LeasedGroups(self._queue, self._trainers, recorder)
        self._sync = WeightSync(config, model, self._trainers, (row.token_ids for row in train_set.rows))
        self._replicas = ReplicaSupervisor(self._rollouts, self._queue, self._sync, self._recovery, recorder)
        self._monitor = Monitor(config, self._queue, self._rollouts, self._trainers, self._sync, recorder)
        self._evaluator = Evaluator(
            config, eval_sets, sync=self._sync, replicas=self._replicas, monitor=self._monitor, recorder=recorder
        )
        self._checkpointer = Checkpointer(
            config,
            queue=self._queue,
            rollouts=self._rollouts,
            trainers=self._trainers,
            sync=self._sync,
            replicas=self._replicas,
            monitor=self._monitor,
            recorder=recorder,
        )
        self._pusher = Pusher(
            0 if restored is None else restored.version,
            self._step,
            queue=self._queue,
            sync=self._sync,
            replicas=self._replicas,
            evaluator=self._evaluator,
            checkpointer=self._checkpointer,
            monitor=self._monitor,
            recorder=recorder,
        )
        self._trainer_recovery = TrainerRecovery(
            config,
            queue=self._queue,
            trainers=self._trainers,
            checkpointer=self._checkpointer,
            recovery=self._recovery,
            recorder=recorder,
            free=self._places.free,
        )

    def request_checkpoint(self) -> None:
        """Have a checkpoint written at the end of the current training step."""
        self._checkpointer.request()

    def wind_up(self) -> float:
        """End training after a checkpoint. Returns the seconds that this may take; 0 if no checkpoint is wanted."""
        grace_s = self._config.checkpoint.on_sigterm_s
        if not (self._training and self._config.checkpoint.periodic and grace_s):
            return 0.0
        self._stopping = True
        self._evaluator.cancel()  # a pause for the checkpoint would wait for it
        self._checkpointer.request()
        self._recorder.event("stop_requested", grace_s=grace_s)
        return grace_s

    async def run(self) -> None:
        try:
            await self._start()
            await first_failure(self._begin(), self._monitor.run())
            self._recorder.training_begins()
            self._training = True
            supervised = self._replicas.training()
            await first_failure(self._train(), self._monitor.run(), self._checkpointer.watch(), *supervised)
            self._training = False
            if not self._stopping:
                await first_failure(self._finish(), self._monitor.run())
        finally:
            self._evaluator.cancel()
            self._pusher.cancel()
            self._replicas.close()
            await self._monitor.last_poll()
            await self._shut_down()

    async def _start(self) -> None:
        """Start engines and trainer."""
        await wait_started(self._places.reserved(), self._config.watchdog, self._recorder.event, self._places.free)
        starting = self._replicas.starting()
        starting["trainer"] = self._trainers.start(self._found)
        await wait_started(starting, self._config.watchdog, self._recorder.event, self._places.free)
        self._replicas.begin()

    async def _begin(self) -> None:
        """Restore a run, check that both sides agree on the weights before anything is sampled, evaluate a new run."""
        with self._monitor.phase("start", self._step):
            if self._found is not None:
                self._pusher.version = await self._checkpointer.restore(self._found)
            agreement = await self._sync.begin()
        worst = float(f"{agreement.report.max_abs_diff:.1e}")
        self._recorder.event("engine_trainer_agree", max_abs_diff=worst, unreached_experts=agreement.unreached_experts)
        if self._found is None:
            await self._evaluator.evaluate(self._pusher.version, self._step)
        else:
            await self._evaluator.restored(self._pusher.version, self._step)

    async def _finish(self) -> None:
        """Evaluate and export the trained model."""
        await self._evaluator.finished(self._step)
        await self._replicas.stop()
        await self._monitor.poll()
        self._recorder.training_ended()
        await self._recorder.samples.finished()
        await self._evaluator.evaluate(self._pusher.version, self._step)
        with self._monitor.phase("export", self._step):
            await self._trainers.export(self._recorder.final_model)

    # -- the training loop --------------------------------------------------------------------------------------

    async def _train(self) -> None:
        while self._step < self._config.trainer.steps and not self._stopping:
            try:
                await self._train_step()
                if self._step == self._config.trainer.steps:
                    await self._pusher.finished(self._step)
            except _StepLeft:
                if not self._stopping:
                    await self._pusher.push(self._step)
            except TrainerDied as error:
                await self._restart_trainer(error)
        await self._pusher.finished(self._step)
        await self._checkpointer.finish()
        if self._stopping and self._step > self._checkpointer.latest_step:
            await self._checkpointer.write(await self._paused_state())
            await self._checkpointer.finish()

    async def _train_step(self) -> None:
        began = time.monotonic()
        leased: Leased = []
        try:
            with self._monitor.phase("groups", self._step + 1):
                reports = await (self._streamed_update(leased) if self._config.streams else self._update(leased))
        except (TrainerDied, _StepLeft) as error:
            await self._trainer_recovery.give_back([meta.group_id for meta, _ in leased], error)
            raise
        step, version = self._step + 1, self._pusher.version
        trained = await asyncio.to_thread(self._recorder.described, leased)
        await self._recorder.samples.before_ack(leased)
        await self._queue.ack([meta.group_id for meta, _ in leased], step)
        self._step = step
        step_s = time.monotonic() - began
        due = self._checkpointer.due(step)
        write_samples = functools.partial(self._recorder.samples.begin, step, version, leased)
        if step == self._config.trainer.steps or step % self._config.async_training.trigger_parameter_sync_step == 0:
            syncing = asyncio.ensure_future(self._pusher.begin(step, snapshot=due, then=write_samples))
            await asyncio.sleep(0)  # let it begin before the step is recorded
            try:
                self._recorder.record_step(step, version, reports, trained, step_s=step_s)
            finally:
                state = await syncing
        else:
            self._recorder.record_step(step, version, reports, trained, step_s=step_s)
            state = await self._paused_state() if due else None
            await write_samples()
        if state is not None:
            await self._checkpointer.write(state)

    async def _paused_state(self) -> RunMoment:
        """Take the run's state without a weight sync, for which the replicas are paused."""
        await self._evaluator.finished(self._step)
        synced = self._step == self._pusher.synced_step
        return await self._checkpointer.pause_and_take(self._step, self._pusher.version, synced=synced)

    async def _update(self, leased: Leased) -> list[StepReport]:
        """Wait for all groups of a training step, then do its updates. Returns a report for each update."""
        required, size = self._config.required_groups, self._config.trainer.groups_per_step
        divide = functools.partial(batch_shares, size=size, shares=self._shares)
        while (missing := required - len(leased)) > 0:
            leased += await self._lease(missing, missing)
            with self._monitor.phase("update", self._step + 1):
                shares = await self._groups.read(leased, divide)
        await self._pusher.finished(self._step + 1)
        with self._monitor.phase("update", self._step + 1):
            calls = self._trainers.train_step(shares, *self._versions())
            reports, _ = await asyncio.gather(calls, self._monitor.poll())
        return reports

    async def _streamed_update(self, leased: Leased) -> list[StepReport]:
        """Do the update of a training step, whose microbatches are computed as soon as groups are queued."""
        versions, ranks, required = self._versions(), self._config.trainer.parallel.dp, self._config.required_groups
        balanced = functools.partial(self._shares, loads=[0.0] * ranks)
        divide = functools.partial(batch_shares, size=required, shares=balanced)
        while (done := len(leased)) < required:
            # Enough groups that every data-parallel rank has work.
            leased += await self._lease(required - done, min(ranks, required - done))
            with self._monitor.phase("update", self._step + 1):
                if shares := await self._groups.read(leased, divide, since=done):
                    await self._trainers.accumulate(shares, *versions, first=done == 0)
        await self._pusher.finished(self._step + 1)
        with self._monitor.phase("update", self._step + 1):
            report, _ = await asyncio.gather(self._trainers.finish_step(), self._monitor.poll())
        return [report]

    async def _lease(self, n: int, at_least: int) -> Leased:
        """Lease up to ``n`` groups once ``at_least`` are queued. Restarted workers get the current weights meanwhile.

        Raises _StepLeft if the run is to end, or no worker generates and one needs a weight sync to do so.
        """
        while True:
            pushing = self._pusher.under_way()
            if synced := self._step == self._pusher.synced_step:
                await self._replicas.admit(self._pusher.version)
            leased = await self._queue.lease("trainer", n, timeout_s=_LEASE_POLL_S, at_least=at_least)
            if leased:
                return leased
            if self._stopping or not (pushing or synced or self._sync.members):
                raise _StepLeft

    def _versions(self) -> tuple[int, int]:
        """Return the version that trains on tokens now, and the oldest that may have sampled them."""
        version = self._pusher.version
        return version, oldest_allowed_version(version, self._config.async_training.max_staleness)

    # -- failures -----------------------------------------------------------------------------------------------

    async def _restart_trainer(self, error: TrainerDied) -> None:
        """Return to the step of the latest valid checkpoint, with a restarted trainer."""
        await self._pusher.settled(self._step)
        self._evaluator.cancel()  # the weights that it evaluates are undone
        while True:
            with self._monitor.phase("restart", self._step):
                try:
                    self._step, reissued = await self._trainer_recovery.restart(error)
                    self._sync.reconnect()
                    await self._pusher.push(self._step)
                    self._recorder.event("trainer_restarted", step=self._step, reissued=reissued)
                    return
                except TrainerDied as next_error:
                    error = next_error

    async def _shut_down(self) -> None:
        calls = [worker.shutdown() for worker in self._rollouts.workers.values()] + self._trainers.shutdown()
        ends = asyncio.gather(*calls, return_exceptions=True)
        try:
            await asyncio.wait_for(ends, timeouts.SHUTDOWN_S)
        except TimeoutError:
            log.warning("shutdown_timed_out", seconds=timeouts.SHUTDOWN_S)  # Ray kills the processes that are left
        self._places.release()


class _StepLeft(Exception):
    """A training step is not waited for any longer; its groups go back into the queue."""
