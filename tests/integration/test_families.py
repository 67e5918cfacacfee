"""Each model family computes what transformers does, alone and spread over ranks.

Compared are log-probs, gradients with routing forced equal, and weights loaded and exported again. Real Megatron,
float32, CPU.

`pytest -s` prints the table that docs/evidence/trainer.md quotes.
"""

import itertools
import shutil

import numpy as np
import pytest

from tests.support import model_families
from tests.support.model_families import DENSE, FAMILIES, VOCAB
from tests.support.ranks import run_config

pytestmark = pytest.mark.megatron

TOLERANCE = 1e-5
LAYOUTS = {
    "alone": {},
    "TP2": {"tp": 2},
    "CP2": {"cp": 2},
    "TP2 x EP2 x PP2": {"tp": 2, "ep": 2, "pp": 2},
}
# `make test` has the family whose attention no other test has; layouts are in test_layouts. `make test-all` has all.
QUICK = {("DeepSeek-V3", "alone")}


def cases(layouts):
    """Every family in every one of these layouts."""
    pairs = itertools.product(FAMILIES, layouts)
    return [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in pairs]


class MadeOnce(dict):
    """Makes what is asked for by name, when it is first asked for."""

    def __init__(self, make):
        self.make = make

    def __missing__(self, name):
        self[name] = self.make(name)
        return self[name]


@pytest.fixture(scope="module")
def folders(ranks, tmp_path_factory):
    root = tmp_path_factory.mktemp("families")

    def make(name):
        ranks.call(model_families.make, name, root / name)
        return root / name

    yield MadeOnce(make)
    shutil.rmtree(root)


def sequences():
    rng = np.random.default_rng(5)
    # The longest is beyond DeepSeek-V3's 64 positions before yarn stretches them.
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in (7, 100, 2, 33)]


@pytest.fixture(scope="module")
def references(ranks, folders):
    return MadeOnce(lambda name: ranks.call(model_families.reference, folders[name], sequences()))


def look(trainer, ids, routing, weights):
    """Return log-probs, native routing, and gradients of -sum of weight x log-prob by Hugging Face names on rank 0."""
    from async_rl.trainer.logprobs import token_logprobs
    from async_rl.trainer.packing import Packer
    from async_rl.trainer.samples import plain_sample

    logprobs, native = trainer.logprobs(ids, routing), trainer.native_routing(ids)
    samples = [plain_sample(str(i), one) for i, one in enumerate(ids)]
    # The weights travel as advantages do.
    samples = [sample.with_advantages(w) for sample, w in zip(samples, weights, strict=True)]
    if routing is not None:
        samples = [sample.with_routed_experts(rows) for sample, rows in zip(samples, routing, strict=True)]
    spec = None if routing is None else trainer._model_config.routing_spec
    packer = Packer.of(trainer._config.trainer, spec)
    batches = packer.add(samples) + packer.flush()

    def loss(tensors, logits):
        values, _ = token_logprobs(logits, tensors["labels"], 1.0, trainer._groups.vocabulary)
        return -(values * tensors["advantages"] * tensors["loss_mask"]).sum(), None

    trainer._executor.zero_gradients()
    trainer._executor.accumulate(batches, loss, filler=packer.filler())
    trainer._executor.finish_gradients(1.0)
    import torch

    for chunk in trainer._chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad.to(torch.float32)
    gradients = {name: None if tensor is None else tensor.numpy().copy() for name, tensor in trainer.weights()}
    return logprobs, native, gradients


def largest(found, expected):
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True) if a.size)


@pytest.mark.parametrize(("name", "layout"), cases(LAYOUTS))
def test_a_family_computes_what_transformers_computes(ranks, folders, references, name, layout):
    expected, ids = references[name], sequences()
    sizes = {f"trainer__parallel__{key}": size for key, size in LAYOUTS[layout].items()}
    if name in DENSE:
        sizes.pop("trainer__parallel__ep", None)
    routing = None if name in DENSE else expected.routing
    config = run_config(folders[name], **sizes, trainer__router_replay="off", data__max_prompt_tokens=200)
    logprobs, native, gradients = ranks.run(look, config, ids, routing, model_families.token_weights(ids))[0]
    apart = largest(logprobs, expected.logprobs)
    scale = max(np.abs(gradient).max() for gradient in expected.gradients.values())
    worst = {key: np.abs(gradients[key] - gradient).max() / scale for key, gradient in expected.gradients.items()}
    print(f"\n  {name:12} {layout:16} log-probs {apart:.1e} gradients {max(worst.values()):.1e}")
    # The bias that balances load has no gradient, and transformers counts it among the buffers.
    assert {key for key in gradients if "e_score_correction_bias" not in key} == expected.gradients.keys()
    assert apart < TOLERANCE
    assert max(worst.values()) < TOLERANCE, max(worst, key=worst.get)
    if name not in DENSE:
        same = np.concatenate([np.sort(a, -1) == np.sort(b, -1) for a, b in zip(native, routing, strict=True)])
        assert same.all(-1).mean() > 0.98, "the routers agree too, but for rounding"


def export(trainer, folder):
    trainer.save_hf(folder)


@pytest.mark.parametrize(("name", "layout"), cases(["alone", "TP2 x EP2 x PP2"]))
def test_there_and_back_is_bit_exact(ranks, folders, tmp_path, name, layout):
    from safetensors.numpy import load_file

    sizes = {f"trainer__parallel__{key}": size for key, size in LAYOUTS[layout].items()}
    if name in DENSE:
        sizes.pop("trainer__parallel__ep", None)
    ranks.run(export, run_config(folders[name], **sizes), tmp_path / "out")
    before, after = (
        {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
        for folder in (folders[name], tmp_path / "out")
    )
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        np.testing.assert_array_equal(after[key], value, err_msg=key)
    again = ranks.call(model_families.reference, tmp_path / "out", sequences()[:1])
    assert largest(again.logprobs, ranks.call(model_families.reference, folders[name], sequences()[:1]).logprobs) == 0
