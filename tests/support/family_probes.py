"""What the tests of model families ask a trainer, and the layouts that they ask it in."""

import numpy as np

from tests.support.model_families import DENSE, VOCAB
from tests.support.ranks import run_config

# Of log-probs, where products of float32 are in TF32, as Transformer Engine's are on GPUs: twice what test_gpu_layers
# measures with products that are rounded like them, for kernels that add in another order.
TF32_TOLERANCE = 1.6e-2

LAYOUTS = {
    "alone": {},
    "TP2": {"tp": 2},
    "CP2": {"cp": 2},
    "TP2 x EP2 x PP2": {"tp": 2, "ep": 2, "pp": 2},
}


def family_config(folder, name, layout, **settings):
    """Make the settings for a family in one of the layouts; a dense model has no experts to spread."""
    sizes = {f"trainer__parallel__{key}": size for key, size in LAYOUTS[layout].items()}
    if name in DENSE:
        sizes.pop("trainer__parallel__ep", None)
    settings = {"trainer__router_replay": "off", "data__max_prompt_tokens": 200} | settings
    return run_config(folder, **sizes, **settings)


class MadeOnce(dict):
    """Makes what is asked for by name, when it is first asked for."""

    def __init__(self, make):
        self.make = make

    def __missing__(self, name):
        self[name] = self.make(name)
        return self[name]


def sequences():
    rng = np.random.default_rng(5)
    # The longest is beyond DeepSeek-V3's 64 positions before yarn stretches them.
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in (7, 100, 2, 33)]


def look(trainer, ids, routing, weights):
    """Return log-probs, native routing, and gradients of -sum of weight x log-prob by Hugging Face names on rank 0.

    The last value is the norm of the whole gradient.
    """
    import torch

    from async_rl.trainer.logprobs import token_logprobs
    from async_rl.trainer.megatron.optimizer import gradient_norm
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
    norm = gradient_norm([parameter for chunk in trainer._chunks for parameter in chunk.parameters()])
    for chunk in trainer._chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad.to(torch.float32)
    gradients = {name: None if tensor is None else tensor.numpy().copy() for name, tensor in trainer.weights()}
    return logprobs, native, gradients, norm


def write_folder(trainer, folder):
    trainer.save_hf(folder, file_bytes=100_000)  # so that each rank writes some


def furthest(found, expected):
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True) if a.size)


def assert_same_tensors(folder, other):
    """Compare two Hugging Face folders bit for bit."""
    from safetensors.numpy import load_file

    before, after = (
        {key: value for file in one.glob("*.safetensors") for key, value in load_file(file).items()}
        for one in (folder, other)
    )
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype, key
        np.testing.assert_array_equal(after[key], value, err_msg=key)
