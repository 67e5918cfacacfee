"""The rows and layers of a rank, against brute force."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.config.training import ParallelSection
from async_rl.trainer.parallel import (
    Place,
    context_rows,
    layers,
    microbatch_multiple,
    owning_rank,
    router_rows,
    sequence_multiple,
    stage_of,
    world_size,
)

SIZES = [
    ParallelSection(dp=dp, tp=tp, cp=cp, pp=pp, vpp=vpp, ep=ep, etp=etp)
    for dp, tp, cp, pp, vpp, ep, etp in product((1, 2), (1, 2, 4), (1, 2, 3), (1, 2), (1, 2), (1, 2), (1, 2))
    if (dp * tp * cp) % (ep * etp) == 0 and (pp > 1 or vpp == 1)
]


def enumerated(sizes):
    """Return the coordinates of all ranks by nested loops, slowest outermost."""
    dense = list(product(range(sizes.pp), range(sizes.dp), range(sizes.cp), range(sizes.tp)))
    rest = sizes.dp * sizes.cp * sizes.tp // (sizes.ep * sizes.etp)
    experts = list(product(range(sizes.pp), range(rest), range(sizes.ep), range(sizes.etp)))
    return dense, experts


@pytest.mark.parametrize("pp", [1, 2])
def test_ranks_are_numbered_tensor_parallel_first_and_pipeline_last(pp):
    for sizes in (sizes for sizes in SIZES if sizes.pp == pp):
        check_numbers(sizes)


def check_numbers(sizes):
    dense, experts = enumerated(sizes)
    places = [Place.of(sizes, rank) for rank in range(world_size(sizes))]
    assert [(p.pp, p.dp, p.cp, p.tp) for p in places] == dense
    assert [(p.pp, p.ep, p.etp) for p in places] == [(pp, ep, etp) for pp, _, ep, etp in experts]
    assert sum(p.reports_loss for p in places) == sizes.dp * sizes.cp
    for stage in range(sizes.pp):
        assert owning_rank(sizes, stage, None) == min(p.rank for p in places if (p.pp, p.tp) == (stage, 0))
        for ep in range(sizes.ep):
            assert owning_rank(sizes, stage, ep) == min(p.rank for p in places if (p.pp, p.ep, p.etp) == (stage, ep, 0))


@pytest.mark.parametrize("sizes", [s for s in SIZES if s.dp == s.tp == s.cp == s.ep == s.etp == 1], ids=str)
def test_layers_are_laid_over_the_stages_chunk_by_chunk(sizes):
    count = 12
    order = [
        layer for chunk in range(sizes.vpp) for stage in range(sizes.pp) for layer in layers(count, sizes, stage, chunk)
    ]
    assert order == list(range(count))
    for stage, chunk in product(range(sizes.pp), range(sizes.vpp)):
        for number, layer in enumerate(layers(count, sizes, stage, chunk)):
            assert stage_of(count, sizes, layer) == (stage, chunk, number)


# Layers of Moonlight, GLM-4.5-Air, DeepSeek-V3, GLM-4.5 and Qwen3-235B.
PUBLISHED = (27, 46, 61, 92, 94)


@given(st.sampled_from(PUBLISHED) | st.integers(2, 128), st.integers(1, 16), st.integers(1, 4), st.data())
def test_every_layer_has_one_stage_whatever_their_number(count, pp, vpp, data):
    stages = pp * vpp
    if stages > count:
        pp = vpp = stages = 1
    given_counts = None
    if data.draw(st.booleans()):
        cuts = sorted(data.draw(st.sets(st.integers(1, count - 1), min_size=stages - 1, max_size=stages - 1)))
        given_counts = tuple(b - a for a, b in pairwise([0, *cuts, count]))
    sizes = ParallelSection(pp=pp, vpp=vpp, layers_per_stage=given_counts)
    found = sizes.stage_layers(count)
    assert sum(found) == count
    assert given_counts in (None, found)
    placed = {}
    for chunk, stage in product(range(vpp), range(pp)):
        for number, layer in enumerate(layers(count, sizes, stage, chunk)):
            assert stage_of(count, sizes, layer) == (stage, chunk, number)
            placed[layer] = (chunk, stage)
    assert [*placed] == list(range(count)), "in the order in which a token passes them"
    with pytest.raises(ValueError, match=f"layer {count} of {count}"):
        stage_of(count, sizes, count)
    if given_counts is None:
        assert max(found) - min(found) <= 1
        assert found[-1] == min(found), "the last stage has the output layer as well"
        assert found[0] == min(found) or found[1:-1] == (max(found),) * (stages - 2)
        by_rank = [sum(found[stage::pp]) for stage in range(pp)]
        assert max(by_rank) - min(by_rank) <= 1


@pytest.mark.parametrize(
    ("count", "pp", "vpp", "expected"),
    [(8, 2, 2, (2, 2, 2, 2)), (61, 4, 1, (15, 15, 16, 15)), (27, 2, 1, (14, 13)), (46, 4, 2, (5, 6, 6, 6, 6, 6, 6, 5))],
)
def test_stages_by_hand(count, pp, vpp, expected):
    assert ParallelSection(pp=pp, vpp=vpp).stage_layers(count) == expected


def brute_force_rows(cu_seqlens, place):
    """Go through the positions one by one: which context-parallel rank has it, and where in its rows."""
    rows = []
    parts = 2 * place.sizes.cp
    for start, stop in pairwise(cu_seqlens):
        for position in range(start, stop):
            part = (position - start) * parts // (stop - start)
            owner = part if part < place.sizes.cp else parts - 1 - part
            if owner == place.cp:
                rows.append(position)
    share = len(rows) // place.sizes.tp
    return [row for number, row in enumerate(rows) if number // share == place.tp]


@pytest.mark.parametrize("cp", [1, 2, 3])
def test_rows_and_layers_that_a_rank_replays(cp):
    for sizes in (sizes for sizes in SIZES if sizes.cp == cp):
        check_rows_and_layers(sizes)


def check_rows_and_layers(sizes):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5, 4) * sequence_multiple(sizes)
    lengths = [*lengths, -sum(lengths) % microbatch_multiple(sizes)]
    cu_seqlens = np.cumsum([0, *[n for n in lengths if n]]).astype(np.int32)
    moe_layers, count = (1, 2, 3, 5, 6, 7, 11), 12
    covered = {}
    for rank in range(world_size(sizes)):
        place = Place.of(sizes, rank)
        for chunk in range(sizes.vpp):
            rows, routers = router_rows(cu_seqlens, moe_layers, count, place, chunk)
            assert rows.tolist() == brute_force_rows(cu_seqlens, place)
            assert [moe_layers[index] for index in routers] == [
                n for n in layers(count, sizes, place.pp, chunk) if n in moe_layers
            ]
            assert set(rows) <= set(context_rows(cu_seqlens, place).tolist())
            for cell in product(rows.tolist(), routers):
                covered.setdefault((place.dp, *cell), []).append(rank)
    # Every row of every MoE layer on exactly one rank of each data-parallel index.
    assert len(covered) == sizes.dp * cu_seqlens[-1] * len(moe_layers)
    assert all(len(ranks) == 1 for ranks in covered.values())


def test_without_context_parallelism_nothing_is_padded_but_for_sequence_parallelism():
    assert sequence_multiple(ParallelSection(tp=4, pp=2, dp=2)) == 1
    assert microbatch_multiple(ParallelSection(dp=8, ep=8)) == 1
    assert microbatch_multiple(ParallelSection(tp=4)) == 4
    assert (sequence_multiple(ParallelSection(cp=3)), microbatch_multiple(ParallelSection(cp=3, tp=2))) == (6, 6)
    assert microbatch_multiple(ParallelSection(cp=2, tp=2), asked=16) == 32
