"""What each rank sends to rank 0, in which exchange."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from async_rl.config.training import ParallelSection
from async_rl.models import names
from async_rl.trainer.gather_plan import ALIGNMENT, Parameter, exchanges, holders
from async_rl.trainer.parallel import Place, world_size
from tests.support.spread_model import GLM, QWEN

LAYOUTS = [
    ParallelSection(tp=tp, pp=pp, vpp=vpp, dp=dp, cp=cp, ep=ep, etp=etp)
    for tp, pp, vpp, dp, cp, ep, etp in product((1, 2), (1, 2), (1, 2), (1, 2), (1, 2), (1, 2, 4), (1, 2))
    if (vpp == 1 or pp > 1) and tp * cp * dp % (ep * etp) == 0
]


def parameter(*ranks, size=8, dtype=torch.bfloat16):
    entry = names.Entry("p", "same", "whole", 0, None, ("h",))
    return Parameter(entry, dtype, (size,), range(ranks[0], ranks[-1] + 1))


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_the_holders_of_a_parameter_have_its_parts_in_order_and_none_of_them_twice(sizes):
    for entry in names.entries(GLM, "local"):
        ranks = holders(GLM, sizes, entry)
        places = [Place.of(sizes, rank) for rank in ranks]
        parts = 1 if entry.cut == "whole" else sizes.tp if entry.expert is None else sizes.etp
        assert [place.tp if entry.expert is None else place.etp for place in places] == list(range(parts))
        assert ranks[-1] < world_size(sizes)
        if entry.expert is not None:
            assert {place.ep for place in places} == {entry.expert // (GLM.num_experts // sizes.ep)}


def test_an_exchange_ends_before_it_has_more_than_a_bucket():
    found = list(exchanges([parameter(1, size=size) for size in (8, 8, 8, 100, 8)], 32))
    assert [[one.shape[0] for one in each.parameters] for each in found] == [[8, 8], [8], [100], [8]]
    assert [sum(one.from_others for one in each.parameters) for each in found] == [32, 16, 200, 16]


def test_what_rank_0_has_itself_takes_no_place_in_a_bucket():
    (found,) = exchanges([parameter(0, size=1000), parameter(0, 1, size=8), parameter(0, size=1000)], 16)
    assert found.nbytes == {1: 16}
    (found,) = exchanges([parameter(0, size=1000)] * 3, 16)
    assert found.nbytes == {}


def test_parts_of_any_dtype_are_aligned_in_the_message_of_each_rank():
    three = [parameter(1, 2, size=3), parameter(2, size=5, dtype=torch.float32), parameter(1, 2, size=1)]
    (found,) = exchanges(three, 10**6)
    places = [dict(places) for _, places in found.places()]
    assert places == [{1: 0, 2: 0}, {2: ALIGNMENT}, {1: ALIGNMENT, 2: 3 * ALIGNMENT}]
    assert found.nbytes == {1: ALIGNMENT + 2, 2: 3 * ALIGNMENT + 2}


def test_the_number_of_exchanges_follows_bytes_and_not_experts():
    """Two models of one size: few large experts, and many small ones."""
    counts = []
    for experts in (8, 128):
        entries = names.entries(replace(QWEN, num_experts=experts), "local")
        sizes = ((entry, 16 if entry.expert is None else 2**15 // experts) for entry in entries)
        parameters = [Parameter(entry, torch.uint8, (size,), range(1, 2)) for entry, size in sizes]
        counts.append(len(list(exchanges(parameters, 2**15))))
    assert counts[0] == counts[1] > 1
