"""Packing: nothing lost, nothing padded unless asked, labels and routing rows aligned."""

from itertools import pairwise

import numpy as np
import pytest

from async_rl.trainer.packing import (
    NO_ROUTING,
    Sample,
    pack,
    plan,
    resume_positions,
    rows_without_routing,
    samples_of,
    split_over_ranks,
    spread_rows,
    unpack,
)
from async_rl.types import RoutingSpec, Segment, Trajectory


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
        reward=0.5,
        finish_reason="stop",
        routed_experts=np.zeros((prompt + response - 1, 2, 1), np.uint8),
        routing=RoutingSpec(2, 1, 4),
    )


def sample(n, seed=0, routing=None):
    rng = np.random.default_rng([seed, n])
    return Sample(
        name=f"s{n}",
        token_ids=rng.integers(0, 50, n).astype(np.int32),
        loss_mask=rng.random(n - 1) < 0.5,
        logprobs=rng.random(n - 1).astype(np.float32),
        versions=rng.integers(0, 5, n - 1).astype(np.int32),
        advantages=rng.random(n - 1).astype(np.float32),
        resume_position=rng.integers(0, 4, n - 1).astype(np.int8),
        routing=routing,
    )


def test_invariant_1_alignment_positions_predict_response_tokens_and_match_routing_rows():
    one = trajectory(prompt=3, response=5)
    (packed,) = samples_of(one, advantage=2.0, oldest_version=0)
    assert packed.positions == len(one.routed_experts) == 3 + 5 - 1
    labels = packed.token_ids[1:]
    assert labels[packed.loss_mask].tolist() == one.response_ids.tolist()
    assert packed.logprobs[packed.loss_mask].tolist() == one.logprobs.tolist()
    assert packed.versions[packed.loss_mask].tolist() == one.versions.tolist()
    assert packed.advantages.tolist() == [0, 0, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(("oldest", "kept"), [(0, 5), (3, 5), (4, 3), (5, 1), (6, 0)])
def test_invariant_4_staleness_bound_masks_tokens_sampled_before_the_oldest_version(oldest, kept):
    one = trajectory(response=5, versions=[3, 3, 4, 4, 5])
    samples = samples_of(one, advantage=1.0, oldest_version=oldest)
    assert len(samples) == (kept > 0), "nothing to train is not computed either"
    for packed in samples:
        assert packed.loss_mask.sum() == kept
        assert (packed.versions[packed.loss_mask] >= oldest).all()


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
        reward=1.0,
        finish_reason="stop",
        routed_experts=rows[8],
        routing=RoutingSpec(2, 1, 4),
    ), rows


def test_text_that_was_not_sampled_has_no_loss():
    one, _ = multi_turn()
    (packed,) = samples_of(one, advantage=1.0, oldest_version=0)
    assert packed.token_ids[1:][packed.loss_mask].tolist() == [0, 1, 2, 3, 6, 7]
    assert np.isfinite(packed.logprobs[packed.loss_mask]).all()


@pytest.mark.parametrize(("oldest", "segments"), [(0, 3), (4, 2)])
def test_exact_trains_each_segment_in_the_context_it_was_sampled_in(oldest, segments):
    one, rows = multi_turn()
    views = samples_of(one, advantage=1.0, oldest_version=oldest, per_segment=True)
    assert len(views) == segments
    for view, segment in zip(views, one.segments[-segments:], strict=True):
        assert view.token_ids.tolist() == [40, 41, 42, *range(segment.stop)]
        np.testing.assert_array_equal(view.routing, rows[segment.stop])
        assert view.token_ids[1:][view.loss_mask].tolist() == list(range(segment.start, segment.stop))
        assert view.logprobs[view.loss_mask].tolist() == one.logprobs[segment.start : segment.stop].tolist()


@pytest.mark.parametrize("versions", [[7] * 6, [7, 7, 8, 8, 9, 9], [7, 8, 9, 9, 9, 9]])
def test_views_of_all_segments_train_each_token_once(versions):
    one = trajectory(response=6, versions=versions)
    views = samples_of(one, advantage=1.0, oldest_version=0, per_segment=True)
    trained = np.concatenate([view.token_ids[1:][view.loss_mask] for view in views])
    assert trained.tolist() == one.response_ids.tolist()


def test_resume_positions_are_relative_to_the_last_resume_point():
    assert resume_positions(trajectory(response=3)).tolist() == [0, 0, 0]
    assert resume_positions(trajectory(response=5, versions=[1, 2, 2, 3, 3])).tolist() == [1, 1, 1, 2, 3]
    # A new turn is not a resumption: the environment's text lies between.
    one, _ = multi_turn()
    assert resume_positions(one).tolist() == [1, 1, 2, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [10, 37, 200])
def test_plan_keeps_every_sequence_once_within_the_budget(seed, budget):
    lengths = np.random.default_rng(seed).integers(0, 60, 50).tolist()
    bins = plan(lengths, budget)
    assert sorted(i for b in bins for i in b) == [i for i, n in enumerate(lengths) if n]
    for indices in bins:
        assert len(indices) == 1 or sum(lengths[i] for i in indices) <= budget
    assert bins == plan(lengths, budget)
    # First-fit decreasing never leaves two bins that would fit in one.
    totals = sorted(sum(lengths[i] for i in b) for b in bins)
    assert len(totals) < 2 or totals[0] + totals[1] > budget


def test_a_sequence_over_the_budget_gets_a_microbatch_of_its_own():
    assert plan([5, 100, 5], 10) == [[1], [0, 2]]


def test_pack_lays_sequences_back_to_back_without_padding():
    samples = [sample(n) for n in (4, 9, 2, 6)]
    (batch,) = pack(samples, budget=100)
    assert len(batch) == sum(s.positions for s in samples) == 17
    assert batch.cu_seqlens.tolist() == [0, 8, 13, 16, 17]
    assert batch.longest == 8
    assert batch.samples == (1, 3, 0, 2)
    for index, start, stop in zip(batch.samples, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        original = samples[index]
        assert batch.token_ids[start:stop].tolist() == original.token_ids[:-1].tolist()
        assert batch.labels[start:stop].tolist() == original.token_ids[1:].tolist()
        assert batch.position_ids[start:stop].tolist() == list(range(stop - start))
        for name in ("loss_mask", "logprobs", "versions", "advantages", "resume_position"):
            assert getattr(batch, name)[start:stop].tolist() == getattr(original, name).tolist()
    assert batch.routing is None


def test_a_sample_without_routing_gets_rows_for_the_native_router_and_is_counted():
    routed = sample(5, routing=np.arange(16).reshape(4, 2, 2).astype(np.int32))
    (batch,) = pack([routed, sample(4)], budget=100, routing=RoutingSpec(2, 2, 16))
    assert batch.routing.shape == (7, 2, 2)
    assert batch.routing[:4].tolist() == routed.routing.tolist()
    assert (batch.routing[4:] == NO_ROUTING).all()
    assert rows_without_routing(batch) == 3


@pytest.mark.parametrize("multiple", [1, 4, 7, 16])
def test_padding_is_a_sequence_of_its_own_that_belongs_to_no_sample(multiple):
    spec = RoutingSpec(2, 2, 16)
    samples = [sample(n) for n in (4, 9, 2, 6)]
    plain, padded = (pack(samples, 12, spec, m) for m in (1, multiple))
    for a, b in zip(plain, padded, strict=True):
        assert len(b) % multiple == 0
        assert len(b) - len(a) < multiple
        assert a.samples == b.samples
        assert b.cu_seqlens[-1] == len(b)
        for name in ("token_ids", "labels", "loss_mask", "logprobs", "position_ids", "routing"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name)[: len(a)])
        assert not b.loss_mask[len(a) :].any()
        np.testing.assert_array_equal(b.routing[len(a) :], spread_rows(len(b) - len(a), spec))


@pytest.mark.parametrize(
    "spec", [RoutingSpec(3, 2, 8), RoutingSpec(2, 4, 6), RoutingSpec(1, 1, 5), RoutingSpec(2, 3, 3)]
)
def test_padding_rows_name_distinct_experts_and_spread_over_all(spec):
    rows = spread_rows(spec.num_experts * 5, spec)
    ordered = np.sort(rows, axis=-1)
    assert (ordered[..., 1:] != ordered[..., :-1]).all()
    for layer in range(spec.num_moe_layers):
        assert (
            np.bincount(rows[:, layer].ravel(), minlength=spec.num_experts).tolist()
            == [5 * spec.top_k] * spec.num_experts
        )


@pytest.mark.parametrize("multiple", [1, 8])
def test_unpack_inverts_pack(multiple):
    samples = [sample(n) for n in (4, 1, 9, 2, 6)]
    batches = pack(samples, 9, multiple=multiple)
    values = unpack([batch.logprobs for batch in batches], batches, len(samples))
    assert [v.tolist() for v in values] == [s.logprobs.tolist() for s in samples]


def test_split_over_ranks_gives_each_index_once_and_balances_cost():
    costs = np.random.default_rng(0).integers(30, 800, 16).tolist()
    shares = split_over_ranks(costs, 3)
    assert sorted(index for share in shares for index in share) == list(range(16))
    loads = [sum(costs[index] for index in share) for share in shares]
    assert max(loads) < 1.2 * min(loads)
    assert shares == split_over_ranks(costs, 3)


def test_split_over_more_ranks_than_groups_leaves_ranks_empty():
    assert split_over_ranks([5], 2) == [[0], []]
