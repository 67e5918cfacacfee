"""A run's sums: takes the records of its steps and weight syncs, and writes the contents of ``summary.json``. Pure.

Keeps sums, not records, so a run of any length takes constant memory.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from async_rl.config.inputs import HELD_OUT
from async_rl.metrics.evaluation import EvalLine
from async_rl.metrics.records import RESUME_POSITIONS, StepRecord, SyncRecord, TokenAgreement, Totals, weighted_mean

REWARD_WINDOW = 10
"""Steps at either end of the run over which ``reward_mean`` is taken: one alone is too noisy."""

_COUNTS = (
    "steps",
    "policy_version",
    "trajectories",
    "partial",
    "max_segments",
    "masked",
    "trained_tokens",
    "extra_tokens",
    "syncs",
    "sync_retries",
    "eval_n",
    "groups",
)


@dataclass(slots=True)
class _Mean:
    """The mean of weighted values and the largest of them."""

    weighted: float = 0.0
    weight: float = 0.0
    largest: float | None = None

    def add(self, value: float, weight: float = 1.0) -> None:
        self.weighted += value * weight
        self.weight += weight
        # NaN stays, which max() would hide or not depending on the order.
        if self.largest is None or value > self.largest or math.isnan(value):
            self.largest = value

    @property
    def mean(self) -> float | None:
        return self.weighted / self.weight if self.weight else None


class _AbsDiff:
    """|behaviour - current log-prob| over several steps: number of tokens, mean and maximum."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self.tokens = state["tokens"] if state else 0
        self.mean, self.max = (_Mean(**state["mean"]), _Mean(**state["max"])) if state else (_Mean(), _Mean())

    def add(self, part: TokenAgreement) -> None:
        self.tokens += part.tokens
        if part.abs_mean is not None:
            self.mean.add(part.abs_mean, part.tokens)
        if part.abs_max is not None:
            self.max.add(part.abs_max)

    def state(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "mean": asdict(self.mean), "max": asdict(self.max)}

    def result(self) -> dict[str, float | None]:
        return {"mean": self.mean.mean, "max": self.max.largest}


class Summary:
    """The sums of one run so far; ``result`` may be asked at any moment."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._first_rewards: list[float] = []
        self._last_rewards: deque[float] = deque(maxlen=REWARD_WINDOW)
        self._first_eval: float | None = None
        self._last_eval: float | None = None
        self._eval_sets: dict[str, dict[str, EvalLine]] = {}  # of each set the first and the last results
        self._staleness: dict[int, int] = {}
        self._kl = _Mean()
        self._largest_kl = _Mean()
        self._sync_seconds = _Mean()
        self._canary = _Mean()
        self._on_policy = _AbsDiff()
        self._by_position = {position: _AbsDiff() for position in RESUME_POSITIONS}

    def add_step(self, record: StepRecord) -> None:
        counts = self._counts
        counts["steps"] += 1
        counts["groups"] += record.groups
        counts["policy_version"] = max(counts["policy_version"], record.policy_version)
        if len(self._first_rewards) < REWARD_WINDOW:
            self._first_rewards.append(record.reward_mean)
        self._last_rewards.append(record.reward_mean)
        counts["trajectories"] += record.trajectories
        counts["partial"] += record.partial
        counts["max_segments"] = max(counts["max_segments"], *record.segments, 0)
        for age, tokens in record.token_staleness.items():
            self._staleness[age] = self._staleness.get(age, 0) + tokens
        counts["masked"] += sum(record.report.tokens_masked.values())
        counts["trained_tokens"] += record.report.agreement.tokens
        if record.report.agreement.tokens:
            self._kl.add(record.report.agreement.kl, record.report.agreement.tokens)
            self._largest_kl.add(abs(record.report.agreement.kl))
        if record.on_policy is not None and record.on_policy.tokens:
            self._on_policy.add(record.on_policy)
        for position, part in record.report.agreement_by_resume_position.items():
            self._by_position[position].add(part)
        counts["extra_tokens"] += record.report.extra_positions

    def add_sync(self, record: SyncRecord) -> None:
        counts = self._counts
        counts["policy_version"] = max(counts["policy_version"], record.policy_version)
        counts["syncs"] += 1
        counts["sync_retries"] += sum(record.retries.values())
        self._sync_seconds.add(record.seconds)
        if record.canary is not None:
            self._canary.add(record.canary)

    def add_eval(self, line: EvalLine) -> None:
        """Add the results of an evaluation of one set."""
        name, reward = line["set"], line["avg"]["mean"]
        self._eval_sets.setdefault(name, {"first": line})["last"] = line
        if name == HELD_OUT:
            if self._first_eval is None:
                self._first_eval = reward
            self._last_eval = reward
            self._counts["eval_n"] = line["problems"]

    def latest_evals(self) -> list[EvalLine]:
        """Return the last results of each evaluation set."""
        return [lines["last"] for lines in self._eval_sets.values()]

    def state(self) -> dict[str, Any]:
        """Return the sums so far as plain data, for a checkpoint."""
        return {
            "counts": dict(self._counts),
            "rewards": [self._first_rewards, list(self._last_rewards)],
            "evals": [self._first_eval, self._last_eval],
            "eval_sets": {name: dict(lines) for name, lines in self._eval_sets.items()},
            "staleness": dict(self._staleness),
            "means": [asdict(mean) for mean in (self._kl, self._largest_kl, self._sync_seconds, self._canary)],
            "on_policy": self._on_policy.state(),
            "by_position": {position: part.state() for position, part in self._by_position.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Replace the sums by those of a ``state``."""
        self._counts = dict.fromkeys(_COUNTS, 0) | state["counts"]
        first, last = state["rewards"]
        self._first_rewards, self._last_rewards = list(first), deque(last, maxlen=REWARD_WINDOW)
        self._first_eval, self._last_eval = state["evals"]
        self._eval_sets = {name: dict(lines) for name, lines in state.get("eval_sets", {}).items()}  # since 0.2
        self._staleness = dict(state["staleness"])
        self._kl, self._largest_kl, self._sync_seconds, self._canary = (_Mean(**mean) for mean in state["means"])
        self._on_policy = _AbsDiff(state["on_policy"])
        self._by_position = {position: _AbsDiff(part) for position, part in state["by_position"].items()}

    def result(self, totals: Totals, exit_reason: str) -> dict[str, Any]:
        """Return the contents of summary.json. exit_reason: "finished", "interrupted", or why the run failed."""
        counts = self._counts
        ages = [age for age, tokens in self._staleness.items() if tokens]
        # The queue's counts are those of the last look at it, and a run may be interrupted right after a step.
        since = min(max(0, counts["groups"] - totals.groups.trained), totals.groups.outstanding)
        return {
            "steps": counts["steps"],
            "policy_version": counts["policy_version"],
            "wall_s": totals.wall_s,
            "setup_s": totals.setup_s,
            "eval": {"first": self._first_eval, "last": self._last_eval, "n": counts["eval_n"]},
            "eval_sets": {name: dict(lines) for name, lines in self._eval_sets.items()},
            "reward_mean": {"first": _mean(self._first_rewards), "last": _mean(list(self._last_rewards))},
            "trajectories": {
                "total": counts["trajectories"],
                "partial": counts["partial"],
                "max_segments": counts["max_segments"],
            },
            "token_staleness": {
                "max": max(ages, default=None),
                "mean": weighted_mean((age, tokens) for age, tokens in self._staleness.items()),
            },
            "tokens_masked": counts["masked"],
            "groups": {
                "issued": totals.groups.issued,
                "trained": totals.groups.trained + since,
                "outstanding": totals.groups.outstanding - since,
                "returned": totals.groups.returned,
                "failed": totals.groups.failed,
                "filtered": totals.groups.filtered,
                "dropped": totals.groups.dropped,
            },
            "on_policy_logprob_abs_diff": self._on_policy.result(),
            "logprob_abs_diff_by_resume_position": {
                position: {"tokens": part.tokens, **part.result()} for position, part in self._by_position.items()
            },
            "ppo_kl": {"mean": self._kl.mean, "max_abs": self._largest_kl.largest},
            "sync": {
                "count": counts["syncs"],
                "seconds_mean": self._sync_seconds.mean,
                "seconds_max": self._sync_seconds.largest,
                "retries": counts["sync_retries"],
                "canary_max": self._canary.largest,
            },
            "tokens": {
                "generated": totals.tokens_generated,
                "trained": counts["trained_tokens"],
                "resumed_prefill": totals.tokens_resumed_prefill,
                "exact_extra": counts["extra_tokens"],
            },
            "busy": {"rollout_s": totals.rollout_busy_s, "trainer_s": totals.trainer_busy_s},
            "overlap_efficiency": totals.overlap_efficiency,
            "exit_reason": exit_reason,
        }


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
