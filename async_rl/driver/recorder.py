"""What a run writes down: the run folder, the driver's /metrics, the live view, and at the end summary.json.

Turns what the trainer, the queue and the workers report into the records of ``metrics.summary``. Owns the clock of
the run; takes no decision.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import structlog

from async_rl.config.schema import RunConfig
from async_rl.driver.checkpoint import RunState
from async_rl.driver.watchdog import Situation, Watchdog, waiting_for
from async_rl.metrics.exporter import serve_metrics
from async_rl.metrics.live import LiveView
from async_rl.metrics.loggers import open_loggers
from async_rl.metrics.publish import publish_groups, publish_start, publish_step, publish_sync
from async_rl.metrics.summary import GroupCounts, StepRecord, Summary, SyncRecord, Totals
from async_rl.metrics.timeline import Timeline
from async_rl.queue import codec
from async_rl.queue.client import Fetcher, Payload
from async_rl.queue.records import GroupMeta, QueueStats
from async_rl.rollout.evaluation import EvalResult
from async_rl.rollout.stats import WorkerStats
from async_rl.runtime.runfolder import RunFolder
from async_rl.trainer.report import StepReport, merge_reports
from async_rl.types import Group, Trajectory

log = structlog.get_logger(__name__)


class Recorder:
    """One run's records. A context manager: the terminal, the files and the port are given back on exit."""

    def __init__(
        self, config: RunConfig, started: float, decode: Callable[[Any], str], *, resume: bool = False
    ) -> None:
        """``started``: time.monotonic() when the run was asked for, from which set-up is measured; ``decode``: token
        ids to text, for samples.jsonl; ``resume``: go on with the run that the folder holds."""
        self._config = config
        self._decode = decode
        self._folder = RunFolder(config, resume=resume)
        self._fetcher = Fetcher(config)
        self._summary = Summary()
        self._metrics = serve_metrics(config, "pipeline", 0, order=0)
        publish_start(self._metrics)
        self._timeline = Timeline(config.run_dir, "pipeline", config.metrics.timeline_bytes)
        self._loggers = open_loggers(config.metrics.loggers, config.run_dir, config.model_dump(mode="json"))
        self._live = LiveView(config.name, config.trainer.steps)
        self._started = started
        self._setup_s = 0.0
        self._began: float | None = None
        self._ended: float | None = None
        self._earlier_s = 0.0  # training time before the run was resumed
        self._trainer_busy_s = 0.0
        self._rollout_busy_earlier_s = 0.0
        self._tokens_earlier = (0, 0)
        self._groups = GroupCounts()
        self._queue: QueueStats | None = None
        self._workers: list[WorkerStats] = []
        self._busy_before = self._since = 0.0
        self._last_sync: SyncRecord | None = None
        self._eval_in_step: float | None = None
        self._watchdog = Watchdog()
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
        """Where checkpoints of the trainer go."""
        return self._folder.checkpoints

    @property
    def final_model(self) -> Path:
        """Where the trained model goes, as a Hugging Face folder."""
        return self._folder.checkpoints / "final"

    @property
    def journal(self) -> Path:
        """Where the queue writes down what it decides."""
        return self._folder.journal

    # -- going back ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the summary needs of the steps so far, as plain data, for a checkpoint."""
        totals = self._totals()
        return {
            "summary": self._summary.state(),
            "wall_s": totals.wall_s,
            "trainer_busy_s": totals.trainer_busy_s,
            "rollout_busy_s": totals.rollout_busy_s,
            "tokens": [totals.tokens_generated, totals.tokens_resumed_prefill],
        }

    def go_on(self, found: RunState | None) -> None:
        """With a run that had ended, from a checkpoint; from its beginning where there is none."""
        self._folder.rewind(0 if found is None else found.step)
        if found is None:
            self.event("there is no checkpoint to go on from: the run begins")
            return
        state = found.recorder
        self._summary.restore(state["summary"])
        self._earlier_s, self._trainer_busy_s = state["wall_s"], state["trainer_busy_s"]
        self._rollout_busy_earlier_s = self._busy_before = state["rollout_busy_s"]
        generated, resumed = state["tokens"]
        self._tokens_earlier = (generated, resumed)
        self.event(f"resumed after step {found.step}")

    def rewind(self, step: int, state: Mapping[str, Any]) -> None:
        """The trainer goes on after ``step``: what was recorded of later ones no longer counts."""
        self._folder.rewind(step)
        self._summary.restore(state["summary"])

    # -- what happens -------------------------------------------------------------------------------------------

    def event(self, event: str, **fields: Any) -> None:
        """Log an event of the run by its constant name and fields, and show it in the live view."""
        log.info(event, **fields)
        self._live.event(event, **fields)

    def ray(self, exporters: Sequence[str]) -> None:
        """Where Ray serves its own metrics, host:port each."""
        self._metrics.refer("ray", exporters, self._config.run_dir)

    def data(self, **bad_rows: int) -> None:
        """Rows of each dataset that were skipped."""
        for dataset, count in bad_rows.items():
            self._metrics.count_to("dataset_bad_rows_total", count, dataset=dataset)

    def training_begins(self) -> None:
        """Set-up and the first evaluation are over; the wall clock of the run starts."""
        self._began = self._since = time.monotonic()
        self._setup_s = self._began - self._started

    def training_ended(self) -> None:
        self._ended = time.monotonic()

    def evaluation(self, results: Sequence[EvalResult]) -> None:
        """Greedy evaluation, one result per replica on its share of the problems."""
        n = sum(result.n for result in results)
        reward = sum(result.reward_mean * result.n for result in results) / n
        self._summary.add_eval(reward, n)
        self._metrics.set("eval_reward_mean", reward)
        if self._began is not None and self._ended is None:
            self._eval_in_step = reward  # shown and written with the step that it falls into
        else:
            self._live.evaluated(reward)

    def sync(self, record: SyncRecord) -> None:
        self._last_sync = record
        self._summary.add_sync(record)
        publish_sync(self._metrics, record)
        self._live.sync(record)

    def training_loop_at(self, phase: str) -> None:
        """What the training loop does now."""
        self._metrics.set_all("training_loop_phase", None, {phase: 1})

    def training_loop_was_at(self, phase: str, seconds: float, step: int) -> None:
        """What it has just done, for how long and for which training step."""
        self._timeline.add(phase, seconds, step=step)

    def checkpointed(self, step: int, seconds: float) -> None:
        """The checkpoint of a training step is complete."""
        self._metrics.inc("checkpoints_total")
        self.event(f"checkpoint of step {step} in {seconds:.1f} s")

    def restarted(self, process: str) -> None:
        """A process of this kind died and is started again."""
        self._metrics.inc("process_restarts_total", process=process)

    @property
    def queue(self) -> QueueStats | None:
        """As last counted."""
        return self._queue

    def counted(self, queue: QueueStats, workers: Sequence[WorkerStats], situation: Situation) -> float:
        """What the queue and the workers have counted so far. Seconds for which nothing has moved."""
        if self._queue is not None and self._queue.pid != queue.pid:
            self.restarted("queue")
            self.event("the queue died, and was rebuilt from its journal")
        self._queue, self._workers = queue, list(workers)
        self._groups = queue.counts
        self._metrics.set("queue_groups", queue.queued_groups)
        self._metrics.set("queue_bytes", queue.queued_bytes)
        self._metrics.set("queue_limit_groups", queue.max_groups)
        self._metrics.set("queue_limit_bytes", queue.max_bytes)
        publish_groups(self._metrics, self._groups)
        progress = (queue.counts, sum(worker.generated_tokens for worker in workers))
        stalled = self._watchdog.look(time.monotonic(), progress)
        self._metrics.set_all("watchdog_stalled_seconds", None, {waiting_for(situation): stalled})
        for reason, count in queue.dropped.items():
            self._metrics.count_to("groups_dropped_total", count, reason=reason)
        for reason, count in queue.failed.items():
            self._metrics.count_to("groups_failed_total", count, reason=reason)
        return stalled

    def fetch(self, leased: Sequence[tuple[GroupMeta, Payload]]) -> list[tuple[GroupMeta, Any]]:
        """The messages of leased groups, in place of their payloads; before they are acknowledged, and may be gone."""
        messages = self._fetcher.messages([payload for _, payload in leased])
        return [(meta, message) for (meta, _), message in zip(leased, messages, strict=True)]

    def step(
        self,
        step: int,
        version: int,
        reports: Sequence[StepReport],
        trained: Sequence[tuple[GroupMeta, Any]],
        *,
        step_s: float,
    ) -> None:
        """One training step: its updates' reports, and the groups that it consumed, as ``fetch`` gave them."""
        report = merge_reports(reports)
        payloads = [message for _, message in trained]
        groups = [codec.decode(payload) for payload in payloads]
        self._trainer_busy_s += sum(report.seconds.values())
        record = self._record(step, version, report, groups, step_s=step_s)
        self._summary.add_step(record)
        publish_step(self._metrics, record)
        row = record.row()
        self._folder.write_step(row)
        self._loggers.step(row)
        self._folder.write_trained(
            {"step": step, "policy_version": version, "groups": [m.group_id for m, _ in trained]}
        )
        self._write_samples(step, version, groups)
        for group, payload in zip(groups, payloads, strict=True):
            self._folder.write_group(memoryview(payload), group.group_id)
        self._live.update(record)
        self._eval_in_step = None

    def finish(self, exit_reason: str) -> None:
        """Write summary.json; only the first call counts."""
        if self._finished:
            return
        self._finished = True
        summary = self._summary.result(self._totals(), exit_reason)
        self._folder.write_summary(summary)
        self._loggers.finish(summary)
        self._live.event(f"{exit_reason}; see {self._config.run_dir / 'summary.json'}")

    # -- how it is put together ---------------------------------------------------------------------------------

    def _record(
        self, step: int, version: int, report: StepReport, groups: Sequence[Group], *, step_s: float
    ) -> StepRecord:
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        now = time.monotonic()
        rollout_busy = self._rollout_busy_s()
        elapsed = max(now - self._since, 1e-9)
        rollout_idle = 1.0 - min(1.0, (rollout_busy - self._busy_before) / elapsed)
        self._busy_before, self._since = rollout_busy, now
        totals = self._totals()
        return StepRecord(
            step=step,
            policy_version=version,
            time=time.time(),
            elapsed_s=totals.wall_s,
            reward_mean=sum(t.reward for t in trajectories) / len(trajectories),
            eval_reward_mean=self._eval_in_step,
            loss=report.loss,
            grad_norm=report.grad_norm,
            learning_rate=report.lr,
            entropy=report.entropy,
            clip_fraction=report.clip_fraction,
            effective_sample_size_ratio=report.effective_sample_size_ratio,
            agreement=report.agreement,
            agreement_by_staleness=report.agreement_by_staleness,
            agreement_by_resume_position=report.agreement_by_resume_position,
            ppo_kl_k3=report.ppo_kl_k3,
            extreme_token_fraction=report.extreme_token_fraction,
            temperature=report.temperature,
            router_disagreement_ratio=report.router_disagreement,
            router_fallback_rows=report.router_fallback_rows,
            exact_extra_tokens=report.extra_positions,
            padding_ratio=report.padding_ratio,
            rank_cost_ratio=report.rank_cost_ratio,
            tokens_masked=report.tokens_masked,
            updates_skipped=report.skipped,
            last_sync=self._last_sync,
            groups=len(groups),
            response_tokens=tuple(len(t.response_ids) for t in trajectories),
            segments=tuple(len(t.segments) for t in trajectories),
            interruptions=tuple(len(t.resume_points) for t in trajectories),
            queue_groups=self._queue.queued_groups if self._queue else 0,
            queue_bytes=self._queue.queued_bytes if self._queue else 0,
            groups_outstanding=self._groups.outstanding,
            rollout_idle_ratio=rollout_idle,
            trainer_idle_ratio=1.0 - min(1.0, sum(report.seconds.values()) / elapsed),
            overlap_efficiency=totals.overlap_efficiency or 0.0,
            step_s=step_s,
            replica_versions={worker.replica: worker.version for worker in self._workers},
        )

    def _rollout_busy_s(self) -> float:
        mean = sum(worker.busy_s for worker in self._workers) / max(1, len(self._workers))
        return self._rollout_busy_earlier_s + mean

    def _totals(self) -> Totals:
        end = self._ended or time.monotonic()
        generated, resumed = self._tokens_earlier
        return Totals(
            wall_s=self._earlier_s + (end - self._began if self._began is not None else 0.0),
            setup_s=self._setup_s or end - self._started,
            groups=self._groups,
            tokens_generated=generated + sum(worker.generated_tokens for worker in self._workers),
            tokens_resumed_prefill=resumed + sum(worker.resumed_prefill_tokens for worker in self._workers),
            rollout_busy_s=self._rollout_busy_s(),
            trainer_busy_s=self._trainer_busy_s,
        )

    def _write_samples(self, step: int, version: int, groups: Sequence[Group]) -> None:
        samples = [(group, t) for group in groups for t in group.trajectories]
        # Spread over the step's groups, so that n samples are of n prompts.
        stride = max(1, len(samples) // max(1, self._config.metrics.samples_per_step))
        for group, trajectory in samples[::stride][: self._config.metrics.samples_per_step]:
            self._folder.write_sample({"step": step, "policy_version": version, **self._readable(group, trajectory)})

    def _readable(self, group: Group, trajectory: Trajectory) -> Mapping[str, Any]:
        return {
            "trajectory": trajectory.trajectory_id,
            "prompt": group.prompt.text,
            "response": self._decode(trajectory.response_ids),
            "reward": trajectory.reward,
            "finish_reason": trajectory.finish_reason,
            "segments": [
                {"version": s.version, "text": self._decode(trajectory.response_ids[s.start : s.stop])}
                for s in trajectory.segments
            ],
        }
