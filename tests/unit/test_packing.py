"""Packing loses nothing, pads nothing unless asked, and keeps labels and routed experts aligned."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.config.training import ParallelSection
from async_rl.models.config import ModelConfig
from async_rl.trainer.packing import Packer, pack, rows_without_routing, split_over_ranks, spread_rows, unpack
from async_rl.trainer.parallel import microbatch_multiple, sequence_multiple
from async_rl.trainer.samples import NO_ROUTING, Sample
from async_rl.types import RoutingSpec


def sample(n, seed=0, routed_experts=None):
    rng = np.random.default_rng([seed, n])
    return Sample(
        name=f"s{n}",
        trajectory_id=f"s{n}",
        token_ids=rng.integers(0, 50, n).astype(np.int32),
        loss_mask=rng.random(n - 1) < 0.5,
        logprobs=rng.random(n - 1).astype(np.float32),
        versions=rng.integers(0, 5, n - 1).astype(np.int32),
        advantages=rng.random(n - 1).astype(np.float32),
        resume_position=rng.integers(0, 4, n - 1).astype(np.int8),
        engine=rng.integers(0, 2, n - 1).astype(np.int8),
        routed_experts=routed_experts,
    )


LONG_TAILED = np.random.default_rng(3).lognormal(4.0, 1.0, 200).astype(int).clip(2, 900)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("budget", [10, 200, 1000])
def test_every_sample_is_packed_once_and_whole_within_the_budget(budget, multiple):
    samples = [sample(int(n)) for n in LONG_TAILED]
    batches = pack(samples, budget, sequence_multiple=multiple, multiple=multiple)
    assert sorted(index for batch in batches for index in batch.samples) == list(range(len(samples)))
    for batch in batches:
        assert len(batch.samples) == 1 or len(batch) <= budget
        assert batch.positions == tuple(samples[index].positions for index in batch.samples)
        for start, index in zip(batch.cu_seqlens, batch.samples, strict=False):
            stop = start + samples[index].positions
            assert batch.token_ids[start:stop].tolist() == samples[index].token_ids[:-1].tolist()


@given(
    lengths=st.lists(st.integers(2, 60), max_size=40),
    budget=st.integers(8, 64),
    each=st.sampled_from([1, 2, 8]),
    multiple=st.sampled_from([1, 8, 24]),
    parts=st.integers(1, 5),
)
def test_no_microbatch_exceeds_the_budget_unless_one_sequence_does_alone(lengths, budget, each, multiple, parts):
    """Whatever lengths come, in how many calls; what pads a microbatch as a whole is less than its multiple."""
    packer, batches = Packer(budget, sequence_multiple=each, multiple=multiple), []
    for part in np.array_split(np.arange(len(lengths)), parts):
        batches += packer.add([sample(lengths[index]) for index in part])
    batches += packer.flush()
    assert sum(len(batch.positions) for batch in batches) == len(lengths)
    for batch in batches:
        taken = sum(positions + -positions % each for positions in batch.positions)
        assert taken <= budget or len(batch.positions) == 1
        assert len(batch) % multiple == 0
        assert 0 <= len(batch) - taken < multiple


def test_microbatches_are_full():
    """The price of handing them out before all samples are known: some of the budget, none of it computed."""
    samples = [sample(int(n)) for n in LONG_TAILED]
    batches = pack(samples, 2000)
    assert sum(len(batch) for batch in batches) / (2000 * len(batches)) > 0.9
    assert sum(batch.padding for batch in batches) == 0


@pytest.mark.parametrize("calls", [1, 3, 200])
def test_what_is_packed_together_does_not_depend_on_when_the_samples_came(calls):
    samples = [sample(int(n)) for n in LONG_TAILED]
    packer = Packer(700, sequence_multiple=4, multiple=8)
    batches = []
    for part in np.array_split(np.arange(200), calls):
        batches += packer.add([samples[index] for index in part])
    assert batches, "some are full before the last sample has come"
    batches += packer.flush()
    expected = pack(samples, 700, sequence_multiple=4, multiple=8)
    assert [batch.samples for batch in batches] == [batch.samples for batch in expected]
    assert packer.flush() == []


def test_a_sequence_over_the_budget_is_not_cut_but_gets_a_microbatch_of_its_own():
    batches = pack([sample(6), sample(101), sample(6)], 10)
    assert sorted((batch.samples, len(batch)) for batch in batches) == [((0, 2), 10), ((1,), 100)]


def test_pack_lays_sequences_back_to_back_without_padding():
    samples = [sample(n) for n in (4, 9, 2, 6)]
    (batch,) = pack(samples, budget=100)
    assert len(batch) == sum(s.positions for s in samples) == 17
    assert batch.cu_seqlens.tolist() == [0, 3, 11, 12, 17]
    assert batch.longest == 8
    assert batch.samples == (0, 1, 2, 3)
    assert batch.sequence.tolist() == [0] * 3 + [1] * 8 + [2] + [3] * 5
    for index, start, stop in zip(batch.samples, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        original = samples[index]
        assert batch.token_ids[start:stop].tolist() == original.token_ids[:-1].tolist()
        assert batch.labels[start:stop].tolist() == original.token_ids[1:].tolist()
        assert batch.position_ids[start:stop].tolist() == list(range(stop - start))
        for name in ("loss_mask", "logprobs", "versions", "advantages", "resume_position"):
            assert getattr(batch, name)[start:stop].tolist() == getattr(original, name).tolist()
    assert batch.routed_experts is None
    assert batch.proximal is None


def test_each_sequence_is_padded_at_its_end_where_a_layout_wants_it():
    spec = RoutingSpec(2, 2, 16)
    samples = [sample(n, routed_experts=np.full((n - 1, 2, 2), n, np.int32)) for n in (4, 9)]
    (batch,) = pack(samples, 100, spec, sequence_multiple=4, multiple=8)
    assert batch.cu_seqlens.tolist() == [0, 4, 12, 16]
    assert batch.loss_mask[[3, 12, 13, 14, 15]].tolist() == [False] * 5
    assert batch.position_ids.tolist() == [0, 1, 2, 3, *range(8), 0, 1, 2, 3]
    assert batch.padding == 5
    np.testing.assert_array_equal(batch.routed_experts[3], spread_rows(16, spec)[3])
    assert (batch.routed_experts[4:12] == 9).all()
    assert [part.tolist() for part in unpack([batch.labels], [batch], 2)] == [s.token_ids[1:].tolist() for s in samples]


def test_a_filler_is_padding_alone():
    spec = RoutingSpec(2, 2, 16)
    filler = Packer(100, spec, sequence_multiple=4, multiple=8).filler()
    assert len(filler) == filler.padding == 8
    assert not filler.loss_mask.any()
    np.testing.assert_array_equal(filler.routed_experts, spread_rows(8, spec))


def test_a_sample_without_routing_gets_rows_for_the_native_router_and_is_counted():
    routed = sample(5, routed_experts=np.arange(16).reshape(4, 2, 2).astype(np.int32))
    (batch,) = pack([routed, sample(4)], budget=100, routing_spec=RoutingSpec(2, 2, 16))
    assert batch.routed_experts.shape == (7, 2, 2)
    assert batch.routed_experts[:4].tolist() == routed.routed_experts.tolist()
    assert (batch.routed_experts[4:] == NO_ROUTING).all()
    assert rows_without_routing(batch) == 3


@pytest.mark.parametrize("multiple", [1, 4, 7, 16])
def test_padding_is_a_sequence_of_its_own_that_belongs_to_no_sample(multiple):
    spec = RoutingSpec(2, 2, 16)
    samples = [sample(n) for n in (4, 9, 2, 6)]
    plain, padded = (pack(samples, 100, spec, multiple=m) for m in (1, multiple))
    for a, b in zip(plain, padded, strict=True):
        assert len(b) % multiple == 0
        assert len(b) - len(a) < multiple
        assert a.samples == b.samples
        assert b.cu_seqlens[-1] == len(b)
        for name in ("token_ids", "labels", "loss_mask", "logprobs", "position_ids", "routed_experts"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name)[: len(a)])
        assert not b.loss_mask[len(a) :].any()
        np.testing.assert_array_equal(b.routed_experts[len(a) :], spread_rows(len(b), spec)[len(a) :])


def test_a_microbatch_has_its_experts_in_the_smallest_type_that_holds_them():
    for experts, dtype in ((8, np.int16), (32767, np.int16), (32768, np.int32)):
        assert Packer(16, RoutingSpec(2, 2, experts)).filler().routed_experts.dtype == dtype


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


QWEN3_30B_A3B = ModelConfig(
    architecture="Qwen3MoeForCausalLM",
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=40960,
    tie_word_embeddings=False,
    moe_layers=tuple(range(48)),
    num_experts=128,
    top_k=8,
    moe_intermediate_size=768,
)


def test_the_cost_of_a_sequence_is_that_of_its_parameters_and_of_attention():
    # 3.3 billion parameters that a token meets, of which the embedding is looked up and not multiplied.
    assert QWEN3_30B_A3B.sequence_cost(1) == pytest.approx(2 * 3.0e9, rel=0.03)
    attention = QWEN3_30B_A3B.sequence_cost(32768) - 32768 * QWEN3_30B_A3B.sequence_cost(1)
    assert attention == pytest.approx(32768**2 / 2 * 48 * 32 * 2 * 256, rel=0.01)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_long_tailed_mix_is_balanced_over_ranks_by_cost_and_packed_without_waste(ranks):
    """64 groups of 8 responses, of which a few reach the limit of 32,768 tokens; what two layouts pad."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(7.5, 1.2, (64, 8)).astype(int).clip(16, 32768)
    cost = QWEN3_30B_A3B.sequence_cost
    groups = [sum(cost(int(n)) for n in group) for group in lengths]
    shares = split_over_ranks(groups, ranks)
    loads = [sum(groups[index] for index in share) for share in shares]
    assert max(loads) / np.mean(loads) < 1.05
    by_tokens = split_over_ranks([int(group.sum()) for group in lengths], ranks)
    worse = [sum(groups[index] for index in share) for share in by_tokens]
    assert max(loads) < max(worse), "tokens alone do not tell what a long sequence costs"
    for sizes in (ParallelSection(dp=ranks, ep=ranks), ParallelSection(tp=4, cp=2)):
        samples = [sample(int(n)) for n in lengths.ravel() // 8]
        batches = pack(
            samples,
            8192,
            sequence_multiple=sequence_multiple(sizes),
            multiple=microbatch_multiple(sizes),
        )
        waste = sum(batch.padding for batch in batches) / sum(len(batch) for batch in batches)
        assert waste < 0.02
        assert waste == 0 or sizes.cp > 1
