"""The canary's probe, comparison and verdict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.config import validate
from async_rl.errors import WeightSyncError, WeightSyncMismatch
from async_rl.weights.canary import SEQUENCES, TOKENS, check_canary, compare, make_probe


def config(dtype="float32", **sync):
    return validate({"model": {"path": "m", "dtype": dtype}, "data": {"train": "d"}, "sync": sync})


def logprobs(shift=0.0):
    rng = np.random.default_rng(0)
    return [(-rng.random(TOKENS - 1) + shift).astype(np.float32) for _ in range(SEQUENCES)]


@given(st.integers(0, 2**32), st.integers(2, 200_000))
def test_the_probe_is_a_function_of_seed_and_vocabulary(seed, vocab):
    probe = make_probe(seed, vocab)
    assert len(probe) == SEQUENCES
    for a, b in zip(probe, make_probe(seed, vocab), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == np.int32
        assert a.min() >= 0
        assert a.max() < vocab


def test_another_seed_probes_elsewhere_and_a_short_context_with_less():
    assert any((a != b).any() for a, b in zip(make_probe(0, 100), make_probe(1, 100), strict=True))
    assert {len(s) for s in make_probe(0, 100, max_tokens=5)} == {5}


def test_the_report_names_the_worst_token():
    engine, trainer = logprobs(), logprobs()
    trainer[3][10] -= 0.5
    report = compare(engine, trainer)
    assert (report.sequence, report.position) == (3, 11)
    assert report.max_abs_diff == pytest.approx(0.5, rel=1e-5)
    assert report.mean_abs_diff == pytest.approx(0.5 / (SEQUENCES * (TOKENS - 1)), rel=1e-5)


@pytest.mark.parametrize(("dtype", "fine", "off"), [("float32", 0.9e-4, 1.2e-4), ("bfloat16", 0.09, 0.11)])
def test_invariant_10_a_difference_above_the_tolerance_of_the_dtype_stops(dtype, fine, off):
    assert check_canary(config(dtype), 0, logprobs(), logprobs(fine)).max_abs_diff == pytest.approx(fine, rel=1e-2)
    with pytest.raises(WeightSyncMismatch, match="replica 2 and the trainer differ"):
        check_canary(config(dtype), 2, logprobs(), logprobs(off))


def test_the_configured_tolerance_wins():
    check_canary(config(canary_tolerance=0.5), 0, logprobs(), logprobs(0.4))
    with pytest.raises(WeightSyncMismatch, match="allowed is 1e-08"):
        check_canary(config(canary_tolerance=1e-8), 0, logprobs(), logprobs(1e-5))


def test_the_verdict_says_where_to_look():
    with pytest.raises(WeightSyncMismatch, match="the weights are not the ones sent"):
        check_canary(config(), 0, logprobs(), logprobs(1.0))
    one = logprobs()
    one[5][0] += 0.001
    with pytest.raises(WeightSyncMismatch, match=r"token 1 of probe sequence 5.*a single layer or expert"):
        check_canary(config(), 0, logprobs(), one)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_invariant_10_what_is_not_finite_never_agrees(value):
    broken = logprobs()
    broken[0][0] = value
    with pytest.raises(WeightSyncMismatch, match="differ by inf"):
        check_canary(config(canary_tolerance=1e9), 0, broken, broken)


def test_sides_that_scored_different_tokens_never_agree():
    with pytest.raises(WeightSyncMismatch, match="tokens per sequence"):
        compare(logprobs()[:-1], logprobs())
    with pytest.raises(WeightSyncError, match="tokens per sequence"):
        compare([], [])
