"""Weights come to rank 0 in few messages, each byte once, bit for bit as when gathered tensor by tensor."""

from __future__ import annotations

import pytest
import torch

from async_rl.config.training import ParallelSection
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


def same(tensor, want):
    if tensor is None or want is None:
        return tensor is want
    return tensor.dtype == want.dtype and torch.equal(tensor, want)


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in LAYOUTS])
def test_gathering_sends_each_byte_once_in_few_messages(name):
    """Of a model with 128 experts. Ranks that have the same as another send nothing."""
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
