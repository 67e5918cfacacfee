"""Makes the report of an optimizer update out of its sums, and one report out of the updates of a training step. Pure.

Knows ``policy_sums`` and the records of ``metrics``, of which ``StepReport`` is one; the driver reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from async_rl.metrics.records import RESUME_POSITIONS, StepReport, TokenAgreement

if TYPE_CHECKING:  # the driver merges reports, and does not load torch
    from async_rl.trainer.megatron.optimizer import Update
    from async_rl.trainer.policy_sums import PolicySums

Key = TypeVar("Key", bound=Hashable)

# The label of tokens that no engine of the run sampled: they are of a checkpoint.
OTHER_ENGINES = "other"


def step_report(
    sums: PolicySums,
    update: Update,
    *,
    denominator: float,
    version: int,
    groups: int,
    trajectories: int,
    masked: dict[str, int],
    fallback_rows: int,
    extra_positions: int,
    microbatches: int,
    padding_ratio: float,
    rank_cost_ratio: float,
    seconds: dict[str, float],
) -> StepReport:
    """Return the report of one update from its sums over the global batch. denominator: what the loss is divided by."""
    tokens = sums["tokens"]

    def mean(name: str) -> float:
        return sums[name] / tokens if tokens else 0.0

    stalenesses = range(len(sums.by_staleness("tokens")))
    squares = sums["ratio_squared"]
    reason = "" if update.applied else "non_finite" if tokens else "no_tokens"
    return StepReport(
        loss=float(sums.loss) / denominator if tokens else 0.0,
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
            abs_max=max(sums.max_by_staleness()),
        ),
        agreement_by_staleness=_split(stalenesses, sums.by_staleness, sums.max_by_staleness()),
        agreement_by_resume_position=_split(RESUME_POSITIONS, sums.by_resume_position, sums.max_by_resume_position()),
        agreement_by_engine=_split((*sums.engines, OTHER_ENGINES), sums.by_engine, sums.max_by_engine()),
        ppo_kl_k3=mean("k3"),
        extreme_token_fraction=mean("extreme"),
        clip_fraction=mean("clipped"),
        entropy=mean("entropy"),
        effective_sample_size_ratio=sums["ratio"] ** 2 / (tokens * squares) if squares else 0.0,
        temperature=sums.on_policy_temperature(),
        router_disagreement=sums.router_disagreement,
        router_fallback_rows=fallback_rows,
        extra_positions=extra_positions,
        microbatches=microbatches,
        padding_ratio=padding_ratio,
        rank_cost_ratio=rank_cost_ratio,
        seconds=seconds,
    )


def merge_reports(reports: Sequence[StepReport]) -> StepReport:
    """Return the updates of one training step as one report.

    Means are weighted by contributing tokens and counts are summed; the learning rate is the last update's, the
    gradient norm the largest.
    """
    if len(reports) == 1:
        return reports[0]
    weights = [report.agreement.tokens for report in reports]

    def mean(value: Callable[[StepReport], float]) -> float:
        total = sum(weights)
        return sum(value(report) * weight for report, weight in zip(reports, weights, strict=True)) / max(1, total)

    engines = dict.fromkeys(engine for report in reports for engine in report.agreement_by_engine)
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
        agreement_by_staleness=_merged_split([report.agreement_by_staleness for report in reports], ages),
        agreement_by_resume_position=_merged_split(
            [report.agreement_by_resume_position for report in reports], RESUME_POSITIONS
        ),
        agreement_by_engine=_merged_split([report.agreement_by_engine for report in reports], engines),
        ppo_kl_k3=mean(lambda report: report.ppo_kl_k3),
        extreme_token_fraction=mean(lambda report: report.extreme_token_fraction),
        clip_fraction=mean(lambda report: report.clip_fraction),
        entropy=mean(lambda report: report.entropy),
        effective_sample_size_ratio=mean(lambda report: report.effective_sample_size_ratio),
        # From the first update: later ones compare their tokens with weights that it has changed.
        temperature=reports[0].temperature,
        router_disagreement=reports[0].router_disagreement,
        router_fallback_rows=sum(report.router_fallback_rows for report in reports),
        extra_positions=sum(report.extra_positions for report in reports),
        microbatches=sum(report.microbatches for report in reports),
        padding_ratio=mean(lambda report: report.padding_ratio),
        rank_cost_ratio=mean(lambda report: report.rank_cost_ratio),
        seconds=_summed([report.seconds for report in reports]),
    )


def _split(
    keys: Iterable[Key], column: Callable[[str], list[float]], largest: list[float]
) -> dict[Key, TokenAgreement]:
    """Return the agreement of each of ``keys``, which name the rows of ``column``, without those that have no token."""
    rows = zip(keys, column("tokens"), column("kl"), column("abs_diff"), largest, strict=True)
    return {
        key: TokenAgreement(tokens=int(count), kl=kl / count, abs_mean=difference / count, abs_max=biggest)
        for key, count, kl, difference, biggest in rows
        if count
    }


def _merged_split(splits: Sequence[Mapping[Key, TokenAgreement]], keys: Iterable[Key]) -> dict[Key, TokenAgreement]:
    """Merge splits key by key, in the order of ``keys``; keys that occur in no split are left out."""
    parts = {key: [split[key] for split in splits if key in split] for key in keys}
    return {key: _merged(found) for key, found in parts.items() if found}


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
