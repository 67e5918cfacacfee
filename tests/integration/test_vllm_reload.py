"""Both ends of the shm backend: when weights are sent, and what vLLM leaves undone in a reload on the CPU, repaired."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.weight_transfer.base import ParamMeta
from vllm.model_executor.layers import vocab_parallel_embedding
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from async_rl.errors import WeightSyncError
from async_rl.weights.shm_file import Announcement, TensorMeta, read
from async_rl.weights.vllm.head_repack import packed_without_weights, repack_tied
from async_rl.weights.vllm.reload import Reload
from async_rl.weights.vllm.shm import ShmTrainerInitInfo, ShmTrainerWeightTransferEngine

# vLLM pads a vocabulary to a multiple of 64, so one of these is loaded whole and one in part.
VOCABULARIES = (128, 100)
HIDDEN = 64


class Model(torch.nn.Module):
    """Embeddings and an output layer, built and loaded as vLLM does it."""

    def __init__(self, vocab: int, *, tied: bool) -> None:
        super().__init__()
        self.embed_tokens = vocab_parallel_embedding.VocabParallelEmbedding(vocab, HIDDEN)
        self.lm_head = vocab_parallel_embedding.ParallelLMHead(vocab, HIDDEN)
        if tied:
            self.lm_head = self.lm_head.tie_weights(self.embed_tokens)
        record_metadata_for_reloading(self)

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in dict(weights).items():
            parameter = self.get_parameter(name)
            parameter.weight_loader(parameter, tensor)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head.quant_method.apply(self.lm_head, hidden)


@pytest.fixture
def make():
    """Makes a model that has ``first`` as its weights."""
    alone = {"get_tensor_model_parallel_rank": lambda: 0, "get_tensor_model_parallel_world_size": lambda: 1}
    with set_current_vllm_config(VllmConfig()), mock.patch.multiple(vocab_parallel_embedding, **alone):

        def made(vocab, first, *, tied):
            model = Model(vocab, tied=tied)
            model.load_weights(first)
            for layer in (model.embed_tokens, model.lm_head):
                layer.quant_method.process_weights_after_loading(layer)
            return model

        yield made


def weights(vocab, seed, *, tied):
    draw = functools.partial(torch.randn, vocab, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return {"embed_tokens.weight": draw()} | ({} if tied else {"lm_head.weight": draw()})


@torch.no_grad()
def push(model, tensors, repair=repack_tied):
    initialize_layerwise_reload(model)
    model.load_weights(tensors)
    unloaded = packed_without_weights(model)
    finalize_layerwise_reload(model, mock.Mock(dtype=torch.float32))
    return repair(model, unloaded)


def far_off(model, tensors):
    """How far the model's logits are from those of ``tensors``."""
    output = tensors.get("lm_head.weight", tensors["embed_tokens.weight"])
    hidden = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(9))
    return float((model.logits(hidden)[:, : len(output)] - hidden @ output.T).abs().max())


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("tied", [True, False])
def test_each_push_reaches_the_output_layer(make, vocab, tied):
    model = make(vocab, weights(vocab, 0, tied=tied), tied=tied)
    assert far_off(model, weights(vocab, 0, tied=tied)) < 1e-4
    for seed in (1, 2, 3):
        pushed = weights(vocab, seed, tied=tied)
        assert push(model, pushed) == int(tied)
        assert far_off(model, pushed) < 1e-4
        assert (model.lm_head.weight is model.embed_tokens.weight) is tied


def test_vllm_still_keeps_the_packed_output_layer_of_a_tied_model(make):
    """Why ``head_repack`` exists. When this fails, vLLM packs it by itself and the file can go."""
    model = make(128, weights(128, 0, tied=True), tied=True)
    push(model, weights(128, 1, tied=True), repair=lambda *_: 0)
    assert far_off(model, weights(128, 1, tied=True)) > 1.0
    assert far_off(model, weights(128, 0, tied=True)) < 1e-4


@pytest.mark.parametrize("missing", ["lm_head.weight", "embed_tokens.weight"])
def test_an_output_layer_without_weights_is_refused(make, missing):
    model = make(128, weights(128, 0, tied=False), tied=False)
    pushed = weights(128, 1, tied=False)
    del pushed[missing]
    with pytest.raises(WeightSyncError, match=f"no weights for {missing.removesuffix('.weight')}"):
        push(model, pushed)


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_later_reload_repeats_the_calls_of_the_first_and_makes_the_same_model(make, vocab, tied):
    model, whole = (make(vocab, weights(vocab, 0, tied=tied), tied=tied) for _ in range(2))
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    subject = Reload(model, mock.Mock(dtype=torch.float32))
    subject.load(list(weights(vocab, 1, tied=tied).items()))
    with mock.patch.object(Model, "load_weights", side_effect=AssertionError("the model was searched again")):
        for seed in (2, 3):
            subject.load(list(weights(vocab, seed, tied=tied).items()))
    push(whole, weights(vocab, 3, tied=tied))
    hidden = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(9))
    assert torch.equal(model.logits(hidden), whole.logits(hidden))
    assert torch.equal(model.embed_tokens.weight, whole.embed_tokens.weight)
    assert (model.lm_head.weight is model.embed_tokens.weight) is tied
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


def test_a_reload_whose_loaders_get_copies_is_whole_each_time(make):
    model = make(128, weights(128, 0, tied=False), tied=False)
    load, loads = model.load_weights, []

    def copies(tensors):
        loads.append(len(tensors))
        load({name: tensor.clone() for name, tensor in tensors})

    model.load_weights = copies
    subject = Reload(model, mock.Mock(dtype=torch.float32))
    for seed in (1, 2):
        subject.load(list(weights(128, seed, tied=False).items()))
    assert loads == [2, 2]
    assert far_off(model, weights(128, 2, tied=False)) < 1e-4


def test_parts_of_tensors_are_found_again(make):
    """As loaders of fused experts get them: halves of one tensor."""
    model = make(128, weights(128, 0, tied=False), tied=False)
    load = model.load_weights
    model.load_weights = lambda tensors: load(
        dict(zip(("embed_tokens.weight", "lm_head.weight"), tensors[0][1].chunk(2), strict=True))
    )
    subject = Reload(model, mock.Mock(dtype=torch.float32))
    for seed in (1, 2):
        pushed = weights(128, seed, tied=False)
        subject.load([("both", torch.cat(list(pushed.values())))])
        model.load_weights = None
    assert far_off(model, pushed) < 1e-4
    assert torch.equal(model.embed_tokens.weight, pushed["embed_tokens.weight"])


class Client:
    """The engines, as the trainer's end calls them."""

    def __init__(self):
        self.calls, self.received = [], None

    def init_weight_transfer_engine(self, info):
        self.table = [TensorMeta(name, dtype, tuple(shape)) for name, dtype, shape in info["table"]]

    def start_weight_update(self):
        self.calls.append("start")

    def update_weights(self, announcement):
        self.received = {name: tensor.clone() for name, tensor in read(Announcement(**announcement), self.table)}

    def finish_weight_update(self):
        self.calls.append("finish")


class Source:
    """One tensor, whose value the trainer changes; counts how often it is gathered."""

    def __init__(self):
        self.value, self.gathered = 0.0, 0

    def metadata(self):
        return [ParamMeta("w", torch.float32, (3,))]

    def __iter__(self):
        self.gathered += 1
        return iter([("w", torch.full((3,), self.value))])


def test_weights_are_gathered_once_and_before_the_engines_are_called():
    source, client = Source(), Client()
    sender = ShmTrainerWeightTransferEngine.trainer_init(ShmTrainerInitInfo(rank=0), client=client, source=source)
    try:
        source.value = 1.0
        sender.stage()
        assert (source.gathered, client.calls) == (1, [])
        sender.send_weights()
        assert (source.gathered, client.calls) == (1, ["start", "finish"])
        assert client.received["w"].tolist() == [1.0] * 3
        source.value = 2.0
        sender.send_weights()  # nothing is staged: what was sent before is not sent again
        assert (source.gathered, client.received["w"].tolist()) == (2, [2.0] * 3)
    finally:
        sender.shutdown()
