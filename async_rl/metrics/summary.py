"""What a run adds up to: the records of its steps and pushes, and from them ``summary.json``. Pure.

The pipeline fills the records from plain numbers; nothing here knows the trainer, the queue or the workers.
Values that do not exist (no evaluation, no token of staleness 0) are None, never NaN.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from async_rl.types import RESUME_POSITIONS

REWARD_WINDOW = 10
"""Steps at either end of the run over which ``reward_mean`` is taken: one alone is too noisy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenAgreement:
    """How far behaviour and current log-probs are apart, over some of a step's trained tokens.

    tokens: how many; kl: mean of behaviour - current; abs_mean, abs_max: of |behaviour - current|, None where
    they were not measured.
    """

    tokens: int
    kl: float
    abs_mean: float | None = None
    abs_max: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncRecord:
    """One weight push.

    policy_version: that it brought. seconds: from pause to resume; phases: its parts ("pause", "transfer",
    ...).
    canary: largest |engine - trainer| log-prob difference on the canary; None if it was not probed.
    unreached_experts: that no token of the canary went to. retries: pushes made again, by reason: "canary" (it
    disagreed) or "transfer" (which failed).
    """

    policy_version: int
    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)
    canary: float | None = None
    unreached_experts: int = 0
    retries: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One training step. Ratios are in [0, 1]; times in seconds; log-prob differences in nats."""

    step: int
    """From 1."""
    policy_version: int
    """Version that the step's tokens were measured against."""
    time: float
    """When it ended, in seconds since 1970."""
    elapsed_s: float
    """Since the first step began."""

    reward_mean: float
    eval_reward_mean: float | None = None
    """Of an evaluation that ended during this step."""
    loss: float
    grad_norm: float
    learning_rate: float
    entropy: float
    clip_fraction: float
    effective_sample_size_ratio: float

    agreement: TokenAgreement
    """Over all trained tokens."""
    agreement_by_staleness: Mapping[int, TokenAgreement] = field(default_factory=dict)
    """The same, split by token staleness; its token counts are the step's staleness histogram."""
    agreement_by_resume_position: Mapping[str, TokenAgreement] = field(default_factory=dict)
    """The same, split by position relative to a resume point (types.RESUME_POSITIONS)."""
    ppo_kl_k3: float
    extreme_token_fraction: float
    """At tau = 2."""
    temperature: tuple[float, float] | None = None
    """Of the behaviour log-probs of staleness 0, over the trainer's; and how much of their differences it explains."""
    router_disagreement_ratio: float | None = None
    """Share of the replayed choices of an expert that the trainer's own router would not have made."""
    router_fallback_rows: int = 0
    exact_extra_tokens: int = 0
    """Positions computed again as the prefix of a later segment."""
    padding_ratio: float = 0.0
    """Positions computed that belong to no sequence."""
    rank_cost_ratio: float = 1.0
    """Of data-parallel ranks: the costliest one's share over the mean."""
    tokens_masked: Mapping[str, int] = field(default_factory=dict)
    """By reason."""
    updates_skipped: Mapping[str, int] = field(default_factory=dict)
    """By reason."""
    last_sync: SyncRecord | None = None
    """The push that came before the step."""

    groups: int
    response_tokens: tuple[int, ...] = ()
    """Length of each trajectory."""
    segments: tuple[int, ...] = ()
    """Segments of each trajectory, over all of its turns."""
    interruptions: tuple[int, ...] = ()
    """Resume points of each trajectory."""

    queue_groups: int = 0
    queue_bytes: int = 0
    groups_outstanding: int = 0
    rollout_idle_ratio: float = 0.0
    trainer_idle_ratio: float = 0.0
    overlap_efficiency: float = 0.0
    step_s: float
    """Wall time of the step, waiting for data included."""
    replica_versions: Mapping[int, int] = field(default_factory=dict)
    """Version of the weights of each replica when it last said."""

    @property
    def trajectories(self) -> int:
        return len(self.segments)

    @property
    def partial(self) -> int:
        """Trajectories that were interrupted and resumed."""
        return sum(count > 0 for count in self.interruptions)

    @property
    def partial_share(self) -> float:
        return self.partial / self.trajectories if self.segments else 0.0

    @property
    def on_policy(self) -> TokenAgreement | None:
        """Tokens of staleness 0: pure engine-versus-trainer mismatch."""
        return self.agreement_by_staleness.get(0)

    @property
    def stale_kl(self) -> float | None:
        """ppo_kl over tokens of staleness 1 and more: drift of the policy."""
        stale = [part for age, part in self.agreement_by_staleness.items() if age > 0]
        return weighted_mean((part.kl, part.tokens) for part in stale)

    @property
    def token_staleness(self) -> dict[int, int]:
        """Trained tokens by staleness."""
        return {age: self.agreement_by_staleness[age].tokens for age in sorted(self.agreement_by_staleness)}

    def row(self) -> dict[str, Any]:
        """The line of metrics.jsonl: flat, except for splits by a label, which are mappings."""
        split = {str(age): self.agreement_by_staleness[age] for age in sorted(self.agreement_by_staleness)}
        by_position = self.agreement_by_resume_position
        on_policy, sync = self.on_policy, self.last_sync
        return {
            "step": self.step,
            "policy_version": self.policy_version,
            "time": self.time,
            "elapsed_s": self.elapsed_s,
            "reward_mean": self.reward_mean,
            "eval_reward_mean": self.eval_reward_mean,
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "entropy": self.entropy,
            "clip_fraction": self.clip_fraction,
            "effective_sample_size_ratio": self.effective_sample_size_ratio,
            "ppo_kl": self.agreement.kl,
            "ppo_kl_by_staleness": {age: part.kl for age, part in split.items()},
            "ppo_kl_by_resume_position": {name: part.kl for name, part in by_position.items()},
            "ppo_kl_k3": self.ppo_kl_k3,
            "rollout_logprob_abs_diff_mean": self.agreement.abs_mean,
            "rollout_logprob_abs_diff_max": self.agreement.abs_max,
            "rollout_logprob_abs_diff_mean_by_staleness": {age: part.abs_mean for age, part in split.items()},
            "rollout_logprob_abs_diff_max_by_staleness": {age: part.abs_max for age, part in split.items()},
            "rollout_logprob_abs_diff_mean_by_resume_position": {n: part.abs_mean for n, part in by_position.items()},
            "rollout_logprob_abs_diff_max_by_resume_position": {n: part.abs_max for n, part in by_position.items()},
            "on_policy_logprob_abs_diff_mean": on_policy.abs_mean if on_policy else None,
            "on_policy_logprob_abs_diff_max": on_policy.abs_max if on_policy else None,
            "extreme_token_fraction": self.extreme_token_fraction,
            "rollout_temperature_ratio": self.temperature[0] if self.temperature else None,
            "rollout_temperature_explained_ratio": self.temperature[1] if self.temperature else None,
            "router_disagreement_ratio": self.router_disagreement_ratio,
            "router_fallback_rows": self.router_fallback_rows,
            "exact_extra_tokens": self.exact_extra_tokens,
            "padding_ratio": self.padding_ratio,
            "rank_cost_ratio": self.rank_cost_ratio,
            "trained_tokens": self.agreement.tokens,
            "token_staleness": {age: part.tokens for age, part in split.items()},
            "trained_tokens_by_resume_position": {name: part.tokens for name, part in by_position.items()},
            "tokens_masked": dict(self.tokens_masked),
            "updates_skipped": dict(self.updates_skipped),
            "sync_seconds": {"total": sync.seconds, **sync.phases} if sync else None,
            "sync_canary_logprob_abs_diff": sync.canary if sync else None,
            "groups": self.groups,
            "trajectories": self.trajectories,
            "partial_rollouts": self.partial,
            "max_segments": max(self.segments, default=0),
            "response_tokens_mean": sum(self.response_tokens) / max(1, len(self.response_tokens)),
            "response_tokens_max": max(self.response_tokens, default=0),
            "queue_groups": self.queue_groups,
            "queue_bytes": self.queue_bytes,
            "groups_outstanding": self.groups_outstanding,
            "rollout_idle_ratio": self.rollout_idle_ratio,
            "trainer_idle_ratio": self.trainer_idle_ratio,
            "overlap_efficiency": self.overlap_efficiency,
            "step_seconds": self.step_s,
            "replica_versions": {str(replica): version for replica, version in self.replica_versions.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCounts:
    """Where every issued group is. Dropped ones are among the returned: their prompts went back."""

    issued: int = 0
    trained: int = 0
    outstanding: int = 0
    returned: int = 0
    failed: int = 0
    dropped: int = 0

    @property
    def add_up(self) -> bool:
        """Invariant 5, conservation."""
        return self.issued == self.trained + self.outstanding + self.returned + self.failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Counters of the whole run, read when it ends.

    rollout_busy_s and trainer_busy_s: seconds in which that side computed, mean over its replicas or ranks.
    """

    wall_s: float
    """From the first step to the end of the last, set-up and evaluation before it not included."""
    setup_s: float
    groups: GroupCounts = GroupCounts()
    tokens_generated: int = 0
    tokens_resumed_prefill: int = 0
    rollout_busy_s: float = 0.0
    trainer_busy_s: float = 0.0

    @property
    def overlap_efficiency(self) -> float | None:
        """Busy time of the busier side over wall time."""
        return max(self.rollout_busy_s, self.trainer_busy_s) / self.wall_s if self.wall_s > 0 else None


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
)


@dataclass(slots=True)
class _Mean:
    """Of values with weights, and the largest: in constant memory, for a run of any length."""

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
    """|behaviour - current log-prob| over several steps."""

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
    """Takes a run's records as they come and says what they add up to, at any moment. Keeps sums, not records."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._first_rewards: list[float] = []
        self._last_rewards: deque[float] = deque(maxlen=REWARD_WINDOW)
        self._first_eval: float | None = None
        self._last_eval: float | None = None
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
        counts["policy_version"] = max(counts["policy_version"], record.policy_version)
        if len(self._first_rewards) < REWARD_WINDOW:
            self._first_rewards.append(record.reward_mean)
        self._last_rewards.append(record.reward_mean)
        counts["trajectories"] += record.trajectories
        counts["partial"] += record.partial
        counts["max_segments"] = max(counts["max_segments"], *record.segments, 0)
        for age, tokens in record.token_staleness.items():
            self._staleness[age] = self._staleness.get(age, 0) + tokens
        counts["masked"] += sum(record.tokens_masked.values())
        counts["trained_tokens"] += record.agreement.tokens
        if record.agreement.tokens:
            self._kl.add(record.agreement.kl, record.agreement.tokens)
            self._largest_kl.add(abs(record.agreement.kl))
        if record.on_policy is not None and record.on_policy.tokens:
            self._on_policy.add(record.on_policy)
        for position, part in record.agreement_by_resume_position.items():
            self._by_position[position].add(part)
        counts["extra_tokens"] += record.exact_extra_tokens

    def add_sync(self, record: SyncRecord) -> None:
        counts = self._counts
        counts["policy_version"] = max(counts["policy_version"], record.policy_version)
        counts["syncs"] += 1
        counts["sync_retries"] += sum(record.retries.values())
        self._sync_seconds.add(record.seconds)
        if record.canary is not None:
            self._canary.add(record.canary)

    def add_eval(self, reward_mean: float, n: int) -> None:
        """A greedy evaluation on ``n`` held-out problems."""
        if self._first_eval is None:
            self._first_eval = reward_mean
        self._last_eval = reward_mean
        self._counts["eval_n"] = n

    def state(self) -> dict[str, Any]:
        """What was taken so far, as plain data."""
        return {
            "counts": dict(self._counts),
            "rewards": [self._first_rewards, list(self._last_rewards)],
            "evals": [self._first_eval, self._last_eval],
            "staleness": dict(self._staleness),
            "means": [asdict(mean) for mean in (self._kl, self._largest_kl, self._sync_seconds, self._canary)],
            "on_policy": self._on_policy.state(),
            "by_position": {position: part.state() for position, part in self._by_position.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state``."""
        self._counts = dict(state["counts"])
        first, last = state["rewards"]
        self._first_rewards, self._last_rewards = list(first), deque(last, maxlen=REWARD_WINDOW)
        self._first_eval, self._last_eval = state["evals"]
        self._staleness = dict(state["staleness"])
        self._kl, self._largest_kl, self._sync_seconds, self._canary = (_Mean(**mean) for mean in state["means"])
        self._on_policy = _AbsDiff(state["on_policy"])
        self._by_position = {position: _AbsDiff(part) for position, part in state["by_position"].items()}

    def result(self, totals: Totals, exit_reason: str) -> dict[str, Any]:
        """The contents of summary.json. exit_reason: "finished", "interrupted", or why the run failed."""
        counts = self._counts
        ages = [age for age, tokens in self._staleness.items() if tokens]
        return {
            "steps": counts["steps"],
            "policy_version": counts["policy_version"],
            "wall_s": totals.wall_s,
            "setup_s": totals.setup_s,
            "eval": {"first": self._first_eval, "last": self._last_eval, "n": counts["eval_n"]},
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
                "trained": totals.groups.trained,
                "outstanding": totals.groups.outstanding,
                "returned": totals.groups.returned,
                "failed": totals.groups.failed,
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


def weighted_mean(pairs: Iterable[tuple[float, int]]) -> float | None:
    """Mean of values with weights; None without weight."""
    pairs = list(pairs)
    weight = sum(count for _, count in pairs)
    return math.fsum(value * count for value, count in pairs) / weight if weight else None
