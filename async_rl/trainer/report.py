"""What one training step did, in plain Python numbers. Pure; knows the sums of ``losses`` and ``metrics``' records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from async_rl.metrics.summary import TokenAgreement

if TYPE_CHECKING:  # the driver reads reports, and has no need of torch
    from async_rl.trainer.losses import PolicySums
    from async_rl.trainer.optimizer import Update


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer update, or several of one training step. Every data-parallel rank reports the same global
    values, except ``seconds``, which are its own.

    loss: policy loss per contributing token. skipped: updates that were not made, by why: "no_tokens" (everything
    masked) or "non_finite" (gradient). agreement: behaviour against current log-probs of the contributing tokens,
    before the update; by_staleness in versions, only those that occurred. grad_norm is before clipping. Means over
    tokens are 0.0 where no token contributed.
    """

    loss: float
    grad_norm: float
    lr: float
    skipped: Mapping[str, int]
    version: int
    groups: int
    trajectories: int
    tokens_masked: Mapping[str, int]
    agreement: TokenAgreement
    agreement_by_staleness: Mapping[int, TokenAgreement]
    ppo_kl_k3: float
    extreme_token_fraction: float
    clip_fraction: float
    entropy: float
    effective_sample_size_ratio: float
    router_fallback_rows: int
    microbatches: int
    seconds: Mapping[str, float] = field(default_factory=dict)


def step_report(
    sums: PolicySums,
    update: Update,
    *,
    version: int,
    groups: int,
    trajectories: int,
    masked: dict[str, int],
    fallback_rows: int,
    microbatches: int,
    seconds: dict[str, float],
) -> StepReport:
    """Sums over the global batch to the means that people watch."""
    tokens = sums["tokens"]

    def mean(name: str) -> float:
        return sums[name] / tokens if tokens else 0.0

    columns = zip(
        sums.by_staleness("tokens"),
        sums.by_staleness("kl"),
        sums.by_staleness("abs_diff"),
        sums.max_abs_diff.tolist(),
        strict=True,
    )
    squares = sums["ratio_squared"]
    reason = "" if update.applied else "non_finite" if tokens else "no_tokens"
    return StepReport(
        loss=float(sums.loss) / tokens if tokens else 0.0,
        grad_norm=update.grad_norm,
        lr=update.lr,
        skipped={reason: 1} if reason else {},
        version=version,
        groups=groups,
        trajectories=trajectories,
        tokens_masked=masked,
        agreement=TokenAgreement(
            tokens=int(tokens),
            kl=mean("kl"),
            abs_mean=mean("abs_diff"),
            abs_max=max(sums.max_abs_diff.tolist()),
        ),
        agreement_by_staleness={
            age: TokenAgreement(tokens=int(count), kl=kl / count, abs_mean=difference / count, abs_max=largest)
            for age, (count, kl, difference, largest) in enumerate(columns)
            if count
        },
        ppo_kl_k3=mean("k3"),
        extreme_token_fraction=mean("extreme"),
        clip_fraction=mean("clipped"),
        entropy=mean("entropy"),
        effective_sample_size_ratio=sums["ratio"] ** 2 / (tokens * squares) if squares else 0.0,
        router_fallback_rows=fallback_rows,
        microbatches=microbatches,
        seconds=seconds,
    )


def merge_reports(reports: Sequence[StepReport]) -> StepReport:
    """The updates of one training step as one report: means weighted by contributing tokens, the last update's
    learning rate, the largest gradient norm."""
    if len(reports) == 1:
        return reports[0]
    weights = [report.agreement.tokens for report in reports]

    def mean(value: Callable[[StepReport], float]) -> float:
        total = sum(weights)
        return sum(value(report) * weight for report, weight in zip(reports, weights, strict=True)) / max(1, total)

    ages = sorted({age for report in reports for age in report.agreement_by_staleness})
    return StepReport(
        loss=mean(lambda report: report.loss),
        grad_norm=max(report.grad_norm for report in reports),
        lr=reports[-1].lr,
        skipped=_summed([report.skipped for report in reports]),
        version=reports[-1].version,
        groups=sum(report.groups for report in reports),
        trajectories=sum(report.trajectories for report in reports),
        tokens_masked=_summed([report.tokens_masked for report in reports]),
        agreement=_merged([report.agreement for report in reports]),
        agreement_by_staleness={
            age: _merged([r.agreement_by_staleness[age] for r in reports if age in r.agreement_by_staleness])
            for age in ages
        },
        ppo_kl_k3=mean(lambda report: report.ppo_kl_k3),
        extreme_token_fraction=mean(lambda report: report.extreme_token_fraction),
        clip_fraction=mean(lambda report: report.clip_fraction),
        entropy=mean(lambda report: report.entropy),
        effective_sample_size_ratio=mean(lambda report: report.effective_sample_size_ratio),
        router_fallback_rows=sum(report.router_fallback_rows for report in reports),
        microbatches=sum(report.microbatches for report in reports),
        seconds=_summed([report.seconds for report in reports]),
    )


def _merged(parts: Sequence[TokenAgreement]) -> TokenAgreement:
    tokens = sum(part.tokens for part in parts)
    scale = max(1, tokens)
    return TokenAgreement(
        tokens=tokens,
        kl=sum(part.kl * part.tokens for part in parts) / scale,
        abs_mean=sum((part.abs_mean or 0.0) * part.tokens for part in parts) / scale,
        abs_max=max(part.abs_max or 0.0 for part in parts),
    )


def _summed(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = {name: None for part in parts for name in part}
    return {name: sum(part.get(name, 0) for part in parts) for name in names}
