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
    Noise,
    Tolerance,
    agrees,
    compare,
    greedy_cover,
    make_probe,
    mismatch,
    reached,
    text_probe,
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
def test_without_calibration_the_tolerance_is_that_of_the_coarser_type(trainer, engine, allowed):
    settings = config(trainer, rollout={"dtype": engine}, sync={"canary_tolerance": None})
    assert tolerance(settings, None) == Tolerance(allowed, 0.1 * allowed)
    assert tolerance(settings, Noise("float32", 9.0, 9.0)) == Tolerance(allowed, 0.1 * allowed)


def test_the_configured_tolerance_wins_over_what_was_measured():
    assert tolerance(config(sync={"canary_tolerance": 0.5}), Noise("float32", 9.0, 9.0)) == Tolerance(0.5, 0.05)


@pytest.mark.parametrize(
    ("dtype", "token", "mean", "allowed"),
    [
        # Random tokens in a real model of 30 layers, which the fixed tolerance refuses.
        ("float32", 7.72e-5, 1.16e-5, (2.3e-4, 3.5e-5)),
        ("bfloat16", 0.739, 0.0893, (2.2, 0.27)),
        # The demo, which is allowed what it always was.
        ("float32", 1.3e-5, 1e-6, (1e-4, 1e-5)),
        ("bfloat16", 0.1, 0.014, (0.5, 0.05)),
    ],
)
def test_the_first_comparison_sets_the_scale_of_the_others(dtype, token, mean, allowed):
    found = tolerance(config(dtype), Noise(dtype, token, mean))
    assert (found.token, found.mean) == pytest.approx(allowed, rel=0.02)


def test_the_first_comparison_calibrates_and_noise_of_another_type_is_none():
    assert tolerance(config("float32"), None) is None
    assert tolerance(config("float32"), Noise("bfloat16", 0.7, 0.08)) is None


def test_invariant_10_neither_one_token_nor_the_mean_may_be_off():
    limit = Tolerance.of(1e-4)
    everywhere = compare(logprobs(), logprobs(2e-5))
    assert not agrees(everywhere, limit), "a fifth of what one token may be off, but all of them are"
    assert agrees(compare(logprobs(), logprobs(0.9e-5)), limit)
    one = logprobs()
    one[5][0] += 0.9e-4
    assert agrees(compare(logprobs(), one), limit)
    one[5][0] += 0.3e-4
    assert not agrees(compare(logprobs(), one), limit)


def test_text_is_probed_by_the_ends_of_the_first_prompts():
    """The prompts of a chat begin alike."""
    prompts = [np.arange(i, i + length, dtype=np.int32) for i, length in enumerate([100, 5, 1, *[40] * 20])]
    probe = text_probe(iter(prompts))
    assert [len(sequence) for sequence in probe] == [TOKENS, 5] + [TOKENS] * (SEQUENCES - 3)
    assert probe[0].tolist() == list(range(100 - TOKENS, 100))
    assert {len(sequence) for sequence in text_probe(prompts, max_tokens=4)} == {4}


def test_the_error_says_where_to_look():
    far = compare(logprobs(), logprobs(1.0))
    message = str(mismatch(2, far, Tolerance.of(1e-4), "layer 7 differs most"))
    assert "replica 2 and the trainer differ by 1" in message
    assert "layer 7 differs most" in message
    assert "the weights are not the ones sent" in message
    one = logprobs()
    one[5][0] += 0.001
    near = str(mismatch(0, compare(logprobs(), one), Tolerance.of(1e-4), "layer 7 differs most"))
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
