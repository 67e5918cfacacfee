"""Several updates of one training step as one report."""

import pytest
import torch

from async_rl.metrics.records import RESUME_POSITIONS, StepReport, TokenAgreement
from async_rl.trainer.megatron.optimizer import Update
from async_rl.trainer.policy_sums import SUMS, PolicySums
from async_rl.trainer.report import merge_reports, step_report


def report(tokens: int, kl: float, **changes) -> StepReport:
    agreement = TokenAgreement(tokens=tokens, kl=kl, abs_mean=abs(kl), abs_max=2 * abs(kl))
    values = {
        "loss": kl,
        "grad_norm": 1.0,
        "lr": 0.1,
        "skipped": {},
        "version": 3,
        "groups": 4,
        "trajectories": 32,
        "tokens_masked": {"stale": 1},
        "agreement": agreement,
        "agreement_by_staleness": {0: agreement},
        "agreement_by_resume_position": {"first": agreement},
        "ppo_kl_k3": kl,
        "extreme_token_fraction": 0.0,
        "clip_fraction": 0.5,
        "entropy": 1.0,
        "effective_sample_size_ratio": 1.0,
        "router_fallback_rows": 2,
        "extra_positions": 7,
        "microbatches": 1,
        "seconds": {"forward_backward": 1.5},
    }
    return StepReport(**values | changes)


def test_one_report_is_itself():
    only = report(10, 0.5)
    assert merge_reports([only]) is only


def test_means_are_weighted_by_tokens_and_counts_are_summed():
    other = report(30, 0.1, grad_norm=5.0, lr=0.2, skipped={"non_finite": 1}, clip_fraction=0.1)
    first = report(10, 0.5, temperature=(0.9, 0.3), router_disagreement=0.2)
    merged = merge_reports([first, other])
    assert merged.agreement.tokens == 40
    assert merged.agreement.kl == pytest.approx((10 * 0.5 + 30 * 0.1) / 40)
    assert merged.agreement.abs_max == 1.0
    assert merged.clip_fraction == pytest.approx((10 * 0.5 + 30 * 0.1) / 40)
    assert (merged.grad_norm, merged.lr) == (5.0, 0.2)
    assert (merged.temperature, merged.router_disagreement) == ((0.9, 0.3), 0.2), "of the first update"
    assert merged.skipped == {"non_finite": 1}
    assert merged.tokens_masked == {"stale": 2}
    assert (merged.groups, merged.trajectories, merged.router_fallback_rows) == (8, 64, 4)
    assert merged.extra_positions == 14
    assert merged.agreement_by_resume_position == {"first": merged.agreement}
    assert merged.seconds == {"forward_backward": 3.0}


def test_stalenesses_of_one_update_only_survive():
    late = TokenAgreement(tokens=5, kl=0.2, abs_mean=0.2, abs_max=0.4)
    merged = merge_reports([report(10, 0.5), report(5, 0.2, agreement_by_staleness={2: late})])
    assert set(merged.agreement_by_staleness) == {0, 2}
    assert merged.agreement_by_staleness[2] == late


def test_updates_without_tokens_do_not_divide_by_zero():
    empty = report(0, 0.0, agreement_by_staleness={}, skipped={"no_tokens": 1})
    merged = merge_reports([empty, empty])
    assert merged.agreement.kl == 0.0
    assert merged.skipped == {"no_tokens": 2}


def reported(sums: PolicySums) -> StepReport:
    return step_report(
        sums,
        Update(applied=True, grad_norm=1.0, lr=0.1),
        denominator=1.0,
        version=3,
        groups=4,
        trajectories=32,
        masked={"stale": 0, "not_sampled": 3},
        fallback_rows=0,
        extra_positions=11,
        microbatches=1,
        padding_ratio=0.1,
        rank_cost_ratio=1.2,
        seconds={},
    )


def test_sums_are_reported_by_staleness_by_resume_position_and_by_engine():
    sums = PolicySums.zero(3, engines=("vllm", "sglang"))
    for age, position, engine, tokens, kl, difference, largest in (
        (0, "uninterrupted", 1, 10, 1.0, 2.0, 0.5),
        (2, "uninterrupted", 1, 10, 3.0, 4.0, 0.7),
        (2, "after", 2, 5, -1.0, 1.0, 0.6),
    ):
        cell = (age, RESUME_POSITIONS.index(position), engine)
        for name, value in (("tokens", tokens), ("kl", kl), ("abs_diff", difference)):
            sums.sums[(*cell, list(SUMS).index(name))] = value
        sums.max_abs_diff[cell] = largest
    sums.replayed_choices += torch.tensor([40.0, 10.0])
    result = reported(sums)
    assert result.router_disagreement == 0.25
    assert result.agreement == TokenAgreement(tokens=25, kl=3 / 25, abs_mean=7 / 25, abs_max=0.7)
    assert result.agreement_by_staleness == {
        0: TokenAgreement(tokens=10, kl=0.1, abs_mean=0.2, abs_max=0.5),
        2: TokenAgreement(tokens=15, kl=2 / 15, abs_mean=5 / 15, abs_max=0.7),
    }
    assert result.agreement_by_resume_position == {
        "uninterrupted": TokenAgreement(tokens=20, kl=0.2, abs_mean=0.3, abs_max=0.7),
        "after": TokenAgreement(tokens=5, kl=-0.2, abs_mean=0.2, abs_max=0.6),
    }
    assert result.agreement_by_engine == {
        "sglang": TokenAgreement(tokens=20, kl=0.2, abs_mean=0.3, abs_max=0.7),
        "other": TokenAgreement(tokens=5, kl=-0.2, abs_mean=0.2, abs_max=0.6),
    }
    assert result.extra_positions == 11


def test_sums_without_tokens_are_reported_as_zeros():
    result = reported(PolicySums.zero(1))
    assert result.agreement == TokenAgreement(tokens=0, kl=0.0, abs_mean=0.0, abs_max=0.0)
    assert (result.agreement_by_staleness, result.agreement_by_resume_position) == ({}, {})
    assert (result.temperature, result.router_disagreement) == (None, None)


def test_merged_splits_are_in_order_whichever_update_they_come_from():
    part = TokenAgreement(tokens=5, kl=0.2, abs_mean=0.2, abs_max=0.4)
    first = report(5, 0.2, agreement_by_staleness={2: part}, agreement_by_resume_position={"after": part})
    second = report(5, 0.2, agreement_by_staleness={0: part}, agreement_by_resume_position={"before": part})
    merged = merge_reports([first, second])
    assert list(merged.agreement_by_staleness) == [0, 2]
    assert list(merged.agreement_by_resume_position) == ["before", "after"]
