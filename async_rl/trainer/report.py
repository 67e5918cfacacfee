"""What one training step did, in plain Python numbers. Pure; knows the sums of ``losses``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the driver reads reports, and has no need of torch
    from async_rl.trainer.losses import PolicySums
    from async_rl.trainer.optimizer import Update


@dataclass(frozen=True, slots=True)
class StepReport:
    """Global values: every data-parallel rank reports the same, except ``seconds``, which are its own.

    loss: policy loss per contributing token. skipped: why no update was made, "" if one was: "no_tokens"
    (everything masked) or "non_finite" (gradient). ppo_kl: mean of behaviour - current log-prob over
    contributing tokens, before the update; *_by_staleness: keyed by token staleness in versions, only those
    that occurred. grad_norm is before clipping. token means are 0.0 where no token contributed.
    """

    loss: float
    grad_norm: float
    lr: float
    skipped: str
    version: int
    groups: int
    trajectories: int
    tokens_trained: int
    tokens_masked: dict[str, int]
    reward_mean: float
    ppo_kl: float
    ppo_kl_k3: float
    ppo_kl_by_staleness: dict[int, float]
    tokens_by_staleness: dict[int, int]
    logprob_abs_diff_mean: float
    logprob_abs_diff_max: float
    on_policy_logprob_abs_diff_mean: float
    on_policy_logprob_abs_diff_max: float
    extreme_token_fraction: float
    clip_fraction: float
    entropy: float
    effective_sample_size_ratio: float
    router_fallback_rows: int
    microbatches: int
    seconds: dict[str, float] = field(default_factory=dict)


def step_report(
    sums: PolicySums,
    update: Update,
    *,
    version: int,
    groups: int,
    trajectories: int,
    reward_sum: float,
    masked: dict[str, int],
    fallback_rows: int,
    microbatches: int,
    seconds: dict[str, float],
) -> StepReport:
    """Sums over the global batch to the means that people watch."""
    tokens = sums["tokens"]

    def mean(name: str) -> float:
        return sums[name] / tokens if tokens else 0.0

    by_staleness = sums.tokens_by_staleness.tolist()
    kl = sums.kl_by_staleness.tolist()
    on_policy = by_staleness[0] if by_staleness else 0
    squares = sums["ratio_squared"]
    skipped = "" if update.applied else "non_finite" if tokens else "no_tokens"
    return StepReport(
        loss=mean("loss"),
        grad_norm=update.grad_norm,
        lr=update.lr,
        skipped=skipped,
        version=version,
        groups=groups,
        trajectories=trajectories,
        tokens_trained=int(tokens),
        tokens_masked=masked,
        reward_mean=reward_sum / trajectories if trajectories else math.nan,
        ppo_kl=mean("kl"),
        ppo_kl_k3=mean("k3"),
        ppo_kl_by_staleness={s: kl[s] / n for s, n in enumerate(by_staleness) if n},
        tokens_by_staleness={s: int(n) for s, n in enumerate(by_staleness) if n},
        logprob_abs_diff_mean=mean("abs_diff"),
        logprob_abs_diff_max=sums.maximum("abs_diff"),
        on_policy_logprob_abs_diff_mean=sums["abs_diff_on_policy"] / on_policy if on_policy else 0.0,
        on_policy_logprob_abs_diff_max=sums.maximum("abs_diff_on_policy"),
        extreme_token_fraction=mean("extreme"),
        clip_fraction=mean("clipped"),
        entropy=mean("entropy"),
        effective_sample_size_ratio=sums["ratio"] ** 2 / (tokens * squares) if squares else 0.0,
        router_fallback_rows=fallback_rows,
        microbatches=microbatches,
        seconds=seconds,
    )
