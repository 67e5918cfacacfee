"""A trajectory's samples: what has a loss, and labels and routed experts aligned."""

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.errors import ReplayError
from async_rl.trainer.samples import (
    NO_ROUTING,
    check_routed_experts,
    group_samples,
    plain_sample,
    resume_positions,
    samples_of,
)
from async_rl.trainer.step import Step, masked_tokens
from async_rl.types import Prompt, RoutingSpec, Segment, Trajectory
from tests.support.groups import grouped
from tests.support.ranks import run_config


def trajectory(name="t", prompt=3, response=5, versions=None, seed=0):
    rng = np.random.default_rng(seed)
    versions = np.array(versions if versions is not None else [7] * response, np.int32)
    cuts = [0, *(i for i in range(1, response) if versions[i] != versions[i - 1]), response]
    return Trajectory(
        trajectory_id=name,
        prompt_ids=rng.integers(0, 50, prompt).astype(np.int32),
        response_ids=rng.integers(0, 50, response).astype(np.int32),
        logprobs=-rng.random(response).astype(np.float32),
        versions=versions,
        segments=tuple(Segment(a, b, int(versions[a])) for a, b in pairwise(cuts)),
        finish_reason="stop",
        routed_experts=np.zeros((prompt + response - 1, 2, 1), np.uint8),
        routing_spec=RoutingSpec(2, 1, 4),
    )


def test_invariant_1_alignment_positions_predict_response_tokens_and_match_routing_rows():
    one = trajectory(prompt=3, response=5)
    (sample,) = samples_of(one, advantage=2.0, oldest_version=0)
    assert sample.positions == len(one.routed_experts) == 3 + 5 - 1
    labels = sample.token_ids[1:]
    assert labels[sample.loss_mask].tolist() == one.response_ids.tolist()
    assert sample.logprobs[sample.loss_mask].tolist() == one.logprobs.tolist()
    assert sample.versions[sample.loss_mask].tolist() == one.versions.tolist()
    assert sample.advantages.tolist() == [0, 0, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(("oldest", "kept"), [(0, 5), (3, 5), (4, 3), (5, 1), (6, 0)])
def test_invariant_4_staleness_bound_masks_tokens_sampled_before_the_oldest_version(oldest, kept):
    one = trajectory(response=5, versions=[3, 3, 4, 4, 5])
    samples = samples_of(one, advantage=1.0, oldest_version=oldest)
    assert len(samples) == (kept > 0), "nothing to train is not computed either"
    for sample in samples:
        assert sample.loss_mask.sum() == kept
        assert (sample.versions[sample.loss_mask] >= oldest).all()


def test_what_was_cut_off_can_be_kept_out_of_the_loss_and_is_counted_apart():
    whole, cut = trajectory("whole"), replace(trajectory("cut", versions=[3, 3, 7, 7, 7]), finish_reason="length")
    group = grouped("0-1.0", Prompt("0-1", 1, "a", np.array([1], np.int32)), (whole, cut))
    for mask, kept, reasons in ((False, ["whole", "cut"], {}), (True, ["whole"], {"truncated": 3})):
        samples = group_samples(group, run_config("unused", trainer__mask_truncated=mask), oldest_version=5)
        assert [sample.trajectory_id for sample in samples] == kept
        step = Step(7, 5, None, None)
        step.count_groups([group], samples)
        assert masked_tokens(step.counts, rejected=0.0) == {"stale": 2, "not_sampled": 0, **reasons}


def test_each_token_counts_for_the_engine_that_sampled_it():
    one = trajectory(prompt=3, response=5, versions=[3, 3, 4, 4, 5])
    names = ("sglang", "vllm", "my:Engine")
    one = replace(one, segments=tuple(replace(s, engine=name) for s, name in zip(one.segments, names, strict=True)))
    (sample,) = samples_of(one, oldest_version=0, engines=("vllm", "sglang"))
    assert sample.engine.tolist() == [0, 0, 1, 1, 0, 0, 2], "2 is for an engine that the run does not have"


def test_each_token_is_trained_at_the_temperature_that_it_was_sampled_at():
    one, _ = multi_turn()
    said = (0.5, None, 2.0)
    one = replace(one, segments=tuple(replace(s, temperature=t) for s, t in zip(one.segments, said, strict=True)))
    (sample,) = samples_of(one, oldest_version=0, temperature=0.75)
    assert sample.temperature.tolist() == [1, 1, 0.5, 0.5, 0.75, 0.75, 0.75, 0.75, 2, 2]
    first, *_, last = samples_of(one, oldest_version=0, temperature=0.75, per_segment=True)
    assert first.temperature.tolist() == [1, 1, 0.5, 0.5]
    assert last.temperature.tolist() == sample.temperature.tolist()


def multi_turn():
    """Segments [0, 2) of version 3, [2, 4) of 4 and [6, 8) of 4, and the environment's text from 4 to 6."""
    rng = np.random.default_rng(0)
    rows = {stop: rng.integers(0, 4, (3 + stop - 1, 2, 1)).astype(np.uint8) for stop in (2, 4, 8)}
    nothing = np.nan
    return Trajectory(
        trajectory_id="m",
        prompt_ids=np.array([40, 41, 42], np.int32),
        response_ids=np.arange(8, dtype=np.int32),
        logprobs=np.array([-1, -2, -3, -4, nothing, nothing, -7, -8], np.float32),
        versions=np.array([3, 3, 4, 4, -1, -1, 4, 4], np.int32),
        segments=(Segment(0, 2, 3, rows[2]), Segment(2, 4, 4, rows[4]), Segment(6, 8, 4)),
        finish_reason="stop",
        routed_experts=rows[8],
        routing_spec=RoutingSpec(2, 1, 4),
    ), rows


def test_text_that_was_not_sampled_has_no_loss():
    one, _ = multi_turn()
    (sample,) = samples_of(one, advantage=1.0, oldest_version=0)
    assert sample.token_ids[1:][sample.loss_mask].tolist() == [0, 1, 2, 3, 6, 7]
    assert np.isfinite(sample.logprobs[sample.loss_mask]).all()


@pytest.mark.parametrize(("oldest", "segments"), [(0, 3), (4, 2)])
def test_exact_trains_each_segment_in_the_context_it_was_sampled_in(oldest, segments):
    one, rows = multi_turn()
    samples = samples_of(one, advantage=1.0, oldest_version=oldest, per_segment=True)
    assert len(samples) == segments
    for sample, segment in zip(samples, one.segments[-segments:], strict=True):
        assert sample.token_ids.tolist() == [40, 41, 42, *range(segment.stop)]
        np.testing.assert_array_equal(sample.routed_experts, rows[segment.stop])
        assert sample.token_ids[1:][sample.loss_mask].tolist() == list(range(segment.start, segment.stop))
        assert sample.logprobs[sample.loss_mask].tolist() == one.logprobs[segment.start : segment.stop].tolist()


@pytest.mark.parametrize("versions", [[7] * 6, [7, 7, 8, 8, 9, 9], [7, 8, 9, 9, 9, 9]])
def test_the_samples_of_all_segments_train_each_token_once(versions):
    one = trajectory(response=6, versions=versions)
    samples = samples_of(one, advantage=1.0, oldest_version=0, per_segment=True)
    trained = np.concatenate([sample.token_ids[1:][sample.loss_mask] for sample in samples])
    assert trained.tolist() == one.response_ids.tolist()


def test_resume_positions_are_relative_to_the_last_resume_point():
    assert resume_positions(trajectory(response=3)).tolist() == [0, 0, 0]
    assert resume_positions(trajectory(response=5, versions=[1, 2, 2, 3, 3])).tolist() == [1, 1, 1, 2, 3]
    # A new turn is not a resumption: the environment's text lies between.
    one, _ = multi_turn()
    assert resume_positions(one).tolist() == [1, 1, 2, 3, 3, 3, 3, 3]


SPEC = RoutingSpec(num_moe_layers=3, top_k=2, num_experts=6)


def routed_sample():
    """Ten tokens, each MoE layer of each row with experts of its own, and a row without any."""
    rows = np.broadcast_to(np.array([[0, 5], [3, 1], [4, 2]]), (9, 3, 2)).astype(np.int32)
    rows[4] = NO_ROUTING
    return plain_sample("s", np.arange(10, dtype=np.int32)).with_routed_experts(rows)


def test_routed_experts_that_the_model_can_execute_pass():
    check_routed_experts(routed_sample(), SPEC)
    check_routed_experts(plain_sample("s", np.arange(10, dtype=np.int32)), None)
    empty = plain_sample("s", np.arange(1, dtype=np.int32)).with_routed_experts(np.zeros((0, 3, 2), np.uint8))
    check_routed_experts(empty, SPEC)


@pytest.mark.parametrize(
    ("row", "layer", "experts", "words"),
    [
        (7, 1, [0, 6], r"s: row 7, MoE layer 1: experts \[0, 6\], the model has 0 to 5"),
        (0, 2, [-2, 1], r"s: row 0, MoE layer 2: experts \[-2, 1\]"),
        (3, 0, [NO_ROUTING, 1], r"s: row 3, MoE layer 0: experts \[-1, 1\]"),
        (8, 2, [4, 4], r"s: row 8, MoE layer 2: expert repeated in \[4, 4\]"),
    ],
)
def test_routed_experts_that_the_model_cannot_execute_are_refused(row, layer, experts, words):
    sample = routed_sample()
    sample.routed_experts[row, layer] = experts
    with pytest.raises(ReplayError, match=words):
        check_routed_experts(sample, SPEC)


@given(
    st.integers(0, 999), st.lists(st.tuples(*(st.integers(0, n) for n in (8, 2, 1)), st.integers(-2, 6)), max_size=4)
)
def test_the_verdict_on_routed_experts_is_that_of_the_plain_definition(seed, overwritten):
    rng = np.random.default_rng(seed)
    rows = rng.random((9, 3, 6)).argsort(axis=-1)[..., :2].astype(np.int32)
    rows[rng.random(9) < 0.3] = NO_ROUTING
    for row, layer, slot, expert in overwritten:
        rows[row, layer, slot] = expert

    def can_be_executed(experts):
        return experts == [NO_ROUTING] * 2 or (len(set(experts)) == 2 and all(0 <= e < 6 for e in experts))

    good = all(can_be_executed(experts) for experts in rows.reshape(-1, 2).tolist())
    with nullcontext() if good else pytest.raises(ReplayError, match=r"s: row \d, MoE layer \d"):
        check_routed_experts(plain_sample("s", np.arange(10, dtype=np.int32)).with_routed_experts(rows), SPEC)


def test_routed_experts_of_another_shape_are_refused():
    sample = routed_sample()
    for rows in (sample.routed_experts[1:], sample.routed_experts[:, 1:], sample.routed_experts[:, :, 1:]):
        with pytest.raises(ReplayError, match=r"s: routed_experts has shape .*, the model needs \(9, 3, 2\)"):
            check_routed_experts(sample.with_routed_experts(rows), SPEC)
    with pytest.raises(ReplayError, match="the trainer's model has no MoE layer"):
        check_routed_experts(sample, None)
