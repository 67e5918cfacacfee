"""What is taken for routing at the border, and what is refused."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.errors import InvalidTrajectory
from async_rl.models import routing as models_routing
from async_rl.models.routing import repeated_expert
from async_rl.rollout import routing_policies
from async_rl.types import RoutingSpec

SPEC = RoutingSpec(num_moe_layers=2, top_k=2, num_experts=8)


def random_rows(count, spec=SPEC, seed=0):
    rng = np.random.default_rng(seed)
    order = rng.random((count, spec.num_moe_layers, spec.num_experts)).argsort(-1)[..., : spec.top_k]
    return order.astype(spec.dtype)


def check(rows, count=None, spec=SPEC):
    routing_policies.check("trajectory t1", rows, rows=len(rows) if count is None else count, spec=spec)


def test_moe_columns_leaves_dense_layers_out():
    everything = np.arange(3 * 5 * 2, dtype=np.uint8).reshape(3, 5, 2)
    picked = routing_policies.moe_columns(everything, num_layers=5, moe_layers=(1, 3, 4))
    np.testing.assert_array_equal(picked, everything[:, [1, 3, 4]])
    assert picked.flags.c_contiguous


def test_moe_columns_of_a_model_without_dense_layers_are_all():
    everything = np.zeros((3, 2, 2), dtype=np.uint8)
    assert routing_policies.moe_columns(everything, num_layers=2, moe_layers=(0, 1)) is everything


@pytest.mark.parametrize("columns", [1, 2, 4, 6])
def test_columns_of_neither_all_layers_nor_the_moe_layers_are_refused(columns):
    everything = np.zeros((3, columns, 2), dtype=np.uint8)
    with pytest.raises(
        InvalidTrajectory, match=rf"routed experts of {columns} layers; the model has 5, of which 3 are MoE"
    ):
        routing_policies.moe_columns(everything, num_layers=5, moe_layers=(1, 3, 4))


@given(st.integers(0, 40), st.sampled_from([8, 256, 300]), st.integers(0, 5))
def test_what_a_router_chooses_passes(count, experts, seed):
    spec = RoutingSpec(num_moe_layers=2, top_k=2, num_experts=experts)
    check(random_rows(count, spec, seed), spec=spec)


def test_a_layer_that_is_constant_over_many_short_sequences_is_refused_on_the_probe():
    sequences = [random_rows(31, seed=seed) for seed in range(10)]
    routing_policies.check_probe(sequences, [32] * 10, SPEC)
    stuck = [_with(rows, (slice(None), 1), [2, 5]) for rows in sequences]
    with pytest.raises(
        InvalidTrajectory, match=r"the probe: MoE layer 1 has the same experts \[2, 5\] in all 310 rows"
    ):
        routing_policies.check_probe(stuck, [32] * 10, SPEC)
    with pytest.raises(InvalidTrajectory, match=r"probe sequence 3: routed_experts has shape \(30, 2, 2\)"):
        routing_policies.check_probe([*sequences[:3], sequences[3][:-1], *sequences[4:]], [32] * 10, SPEC)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: r[:-1], r"shape \(299, 2, 2\), expected \(300, 2, 2\)"),
        (lambda r: np.concatenate([r, r]), r"shape \(600, 2, 2\)"),
        (lambda r: r[:, :1], r"shape \(300, 1, 2\)"),
        (lambda r: r[..., :1], r"shape \(300, 2, 1\)"),
        (lambda r: r.astype(np.uint16), "is uint16, expected uint8"),
        (lambda r: _with(r, (7, 1, 0), 8), r"routed_experts\[7, 1, 0\] is 8, the model has 8 experts"),
        (lambda r: _with(r, (4, 1), 3), r"routed_experts\[4, 1\] names an expert twice: \[3, 3\]"),
        (lambda r: np.zeros_like(r), r"routed_experts\[0, 0\] names an expert twice"),
        (lambda r: _with(r, (slice(None), 1), 0), r"routed_experts\[0, 1\] names an expert twice: \[0, 0\]"),
    ],
)
def test_a_bad_array_is_refused_by_the_name_of_its_trajectory(spoil, message):
    with pytest.raises(InvalidTrajectory, match=f"trajectory t1: .*{message}"):
        check(spoil(random_rows(300)), count=300)


def test_top_1_routing_that_nobody_filled_in_is_refused():
    spec = RoutingSpec(num_moe_layers=2, top_k=1, num_experts=8)
    with pytest.raises(InvalidTrajectory, match="MoE layer 0 has the same experts"):
        check(np.zeros((300, 2, 1), np.uint8), spec=spec)


@pytest.mark.parametrize("rows", [20, 300])
def test_equal_rows_in_a_response_are_no_fault_of_the_engine(rows):
    """A policy that repeats itself, or a router that has collapsed: the run must not end for it."""
    check(np.tile(random_rows(1), (rows, 1, 1)), count=rows)


def _with(rows, where, value):
    rows = rows.copy()
    rows[where] = value
    return rows


def test_of_rows_that_were_checked_before_one_in_sixteen_is_checked_again():
    known = random_rows(300)
    new = _with(known, (299, 1), 3)
    for spoilt, found in ((new, True), (_with(known, (32, 0), 3), True), (_with(known, (33, 0), 3), False)):
        with pytest.raises(InvalidTrajectory, match="twice") if found else nullcontext():
            routing_policies.check("trajectory t1", spoilt, rows=300, spec=SPEC, known=290)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize("top_k", [1, 2, 3, 6, 8])
def test_the_first_row_that_names_an_expert_twice_is_found_wherever_it_is(dtype, top_k):
    rng = np.random.default_rng(top_k)
    rows, layers = 4000, 9  # several blocks, the last one of other size
    distinct = np.argsort(rng.random((rows, layers, 12)), axis=-1)[..., :top_k].astype(dtype)
    assert repeated_expert(distinct, 12) is None
    assert repeated_expert(distinct[:0], 12) is None
    for one, other in itertools.combinations(range(top_k), 2):
        routed = distinct.copy()
        places = sorted((int(rng.integers(rows)), int(rng.integers(layers))) for _ in range(2))
        for row, layer in places:
            routed[row, layer, other] = routed[row, layer, one]
        assert repeated_expert(routed, 12) == places[0]


@pytest.mark.parametrize(("dtype", "experts"), [(np.uint8, 128), (np.uint8, 256), (np.uint16, 512)])
def test_rows_without_a_repetition_are_not_sorted(monkeypatch, dtype, experts):
    """Sorting takes ten times as long, and every row of every response is looked at."""
    rng = np.random.default_rng(0)
    routed = np.argsort(rng.random((300, 48, experts)), axis=-1)[..., :8].astype(dtype)

    def sort(*_, **__):
        raise AssertionError("rows were sorted")

    monkeypatch.setattr(models_routing.np, "sort", sort)
    assert repeated_expert(routed, experts) is None


def first_repeat(routed):
    """The plain definition: the first row with two equal neighbours once it is sorted."""
    ordered = np.sort(routed, axis=-1)
    places = np.argwhere((ordered[..., 1:] == ordered[..., :-1]).any(axis=-1))
    return tuple(places[0].tolist()) if len(places) else None


@st.composite
def routed_rows(draw, types=(np.uint8, np.uint16, np.int32)):
    """Rows of distinct ids below 16 or all over their type, some of them alike; then a few elements overwritten."""
    dtype = np.dtype(draw(st.sampled_from(types)))
    rows, layers, top_k = draw(st.integers(0, 20)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    apart = draw(st.sampled_from([1, (int(np.iinfo(dtype).max) + 1) // 16]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    kinds = rng.random((4, layers, 16)).argsort(axis=-1)[..., :top_k]
    routed = (apart * kinds[rng.integers(0, 4, size=rows)]).astype(dtype)
    if routed.size:
        element = st.tuples(*(st.integers(0, length - 1) for length in routed.shape))
        for place in draw(st.lists(element, max_size=3)):
            routed[place] = draw(st.one_of(st.sampled_from(routed[place[:2]].tolist()), st.integers(0, 255)))
    return routed


@given(routed_rows(), st.sampled_from([1, 64, 1 << 17]))
def test_a_repeated_expert_is_found_as_by_sorting_the_rows(routed, block_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("async_rl.models.routing._BLOCK_BYTES", block_bytes)
        for rows in (routed, routed[::2]):
            assert repeated_expert(rows, int(rows.max(initial=0)) + 1) == first_repeat(rows)


@pytest.mark.parametrize("experts", [128, 129, 256])
def test_ids_that_differ_by_their_highest_bit_only_are_no_repetition(experts):
    rows = np.array([[1, 0], [128, 127], [2, 128], [0, 3]]) % experts
    assert repeated_expert(rows.astype(np.uint8), experts) is None


@given(routed_rows(types=(np.uint8,)), st.sampled_from([16, 128, 256]))
def test_the_verdict_on_rows_is_that_of_the_plain_definition(rows, experts):
    spec = RoutingSpec(num_moe_layers=rows.shape[1], top_k=rows.shape[2], num_experts=experts)
    bad = (rows >= experts).any() or first_repeat(rows) is not None
    with pytest.raises(InvalidTrajectory, match=r"the model has|names an expert twice") if bad else nullcontext():
        check(rows, spec=spec)
