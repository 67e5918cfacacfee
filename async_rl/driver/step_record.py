"""The clocks and counters of one run, from which each step's record and the run's totals are made.

Knows the records of ``metrics`` and the statistics of queue and workers. Writes nothing down: that is ``recorder``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from async_rl.config.inputs import HELD_OUT
from async_rl.metrics.evaluation import EvalLine
from async_rl.metrics.records import GroupCounts, StepRecord, StepReport, SyncRecord, Totals
from async_rl.queue.records import GroupMeta, QueueStats
from async_rl.rollout.stats import WorkerStats
from async_rl.types import source_of


class RunMeter:
    """The time that a run has taken, how much of it each side computed, and the latest counts of queue and workers."""

    def __init__(self, started: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Measure set-up from ``started``, the clock's time at which the run was asked for."""
        self.queue: QueueStats | None = None
        """The latest counts of the queue; None before the first."""
        self._clock = clock
        self._started = started
        self._setup_s = 0.0
        self._began: float | None = None
        self._ended: float | None = None
        self._earlier_s = 0.0  # training time before the run was restored
        self._trainer_busy_s = 0.0
        self._rollout_busy_s = 0.0  # mean over the replicas that there were
        self._tokens_earlier = (0, 0)
        self._filtered_before: Mapping[str, int] | None = {}  # those of earlier steps; None until a restored run counts
        self._workers: list[WorkerStats] = []
        self._busy_before = self._since = 0.0
        self._last_sync: SyncRecord | None = None
        self._evals: dict[str, EvalLine] = {}  # that no step's record has, by set

    # -- a checkpoint's part ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the time and work so far as plain data, for a checkpoint."""
        totals = self.totals()
        return {
            "wall_s": totals.wall_s,
            "trainer_busy_s": totals.trainer_busy_s,
            "rollout_busy_s": totals.rollout_busy_s,
            "tokens": [totals.tokens_generated, totals.tokens_resumed_prefill],
            "evals": dict(self._evals),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the ``state`` of an earlier process of the run."""
        self._earlier_s, self._trainer_busy_s = state["wall_s"], state["trainer_busy_s"]
        self._rollout_busy_s = self._busy_before = state["rollout_busy_s"]
        generated, resumed = state["tokens"]
        self._tokens_earlier = (generated, resumed)
        self._filtered_before = None
        self.rewind(state)

    def rewind(self, state: Mapping[str, Any]) -> None:
        """Take the evaluations of a ``state`` that no step's record has, in place of those of undone steps."""
        self._evals = dict(state.get("evals", {}))  # since 0.2

    # -- what happens -------------------------------------------------------------------------------------------

    @property
    def training(self) -> bool:
        """Whether the training loop runs: set-up and the first evaluation are over, and the last step is not."""
        return self._began is not None and self._ended is None

    def begin(self) -> None:
        """Start the wall clock of the run."""
        self._began = self._since = self._clock()
        self._setup_s = self._began - self._started

    def end(self) -> None:
        """Stop the wall clock of the run."""
        self._ended = self._clock()

    def count(self, queue: QueueStats, workers: Sequence[WorkerStats]) -> None:
        """Take the latest counts of the queue and of the workers."""
        before = sum(worker.busy_s for worker in self._workers)
        added_s = sum(worker.busy_s for worker in workers) - before
        self._rollout_busy_s += added_s / max(1, sum(not worker.gone for worker in workers))
        self.queue, self._workers = queue, list(workers)
        if self._filtered_before is None:
            self._filtered_before = queue.filtered

    def evaluated(self, line: EvalLine) -> None:
        """Take the results of an evaluation within the training loop, for the record of the step that it falls into."""
        self._evals[line["set"]] = line

    def synced(self, record: SyncRecord) -> None:
        """Take the latest weight sync, for the record of the next step."""
        self._last_sync = record

    # -- what it adds up to -------------------------------------------------------------------------------------

    def record(
        self, step: int, version: int, report: StepReport, groups: Sequence[GroupMeta], *, step_s: float
    ) -> StepRecord:
        """Return the record of the training step that ends now, which consumed ``groups``."""
        busy_s = sum(report.seconds.values())
        self._trainer_busy_s += busy_s
        now, rollout_busy = self._clock(), self._rollout_busy_s
        elapsed = max(now - self._since, 1e-9)
        rollout_idle = 1.0 - min(1.0, (rollout_busy - self._busy_before) / elapsed)
        self._busy_before, self._since = rollout_busy, now
        evals, self._evals = self._evals, {}
        rewards = [reward for group in groups for reward in group.rewards]
        totals = self.totals()
        return StepRecord(
            step=step,
            policy_version=version,
            time=time.time(),
            elapsed_s=totals.wall_s,
            report=report,
            reward_mean=sum(rewards) / len(rewards),
            reward_by_source=_source_means(groups),
            issued_share=self._issued_share(),
            reward_parts=_means((group.reward_parts, group.part_sums, group.part_counts) for group in groups),
            rollout_metrics=_means((group.metrics, group.metric_sums, group.metric_counts) for group in groups),
            truncated=sum(reason == "length" for group in groups for reason in group.finish_reasons),
            eval_reward_mean=evals[HELD_OUT]["avg"]["mean"] if HELD_OUT in evals else None,
            evals=evals,
            last_sync=self._last_sync,
            groups=len(groups),
            groups_filtered=self._newly_filtered(),
            response_tokens=tuple(n for group in groups for n in group.response_tokens),
            segments=tuple(n for group in groups for n in group.segments),
            interruptions=tuple(n for group in groups for n in group.interruptions),
            rollout_ends=Counter(end for group in groups for end in group.ends),
            rollout_branches=tuple(n for group in groups for n in group.branches),
            rollout_turns=tuple(n for group in groups for n in group.turns),
            prefix_recomputed_share=sum(group.repeated_tokens for group in groups)
            / max(1, sum(group.num_tokens for group in groups)),
            queue_groups=self.queue.queued_groups if self.queue else 0,
            queue_bytes=self.queue.queued_bytes if self.queue else 0,
            groups_outstanding=totals.groups.outstanding,
            rollout_idle_ratio=rollout_idle,
            trainer_idle_ratio=1.0 - min(1.0, busy_s / elapsed),
            overlap_efficiency=totals.overlap_efficiency or 0.0,
            step_s=step_s,
            replica_versions={worker.replica: worker.version for worker in self._workers if not worker.gone},
        )

    def _newly_filtered(self) -> dict[str, int]:
        """Return {reason: groups} filtered since the last call."""
        now, before = ({} if self.queue is None else self.queue.filtered), self._filtered_before or {}
        self._filtered_before = now
        return {reason: more for reason, count in now.items() if (more := count - before.get(reason, 0))}

    def _issued_share(self) -> dict[str, float]:
        issued = self.queue.issued_by_source if self.queue else {}
        total = sum(issued.values())
        return {source: issued[source] / total for source in sorted(issued)}

    def totals(self) -> Totals:
        """Return the counters of the whole run, its earlier processes included."""
        end = self._ended or self._clock()
        generated, resumed = self._tokens_earlier
        return Totals(
            wall_s=self._earlier_s + (end - self._began if self._began is not None else 0.0),
            setup_s=self._setup_s or end - self._started,
            groups=self.queue.counts if self.queue else GroupCounts(),
            tokens_generated=generated + sum(worker.generated_tokens for worker in self._workers),
            tokens_resumed_prefill=resumed + sum(worker.resumed_prefill_tokens for worker in self._workers),
            rollout_busy_s=self._rollout_busy_s,
            trainer_busy_s=self._trainer_busy_s,
        )


def _source_means(groups: Sequence[GroupMeta]) -> dict[str, float]:
    """Return the mean reward of each source's rollouts, by name, ascending; none without data.sources."""
    found: dict[str, list[float]] = {}
    for group in groups:
        if source := source_of(group.group_id):
            found.setdefault(source, []).extend(group.rewards)
    return {source: sum(found[source]) / len(found[source]) for source in sorted(found)}


def _means(totals: Iterable[tuple[tuple[str, ...], tuple[float, ...], tuple[int, ...]]]) -> dict[str, float]:
    """Return the mean of each number over the rollouts that have it, by name, ascending.

    ``totals``: names, sums and counts of each group.
    """
    found: dict[str, list[tuple[float, int]]] = {}
    for of_group in totals:
        for name, total, count in zip(*of_group, strict=True):
            found.setdefault(name, []).append((total, count))
    return {name: sum(t for t, _ in found[name]) / sum(n for _, n in found[name]) for name in sorted(found)}
