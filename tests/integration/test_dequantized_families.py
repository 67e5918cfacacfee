"""A trainer on a converted fp8 checkpoint computes what transformers computes on it, and exports what it was given."""

import json
import shutil

import numpy as np
import pytest

from async_rl.errors import ModelError
from async_rl.models.config import read_model_config
from async_rl.models.dequantize import dequantize, dequantized
from async_rl.models.quantization import Blocks
from tests.support import fp8_folders, model_families
from tests.support.family_probes import family_config, furthest, look, sequences, write_folder
from tests.support.model_families import LAYERS

pytestmark = [pytest.mark.megatron, pytest.mark.slow]

TOLERANCE = 1e-4
# Divides few of the shapes: 64 x 64, 40 x 64, 16 x 128, 96 x 64.
BLOCK = (48, 40)


def quantized(name, folder):
    """Make a family's checkpoint in fp8, and convert it; return the largest relative error, and how many it has.

    Compares every bit of the converted tensors with the published rule.
    """
    import torch
    from safetensors.torch import load_file

    meant = fp8_folders.quantize_folder(model_families.make(name, folder / "made"), folder / "fp8", BLOCK)
    dequantize(folder / "fp8", folder / "bf16", shard_bytes=100_000)
    files = (folder / "bf16").glob("*.safetensors")
    written = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert written.keys() == meant.keys()
    apart = 0.0
    for key, (bits, original) in meant.items():
        if bits is None:
            assert written[key].equal(original), key
            continue
        np.testing.assert_array_equal(written[key].view(torch.uint16).numpy(), bits, err_msg=key)
        apart = max(apart, float((written[key].float() - original).abs().max() / original.abs().max()))
    return apart, sum(bits is not None for bits, _ in meant.values())


def as_transformers():
    """Return whether transformers dequantizes to the same bits weights of whole blocks, the only ones it takes."""
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randn(256, 384) * torch.logspace(-4, 2, 384)
    values, scales = fp8_folders.quantize(weight, (128, 128))
    theirs = Fp8Dequantize(None)._dequantize_one(values, scales, torch.bfloat16)
    return theirs.equal(dequantized(values, scales, Blocks(128, 128)))


def without_its_config(name, folder):
    """Make a family's checkpoint in fp8 whose config.json does not say so, and build a trainer on it."""
    from async_rl.trainer.trainer import Trainer

    fp8_folders.quantize_folder(model_families.make(name, folder / "made"), folder / "fp8", BLOCK)
    shutil.copy(folder / "made" / "config.json", folder / "fp8")
    Trainer(family_config(folder / "fp8", name, "alone"))


def tensors_of(folder):
    from safetensors.torch import load_file

    return {
        key: (str(tensor.dtype), tensor.float().numpy())
        for file in folder.glob("*.safetensors")
        for key, tensor in load_file(file).items()
    }


def test_the_rule_is_that_of_transformers(ranks):
    assert ranks.call(as_transformers)


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Qwen3-MoE"])
def test_a_converted_checkpoint_is_trained_as_transformers_reads_it(ranks, tmp_path, name):
    apart, converted = ranks.call(quantized, name, tmp_path)
    assert converted > 50
    assert 0.01 < apart < 0.1, "e4m3 has four significant bits"
    folder, ids = tmp_path / "bf16", sequences()
    expected = ranks.call(model_families.reference, folder, ids)
    config = family_config(folder, name, "TP2 x EP2 x PP2")
    logprobs, _, gradients, _ = ranks.run(look, config, ids, expected.routing, model_families.token_weights(ids))[0]
    assert furthest(logprobs, expected.logprobs) < TOLERANCE
    scale = max(np.abs(gradient).max() for gradient in expected.gradients.values())
    assert all(np.abs(gradients[key] - each).max() < TOLERANCE * scale for key, each in expected.gradients.items())
    original = ranks.call(model_families.reference, tmp_path / "made", ids)
    assert furthest(original.logprobs, expected.logprobs) > 100 * TOLERANCE, "quantization is not what is measured"


def test_what_a_run_exports_is_in_bfloat16(ranks, tmp_path):
    """Also the layer that predicts further tokens, which is copied from the folder that the run began with."""
    name = "DeepSeek-V3"
    ranks.call(quantized, name, tmp_path)
    config = family_config(tmp_path / "bf16", name, "alone", model__dtype="bfloat16")
    ranks.run(write_folder, config, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    read_model_config(tmp_path / "out")
    began, ended = tensors_of(tmp_path / "bf16"), tensors_of(tmp_path / "out")
    assert ended.keys() == began.keys()
    assert ended[f"model.layers.{LAYERS}.eh_proj.weight"][0] == "torch.bfloat16"
    for key, (dtype, values) in ended.items():
        if began[key][0] == "torch.bfloat16":
            assert dtype == "torch.bfloat16", key
            np.testing.assert_array_equal(values, began[key][1], err_msg=key)


def test_a_trainer_does_not_take_the_values_of_fp8_for_weights(ranks, tmp_path):
    with pytest.raises(ModelError, match=r"self_attn\.q_proj\.weight is F8_E4M3, expected one of F64, F32, F16, BF16"):
        ranks.call(without_its_config, "Qwen3-MoE", tmp_path)
