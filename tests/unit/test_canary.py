"""The canary's probe, comparison and verdict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.config.loading import validate
from async_rl.errors import WeightSyncError, WeightSyncMismatch
from async_rl.types import RoutingSpec
from async_rl.weights.canary import (
    SEQUENCES,
    TOKENS,
    agrees,
    compare,
    greedy_cover,
    make_probe,
    mismatch,
    reached,
    tolerance,
)


def config(dtype="float32", **sections):
    return validate({"model": {"path": "m", "dtype": dtype}, "data": {"train": "d"}, **sections})


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


@pytest.mark.parametrize(
    ("trainer", "engine", "allowed"),
    [("float32", None, 1e-4), ("bfloat16", None, 0.5), ("float32", "bfloat16", 0.5), ("bfloat16", "float32", 0.5)],
)
def test_the_tolerance_is_that_of_the_coarser_type(trainer, engine, allowed):
    assert tolerance(config(trainer, rollout={"dtype": engine})) == allowed


def test_the_configured_tolerance_wins():
    assert tolerance(config(sync={"canary_tolerance": 0.5})) == 0.5


def test_invariant_10_neither_one_token_nor_the_mean_may_be_off():
    everywhere = compare(logprobs(), logprobs(2e-5))
    assert not agrees(everywhere, 1e-4), "a fifth of what one token may be off, but all of them are"
    assert agrees(compare(logprobs(), logprobs(0.9e-5)), 1e-4)
    one = logprobs()
    one[5][0] += 0.9e-4
    assert agrees(compare(logprobs(), one), 1e-4)
    one[5][0] += 0.3e-4
    assert not agrees(compare(logprobs(), one), 1e-4)


def test_the_error_says_where_to_look():
    far = compare(logprobs(), logprobs(1.0))
    message = str(mismatch(config(), 2, far, "layer 7 differs most"))
    assert "replica 2 and the trainer differ by 1" in message
    assert "layer 7 differs most" in message
    assert "the weights are not the ones sent" in message
    one = logprobs()
    one[5][0] += 0.001
    near = str(mismatch(config(), 0, compare(logprobs(), one), "layer 7 differs most"))
    assert "token 1 of probe sequence 5" in near
    assert "a single layer or expert" in near


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_invariant_10_what_is_not_finite_never_agrees(value):
    broken = logprobs()
    broken[0][0] = value
    assert compare(broken, broken).max_abs_diff == np.inf


SPEC = RoutingSpec(num_moe_layers=2, top_k=2, num_experts=6)


def routing(*experts):
    """One sequence whose rows go to these experts, the same in both layers."""
    return np.repeat(np.array(experts, np.uint8)[:, None], 2, axis=1)


def test_experts_are_reached_by_layer():
    rows = np.array([[[0, 1], [2, 3]], [[1, 2], [3, 4]]], np.uint8)
    assert reached([rows], SPEC).astype(int).tolist() == [[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0]]
    assert reached([rows, routing([4, 5])], SPEC).sum() == 6 + 3


def test_only_sequences_that_reach_more_are_added_the_most_useful_first():
    known = reached([routing([0, 1])], SPEC)
    candidates = [routing([0, 1]), routing([2, 0]), routing([2, 3], [3, 4]), routing([5, 4])]
    assert greedy_cover(known, candidates, SPEC) == [2, 3]
    assert greedy_cover(np.ones((2, 6), bool), candidates, SPEC) == []


@given(st.integers(0, 50))
def test_what_is_added_reaches_all_that_the_candidates_reach(seed):
    rng = np.random.default_rng(seed)
    routed = [rng.integers(0, 6, (3, 2, 2)).astype(np.uint8) for _ in range(8)]
    known = rng.random((2, 6)) < 0.3
    chosen = greedy_cover(known, routed, SPEC)
    assert len(set(chosen)) == len(chosen)
    np.testing.assert_array_equal(known | reached([routed[i] for i in chosen], SPEC), known | reached(routed, SPEC))


def test_sides_that_scored_different_tokens_never_agree():
    with pytest.raises(WeightSyncMismatch, match="tokens per sequence"):
        compare(logprobs()[:-1], logprobs())
    with pytest.raises(WeightSyncError, match="tokens per sequence"):
        compare([], [])
