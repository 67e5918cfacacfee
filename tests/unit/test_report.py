"""Several updates of one training step as one report."""

import pytest

from async_rl.metrics.summary import TokenAgreement
from async_rl.trainer.report import StepReport, merge_reports


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
    merged = merge_reports([report(10, 0.5), other])
    assert merged.agreement.tokens == 40
    assert merged.agreement.kl == pytest.approx((10 * 0.5 + 30 * 0.1) / 40)
    assert merged.agreement.abs_max == 1.0
    assert merged.clip_fraction == pytest.approx((10 * 0.5 + 30 * 0.1) / 40)
    assert (merged.grad_norm, merged.lr) == (5.0, 0.2)
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
