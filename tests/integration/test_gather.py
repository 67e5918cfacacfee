"""Weights come to rank 0 in few messages, each byte once, bit for bit as when gathered tensor by tensor."""

from __future__ import annotations

import pytest
import torch

from async_rl.config.training import ParallelSection
from async_rl.trainer.parallel import owning_rank
from tests.bench import push
from tests.support import spread_model
from tests.support.spread_model import DEEPSEEK, GLM, QWEN

LAYOUTS = {
    "one rank": {},
    "DP2": {"dp": 2},
    "EP4": {"dp": 4, "ep": 4},
    "TP2 x CP2": {"tp": 2, "cp": 2, "ep": 2},
    "VPP2": {"pp": 2, "vpp": 2},
    "TP2, ETP2": {"tp": 2, "etp": 2},
    "TP2 x EP2 x PP2": {"tp": 2, "ep": 2, "pp": 2},
    "TP2, ETP2 x EP2 x DP4": {"tp": 2, "etp": 2, "ep": 2, "dp": 4},
}
QUICK = ("TP2 x EP2 x PP2",)
SLOW = pytest.mark.slow
MODELS = {"Qwen3-MoE": QWEN, "GLM-4 MoE": GLM, "DeepSeek-V3": DEEPSEEK}
# A layer of the model with 128 experts has 110 kB, which makes several exchanges of it; the default makes one of all.
BUCKETS = (40_000, 512 * 2**20)


def gather(place, model, layout, buckets):
    """Return what a rank has and, for each bucket size, its traffic and the names of what it got wrong."""
    from async_rl.trainer.megatron.gather import GatheredWeights
    from tests.support.tensor_gather import TensorGather
    from tests.support.traffic import counted

    part = spread_model.Rank(model, place.sizes, place.rank, layout)
    expected = TensorGather(part.chunks, model, place, layout, *part.groups())
    packed = [GatheredWeights(part.chunks, model, place, layout, bucket_bytes) for bucket_bytes in buckets]
    traffic, wrong = [], [weights.metadata() for weights in packed if weights.metadata() != expected.metadata()]
    for _ in range(2):  # each time those of then
        part.change()
        reference = list(expected)
        traffic = []
        for weights in packed:
            with counted() as counts:
                got = list(weights)
            traffic.append(counts)
            wrong += [name for (name, tensor), (other, want) in zip(got, reference, strict=True) if name != other]
            wrong += [name for (name, tensor), (_, want) in zip(got, reference, strict=True) if not same(tensor, want)]
            wrong += [name for name, tensor in got if (tensor is None) != (place.rank != 0)]
    return part.held_bytes, traffic, wrong


def gather_by_stage(place, model, layout, bucket_bytes):
    """Return this rank's traffic, what its stage should have, and what was wrong with what it got."""
    from async_rl.trainer.megatron.gather import GatheredWeights
    from tests.support.tensor_gather import TensorGather
    from tests.support.traffic import counted

    part = spread_model.Rank(model, place.sizes, place.rank, layout)
    weights = GatheredWeights(part.chunks, model, place, layout, bucket_bytes, by_stage=True)
    # What every rank can compute by itself.
    expected = {meta.name: meta for meta in TensorGather(part.chunks, model, place, layout, *part.groups()).metadata()}
    with counted() as traffic:
        got = list(weights)
    metadata = weights.by_destination()
    first = owning_rank(place.sizes, place.pp, None)
    wrong = [] if metadata[first] == weights.metadata() else ["metadata"]
    wrong += [meta.name for metas in metadata.values() for meta in metas if meta != expected.pop(meta.name)]
    wrong += list(expected)
    for (name, tensor), meta in zip(got, weights.metadata(), strict=True):
        want = spread_model.whole(model, name) if place.rank == first else None
        if name != meta.name or not same(tensor, want):
            wrong.append(name)
    return traffic, sorted(metadata), wrong


def gather_in_files(place, model, layout, file_bytes, writers, bucket_bytes):
    """Return the ranks that get each file, this rank's share of the bytes, and what was wrong with what it got."""
    from async_rl.trainer.megatron.gather import GatheredWeights

    part = spread_model.Rank(model, place.sizes, place.rank, layout)
    weights = GatheredWeights(part.chunks, model, place, layout, bucket_bytes, file_bytes=file_bytes, writers=writers)
    owners = {meta.name: owner for owner, metas in weights.files() for meta in metas}
    wrong, mine, got = [], 0, list(weights)
    if [name for name, _ in got] != list(owners) or list(owners) != [meta.name for meta in weights.metadata()]:
        wrong.append("the order")
    for name, tensor in got:
        if not same(tensor, spread_model.whole(model, name) if owners[name] == place.rank else None):
            wrong.append(name)
        mine += 0 if tensor is None else tensor.nbytes
    return [owner for owner, _ in weights.files()], mine, wrong


def same(tensor, want):
    if tensor is None or want is None:
        return tensor is want
    return tensor.dtype == want.dtype and torch.equal(tensor, want)


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in LAYOUTS])
def test_gathering_sends_each_byte_once_in_few_messages(name):
    """A model with 128 experts is gathered, and ranks that have the same as another send nothing."""
    results = spread_model.run(gather, ParallelSection(**LAYOUTS[name]), QWEN, "local", BUCKETS)
    missing = spread_model.total_bytes(QWEN, "local") - results[0][0]  # on rank 0
    for index in range(len(BUCKETS)):
        of_ranks = [traffic[index] for _, traffic, _ in results]
        sent = sum(traffic.sent_bytes for traffic in of_ranks)
        assert missing <= sent <= 1.1 * missing
        for (held, _, wrong), traffic in zip(results, of_ranks, strict=True):
            assert wrong == []
            assert traffic.sent_bytes <= 1.1 * held
            assert traffic.calls <= 4 * QWEN.num_layers
            assert traffic.messages <= 4 * QWEN.num_layers
        assert of_ranks[0].sent_bytes == 0


@pytest.mark.parametrize("layout", ["local", pytest.param("transformer_engine", marks=SLOW)])
@pytest.mark.parametrize("model", ["GLM-4 MoE", *(pytest.param(n, marks=SLOW) for n in MODELS if n != "GLM-4 MoE")])
def test_every_family_and_layout_of_names_survives(model, layout):
    sizes = ParallelSection(tp=2, ep=2, pp=2)
    for _, _, wrong in spread_model.run(gather, sizes, MODELS[model], layout, BUCKETS):
        assert wrong == []


@pytest.mark.parametrize(("layout", "firsts"), [("TP2 x EP2 x PP2", [0, 2]), ("VPP2", [0, 1])])
@pytest.mark.slow
def test_each_stage_gathers_its_own_layers_on_its_first_rank(layout, firsts):
    for bucket_bytes in BUCKETS:
        for traffic, destinations, wrong in spread_model.run(
            gather_by_stage, ParallelSection(**LAYOUTS[layout]), QWEN, "local", bucket_bytes
        ):
            assert wrong == []
            assert destinations == firsts
            assert traffic.calls <= 4 * QWEN.num_layers
            if layout == "VPP2":  # each stage is one rank
                assert traffic.calls == 0


@pytest.mark.parametrize("writers", [None, 1])
@pytest.mark.parametrize("layout", ["TP2 x EP2 x PP2", "EP4"])
@pytest.mark.slow
def test_each_rank_gathers_the_files_that_it_writes(layout, writers):
    sizes, file_bytes = ParallelSection(**LAYOUTS[layout]), 100_000
    for bucket_bytes in BUCKETS:
        found = spread_model.run(gather_in_files, sizes, QWEN, "local", file_bytes, writers, bucket_bytes)
        assert all(wrong == [] for *_, wrong in found)
        ranks = writers or len(found)
        for owners, mine, _ in found:
            assert owners == [number % ranks for number in range(len(owners))]
            assert mine <= -(-len(owners) // ranks) * file_bytes
        assert sum(mine for _, mine, _ in found) == spread_model.total_bytes(QWEN, "local")


@pytest.mark.slow
def test_the_benchmark_meets_its_aims_at_a_small_size():
    figures = push.run(4, 16, {"tp2_ep2_pp2": push.LAYOUTS["tp2_ep2_pp2"]})
    assert max(figures["calls_over_limit"], figures["sent_over_limit"]) <= 1
    before, after = figures["tp2_ep2_pp2"]["before"], figures["tp2_ep2_pp2"]["after"]
    assert before["calls_per_layer"] > 40
    assert after["sent_mb"] < before["sent_mb"]
