"""Packing: nothing lost, nothing padded, labels and routing rows aligned."""

from itertools import pairwise

import numpy as np
import pytest

from async_rl.trainer.packing import (
    NO_ROUTING,
    Sample,
    pack,
    plan,
    rows_without_routing,
    sample_of,
    split_over_ranks,
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
        routing=routing,
    )


def test_invariant_1_alignment_positions_predict_response_tokens_and_match_routing_rows():
    one = trajectory(prompt=3, response=5)
    packed = sample_of(one, advantage=2.0, oldest_version=0)
    assert packed.positions == len(one.routed_experts) == 3 + 5 - 1
    labels = packed.token_ids[1:]
    assert labels[packed.loss_mask].tolist() == one.response_ids.tolist()
    assert packed.logprobs[packed.loss_mask].tolist() == one.logprobs.tolist()
    assert packed.versions[packed.loss_mask].tolist() == one.versions.tolist()
    assert packed.advantages.tolist() == [0, 0, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(("oldest", "kept"), [(0, 5), (3, 5), (4, 3), (5, 1), (6, 0)])
def test_invariant_4_staleness_bound_masks_tokens_sampled_before_the_oldest_version(oldest, kept):
    one = trajectory(response=5, versions=[3, 3, 4, 4, 5])
    packed = sample_of(one, advantage=1.0, oldest_version=oldest)
    assert packed.loss_mask.sum() == kept
    assert (packed.versions[packed.loss_mask] >= oldest).all()


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
        for name in ("loss_mask", "logprobs", "versions", "advantages"):
            assert getattr(batch, name)[start:stop].tolist() == getattr(original, name).tolist()
    assert batch.routing is None


def test_a_sample_without_routing_gets_rows_for_the_native_router_and_is_counted():
    routed = sample(5, routing=np.arange(16).reshape(4, 2, 2).astype(np.int32))
    (batch,) = pack([routed, sample(4)], budget=100, row_shape=(2, 2))
    assert batch.routing.shape == (7, 2, 2)
    assert batch.routing[:4].tolist() == routed.routing.tolist()
    assert (batch.routing[4:] == NO_ROUTING).all()
    assert rows_without_routing(batch) == 3


def test_unpack_inverts_pack():
    samples = [sample(n) for n in (4, 1, 9, 2, 6)]
    batches = pack(samples, budget=9)
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
