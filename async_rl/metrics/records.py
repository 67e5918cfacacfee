"""The records of a run's steps, weight syncs and groups: what the trainer, the driver and the queue report. Pure.

Records are plain numbers. They know neither the trainer nor the queue nor the workers, which make them. Values that do
not exist (no evaluation, no token of staleness 0) are None, never NaN. Ratios are in [0, 1], times in seconds,
log-prob differences in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from async_rl.metrics.evaluation import EvalLine

RESUME_POSITIONS = ("uninterrupted", "before", "first", "after")
"""Where a sampled token lies relative to the last resume point of its trajectory (``Trajectory.resume_points``): there
is none, before it, the first token after it, later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenAgreement:
    """The distance between behaviour and current log-probs over some of a step's trained tokens."""

    tokens: int
    """Number of tokens measured."""
    kl: float
    """Mean of behaviour - current."""
    abs_mean: float | None = None
    """Mean of |behaviour - current|; None if it was not measured."""
    abs_max: float | None = None
    """Largest |behaviour - current|; None if it was not measured."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """The trainer's report of one optimizer update, or of several that make one training step.

    Every data-parallel rank reports the same global values, except ``seconds``. Means over tokens are 0.0 where no
    token contributed.
    """

    loss: float
    """Aggregated as trainer.loss.aggregation says."""
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    """Learning rate of the update."""
    skipped: Mapping[str, int]
    """Updates that were not made, by reason: "no_tokens" (all of them masked) or "non_finite" (gradient)."""
    version: int
    """Policy version that the update started from."""
    groups: int
    trajectories: int
    tokens_masked: Mapping[str, int]
    """Response tokens kept out of the loss, by reason."""
    agreement: TokenAgreement
    """Behaviour against current log-probs of the contributing tokens, measured before the update."""
    agreement_by_staleness: Mapping[int, TokenAgreement]
    """The same, split by token staleness in versions; only those that occurred."""
    agreement_by_resume_position: Mapping[str, TokenAgreement]
    """The same, split by position relative to a resume point (RESUME_POSITIONS); only those that occurred."""
    ppo_kl_k3: float
    extreme_token_fraction: float
    """Share of tokens whose importance ratio lies outside [1/2, 2]."""
    clip_fraction: float
    entropy: float
    effective_sample_size_ratio: float
    router_fallback_rows: int
    """Rows without recorded experts, which the trainer's own router handled."""
    extra_positions: int
    """Positions computed again as the prefix of a later segment (routing policy ``exact``)."""
    microbatches: int
    padding_ratio: float = 0.0
    """Share of computed positions that belong to no sequence."""
    rank_cost_ratio: float = 1.0
    """Work of the costliest data-parallel rank over the mean."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Time that this rank spent, by phase."""
    temperature: tuple[float, float] | None = None
    """Temperature of the behaviour log-probs over the trainer's, and the share of the differences that it explains,
    as ``PolicySums.on_policy_temperature`` computes them."""
    router_disagreement: float | None = None
    """Share of the replayed choices of an expert that the trainer's own router would not have made."""
    agreement_by_engine: Mapping[str, TokenAgreement] = field(default_factory=dict)
    """``agreement``, split by the engine that sampled the tokens (rollout.engines); only those that occurred."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncRecord:
    """One weight sync."""

    policy_version: int
    """Version that the sync brought to the replicas."""
    seconds: float
    """From pause to resume."""
    phases: Mapping[str, float] = field(default_factory=dict)
    """Seconds by phase ("pause", "transfer", ...)."""
    canary: float | None = None
    """Largest |engine - trainer| log-prob difference on the canary; None if it was not probed."""
    unreached_experts: int = 0
    """Experts that no token of the canary was routed to."""
    retries: Mapping[str, int] = field(default_factory=dict)
    """Repeated syncs by reason: "canary" (engine and trainer disagreed) or "transfer" (which failed)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One training step: the trainer's report, and what the driver knows in addition."""

    step: int
    """Counted from 1."""
    policy_version: int
    """Version that the step's tokens were measured against."""
    time: float
    """End of the step, in seconds since 1970."""
    elapsed_s: float
    """Time since the first step began."""
    report: StepReport
    """The step's updates, merged."""

    reward_mean: float
    reward_by_source: Mapping[str, float] = field(default_factory=dict)
    """Mean reward of the rollouts of each source of data.sources."""
    issued_share: Mapping[str, float] = field(default_factory=dict)
    """Share of the groups issued so far that each source of data.sources had."""
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    """Mean of each named part of the reward over the rollouts that have it."""
    rollout_metrics: Mapping[str, float] = field(default_factory=dict)
    """Mean of each metric that agents return over the rollouts that have it."""
    truncated: int = 0
    """Trajectories that ended at rollout.max_response_tokens."""
    eval_reward_mean: float | None = None
    """Mean reward on the held-out problems of an evaluation that ended during this step."""
    evals: Mapping[str, EvalLine] = field(default_factory=dict)
    """Results of evaluations that ended during this step, by set."""
    last_sync: SyncRecord | None = None
    """The weight sync before the step."""

    groups: int
    groups_filtered: Mapping[str, int] = field(default_factory=dict)
    """{reason: groups} filtered since the step before."""
    response_tokens: tuple[int, ...] = ()
    """Length of each trajectory."""
    segments: tuple[int, ...] = ()
    """Segments of each trajectory, over all of its turns."""
    interruptions: tuple[int, ...] = ()
    """Resume points of each trajectory."""
    rollout_ends: Mapping[str, int] = field(default_factory=dict)
    """Rollouts by how they ended."""
    rollout_branches: tuple[int, ...] = ()
    """Trajectories of each rollout."""
    rollout_turns: tuple[int, ...] = ()
    """Turns of the policy in each rollout."""
    prefix_recomputed_share: float = 0.0
    """Share of the tokens of all trajectories with which an earlier one of the same rollout begins as well."""

    queue_groups: int = 0
    queue_bytes: int = 0
    groups_outstanding: int = 0
    rollout_idle_ratio: float = 0.0
    trainer_idle_ratio: float = 0.0
    overlap_efficiency: float = 0.0
    step_s: float
    """Wall time of the step, waiting for data included."""
    replica_versions: Mapping[int, int] = field(default_factory=dict)
    """Policy version that each replica last reported."""

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
        """Agreement over the tokens of staleness 0: pure engine-versus-trainer mismatch."""
        return self.report.agreement_by_staleness.get(0)

    @property
    def stale_kl(self) -> float | None:
        """ppo_kl over the tokens of staleness 1 and more: drift of the policy."""
        stale = [part for age, part in self.report.agreement_by_staleness.items() if age > 0]
        return weighted_mean((part.kl, part.tokens) for part in stale)

    @property
    def token_staleness(self) -> dict[int, int]:
        """Trained tokens by staleness, ascending."""
        split = self.report.agreement_by_staleness
        return {age: split[age].tokens for age in sorted(split)}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCounts:
    """Every issued group by its state."""

    issued: int = 0
    trained: int = 0
    outstanding: int = 0
    returned: int = 0
    """Prompts given back to the dataset, those of dropped groups included."""
    failed: int = 0
    dropped: int = 0
    filtered: int = 0
    """Groups that rollout.filter kept from training; 0 in runs of earlier releases."""

    @property
    def add_up(self) -> bool:
        """Whether invariant 5, conservation, holds."""
        return self.issued == self.trained + self.outstanding + self.returned + self.failed + self.filtered


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Counters of the whole run, read when it ends."""

    wall_s: float
    """From the first step to the end of the last, without set-up and the evaluation before it."""
    setup_s: float
    groups: GroupCounts = GroupCounts()
    tokens_generated: int = 0
    tokens_resumed_prefill: int = 0
    rollout_busy_s: float = 0.0
    """Seconds in which rollout computed, mean over its replicas."""
    trainer_busy_s: float = 0.0
    """Seconds in which the trainer computed, mean over its ranks."""

    @property
    def overlap_efficiency(self) -> float | None:
        """Busy time of the busier side over wall time."""
        return max(self.rollout_busy_s, self.trainer_busy_s) / self.wall_s if self.wall_s > 0 else None


def weighted_mean(pairs: Iterable[tuple[float, int]]) -> float | None:
    """Return the mean of (value, weight) pairs, or None if the weights are all zero."""
    pairs = list(pairs)
    weight = sum(count for _, count in pairs)
    return math.fsum(value * count for value, count in pairs) / weight if weight else None
