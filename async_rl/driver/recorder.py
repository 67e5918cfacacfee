"""The records of one run: its folder, the driver's /metrics, the live view, the loggers, and at the end summary.json.

Hands the reports of the trainer, the queue and the workers to ``step_record`` and writes down the records that it makes
of them. Takes no decision.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import structlog

from async_rl.config.inputs import HELD_OUT
from async_rl.config.schema import RunConfig
from async_rl.driver import checkpoint_folder
from async_rl.driver.fleet import State
from async_rl.driver.run_state import RunState
from async_rl.driver.samples import Leased, SampleWriter, readable_answer
from async_rl.driver.step_record import RunMeter
from async_rl.driver.watchdog import RunSnapshot, Watchdog, waiting_for
from async_rl.metrics.evaluation import EvalLine
from async_rl.metrics.exporter import serve_metrics
from async_rl.metrics.live import LiveView
from async_rl.metrics.loggers import open_loggers
from async_rl.metrics.publish import publish_eval, publish_groups, publish_start, publish_step, publish_sync, step_row
from async_rl.metrics.records import StepReport, SyncRecord
from async_rl.metrics.summary import Summary
from async_rl.metrics.timeline import Timeline
from async_rl.queue.fetcher import Fetcher
from async_rl.queue.records import GroupMeta, QueueStats
from async_rl.rollout.evaluation import EvalAnswer
from async_rl.rollout.stats import WorkerStats
from async_rl.runtime.runfolder import RunFolder
from async_rl.trainer.report import merge_reports
from async_rl.types import Prompt

log = structlog.get_logger(__name__)


class Recorder:
    """The records of one run. A context manager: releases the terminal, the files and the port on exit."""

    def __init__(
        self, config: RunConfig, started: float, decode: Callable[[Any], str], *, resume: bool = False
    ) -> None:
        """Open the run folder, the port, the loggers and the live view.

        ``started``: time.monotonic() when the run was asked for, from which set-up is measured. ``decode``: token ids
        to text, for samples.jsonl. ``resume``: continue the run that the folder holds.
        """
        self._config = config
        self._folder = RunFolder(config, resume=resume)
        self._fetcher = Fetcher(config)
        self.samples = SampleWriter(config, self._folder, self._fetcher, decode)
        self._summary = Summary()
        self._meter = RunMeter(started)
        self._metrics = serve_metrics(config, "pipeline", 0, order=0)
        publish_start(self._metrics)
        self._timeline = Timeline(config.run_dir, "pipeline", config.metrics.timeline_bytes)
        self._loggers = open_loggers(config.metrics.loggers, config.run_dir, config.model_dump(mode="json"))
        self._live = LiveView(config.name, config.trainer.steps)
        self._watchdog = Watchdog()
        self._decode = decode
        # Step and version of the last evaluation, by set. A run that is restored counts its versions from those of the
        # checkpoint, so that a number may come again with the weights of another step.
        self._evaluated: dict[str, tuple[int, int]] = {}
        self._finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._live.close()
        self._loggers.close()
        self._timeline.close()
        self._metrics.close()
        self._folder.close()

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self._folder.checkpoints

    @property
    def final_model(self) -> Path:
        """Hugging Face folder to which the trained model is exported."""
        return self._folder.checkpoints / "final"

    @property
    def journal(self) -> Path:
        """File to which the queue writes its decisions."""
        return self._folder.journal

    # -- checkpoints --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the records' sums so far as plain data, for a checkpoint."""
        return {"summary": self._summary.state(), "evaluated_sets": dict(self._evaluated), **self._meter.state()}

    def restore(self, found: RunState | None) -> None:
        """Continue the records of an earlier process from a checkpoint; begin again where there is none."""
        self._folder.rewind(0 if found is None else found.step)
        if found is None:
            self._restore_evals({}, 0)
            self.event("run_without_checkpoint")
            return
        self._summary.restore(found.recorder["summary"])
        self._meter.restore(found.recorder)
        self._restore_evals(found.recorder, found.step)
        self.event("run_restoring", step=found.step)

    def rewind(self, step: int, state: Mapping[str, Any]) -> None:
        """Undo the records of the steps after ``step``, from which the trainer resumes."""
        self._folder.rewind(step)
        self._summary.restore(state["summary"])
        self._meter.rewind(state)
        self._restore_evals(state, step)

    def _restore_evals(self, state: Mapping[str, Any], step: int) -> None:
        """Take the evaluations of the ``state`` of ``step``, and those that the run folder has in addition.

        An evaluation beside rollouts ends after the checkpoint of its version was taken. evals.jsonl has it all the
        same, and it is neither lost nor made again.
        """
        before = state.get("evaluated")  # before there were several sets, the version of the only one
        evaluated = state.get("evaluated_sets", {} if before is None else {HELD_OUT: (step, before)})
        self._evaluated = {name: (at, version) for name, (at, version) in evaluated.items()}
        lines: list[EvalLine] = [*self._folder.evals()]
        for line in lines:
            if (line["step"], line["policy_version"]) > self._evaluated.get(line["set"], (-1, -1)):
                self._take(line)
                if state:
                    self._meter.evaluated(line)
        for line in self._summary.latest_evals():
            publish_eval(self._metrics, line)

    def eval_scores(self) -> dict[int, float]:
        """Return the mean reward on the set of checkpoint.keep_best, by training step; {} without one."""
        best = self._config.checkpoint.keep_best
        lines = self._folder.evals() if best is not None else []
        return {line["step"]: line["avg"]["mean"] for line in lines if line["set"] == best}

    # -- what happens -------------------------------------------------------------------------------------------

    def event(self, event: str, **fields: Any) -> None:
        """Log an event of the run by its constant name and fields, and show it in the live view."""
        log.info(event, **fields)
        self._live.event(event, **fields)

    def announce_ray_exporters(self, exporters: Sequence[str]) -> None:
        """Point Prometheus to the addresses, host:port, on which Ray serves its own metrics."""
        self._metrics.refer("ray", exporters, self._config.run_dir)

    def record_bad_rows(self, **bad_rows: int) -> None:
        """Publish how many rows of each dataset were skipped."""
        for dataset, count in bad_rows.items():
            self._metrics.count_to("dataset_bad_rows_total", count, dataset=dataset)

    def training_begins(self) -> None:
        """Start the wall clock of the run: set-up and the first evaluation are over."""
        self._meter.begin()

    def training_ended(self) -> None:
        """Stop the wall clock of the run."""
        self._meter.end()

    def is_evaluated(self, name: str, version: int, step: int) -> bool:
        """Return whether the results of a set at this version are recorded, whose weights are those of ``step``."""
        return self._evaluated.get(name) == (step, version)

    def evaluation(self, results: EvalLine, version: int, step: int) -> None:
        """Record the results of an evaluation set at a version, whose weights are those after training step ``step``.

        ``results`` is what ``metrics.evaluation.eval_line`` returns.
        """
        line: EvalLine = {"step": step, "policy_version": version, "time": time.time(), **results}
        self._folder.write_eval(line)
        self._take(line)
        publish_eval(self._metrics, line)
        if self._meter.training:
            self._meter.evaluated(line)  # shown and written with the step that it falls into
        elif line["set"] == HELD_OUT:
            self._live.evaluated(line["avg"]["mean"])
        if line["set"] != HELD_OUT:
            avg = line["avg"]
            self.event("set_evaluated", set=line["set"], k=line["k"], reward=f"{avg['mean']:.3f}", version=version)

    def eval_sample(self, prompt: Prompt, answer: EvalAnswer, version: int, step: int) -> None:
        """Write down the response that came with the answer to a problem of an evaluation set, if one did."""
        if (shown := answer.shown) is not None:
            most = self._config.metrics.sample_characters
            text = readable_answer(prompt, answer.set, shown, self._decode, most)
            self._folder.write_eval_sample({"step": step, "policy_version": version, **text})

    def _take(self, line: EvalLine) -> None:
        self._evaluated[line["set"]] = line["step"], line["policy_version"]
        self._summary.add_eval(line)

    def sync(self, record: SyncRecord) -> None:
        """Record a weight sync."""
        self._meter.synced(record)
        self._summary.add_sync(record)
        publish_sync(self._metrics, record)
        self._live.sync(record)

    def training_loop_at(self, phase: str) -> None:
        """Publish the phase that the training loop has entered."""
        self._metrics.set_all("training_loop_phase", None, {phase: 1})

    def record_phase(self, phase: str, seconds: float, step: int) -> None:
        """Record a phase of the training loop that has ended: its length, and the training step that it was part of."""
        self._timeline.add(phase, seconds, step=step)

    def checkpointed(self, step: int, seconds: float) -> None:
        """Record that the checkpoint of a training step is complete."""
        self._metrics.inc("checkpoints_total")
        self.event("checkpoint_written", step=step, seconds=round(seconds, 1))

    def restarted(self, process: str) -> None:
        """Count the restart of a process of this kind, which died."""
        self._metrics.inc("process_restarts_total", process=process)

    def replicas(self, counts: Mapping[State, int]) -> None:
        """Publish how many replicas do what; the run continues without those whose restarts are spent."""
        self._metrics.set_all("rollout_replicas", None, dict(counts))
        self._metrics.set("rollout_replicas_lost", counts["lost"])

    @property
    def queue(self) -> QueueStats | None:
        """The latest counts of the queue; None before the first."""
        return self._meter.queue

    def update_counts(self, queue: QueueStats, workers: Sequence[WorkerStats], snapshot: RunSnapshot) -> float:
        """Publish the latest counts of the queue and the workers. Returns the seconds without any progress."""
        if self.queue is not None and self.queue.pid != queue.pid:
            self.restarted("queue")
            self.event("queue_rebuilt")
        self._meter.count(queue, workers)
        self._metrics.set("queue_groups", queue.queued_groups)
        self._metrics.set("queue_bytes", queue.queued_bytes)
        self._metrics.set("queue_limit_groups", queue.max_groups)
        self._metrics.set("queue_limit_bytes", queue.max_bytes)
        publish_groups(self._metrics, queue.counts)
        progress = (queue.counts, sum(worker.sampled_tokens for worker in workers), snapshot.computed)
        stalled = self._watchdog.look(time.monotonic(), progress)
        self._metrics.set_all("watchdog_stalled_seconds", None, {waiting_for(snapshot): stalled})
        for reason, count in queue.dropped.items():
            self._metrics.count_to("groups_dropped_total", count, reason=reason)
        for reason, count in queue.failed.items():
            self._metrics.count_to("groups_failed_total", count, reason=reason)
        for reason, count in queue.filtered.items():
            self._metrics.count_to("groups_filtered_total", count, reason=reason)
        return stalled

    def described(self, leased: Leased) -> list[GroupMeta]:
        """Return the metadata of leased groups; where release 0.1 wrote it, completed from the groups themselves."""
        old = {meta.group_id: payload for meta, payload in leased if not meta.rewards}
        groups = iter(self._fetcher.groups(old) if old else [])
        return [
            meta if meta.rewards else dataclasses.replace(GroupMeta.of(next(groups), meta.nbytes), address=meta.address)
            for meta, _ in leased
        ]

    def record_step(
        self,
        step: int,
        version: int,
        reports: Sequence[StepReport],
        groups: Sequence[GroupMeta],
        *,
        step_s: float,
    ) -> None:
        """Record a training step: its updates' reports, and the groups that it consumed."""
        record = self._meter.record(step, version, merge_reports(reports), groups, step_s=step_s)
        self._summary.add_step(record)
        publish_step(self._metrics, record)
        row = step_row(record)
        self._folder.write_step(row)
        self._loggers.step(row)
        self._folder.write_trained(
            {"step": step, "policy_version": version, "groups": [meta.group_id for meta in groups]}
        )
        self._live.update(record)

    def finish(self, exit_reason: str) -> None:
        """Write summary.json; only the first call counts. exit_reason: "finished", "interrupted" or "failed: ..."."""
        if self._finished:
            return
        self._finished = True
        summary = self._summary.result(self._meter.totals(), exit_reason)
        if (best := checkpoint_folder.best(self.checkpoints, self.eval_scores())) is not None:
            summary["best_checkpoint"] = str(best)
        self._folder.write_summary(summary)
        self._loggers.finish(summary)
        ended, _, why = exit_reason.partition(": ")
        self._live.event(
            f"run_{ended}", **({"reason": why} if why else {}), summary=self._config.run_dir / "summary.json"
        )
