"""A checkpoint in block-wise fp8 becomes one in bfloat16, bit for bit by the published rule, or is refused."""

import json
import re
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from async_rl import cli
from async_rl.config.loading import validate
from async_rl.doctor import inputs
from async_rl.driver import eval_command
from async_rl.errors import ConfigError, ModelError, ResourceError
from async_rl.models import checkpoint_files
from async_rl.models import dequantize as module
from async_rl.models.config import read_model_config
from async_rl.models.dequantize import dequantize
from async_rl.models.headers import read_header
from tests.support import fp8_folders
from tests.support.full_disk import room_for
from tests.support.model_folders import SMALLEST

SHAPES = {
    # Neither 128 nor 96 divides these.
    "model.layers.0.self_attn.q_a_proj.weight": (200, 300),
    "model.layers.0.mlp.experts.0.down_proj.weight": (129, 127),
    "model.layers.0.mlp.experts.1.down_proj.weight": (1, 1),
    "model.layers.0.mlp.experts.2.down_proj.weight": (256, 384),
    # A layer that predicts further tokens.
    "model.layers.1.eh_proj.weight": (130, 260),
}
PLAIN = {
    "model.embed_tokens.weight": torch.bfloat16,
    "model.norm.weight": torch.bfloat16,
    "model.layers.0.mlp.gate.e_score_correction_bias": torch.float32,
    "model.layers.0.mlp.gate.weight": torch.float16,
}
Q = "model.layers.0.self_attn.q_a_proj.weight"


def tensors(block=(128, 128), scale_type=torch.float32):
    """Return the tensors of a checkpoint."""
    generator = torch.Generator().manual_seed(3)
    found = {name: torch.randn(64, generator=generator).to(kind) for name, kind in PLAIN.items()}
    for name, shape in SHAPES.items():
        # Of scales that differ between blocks by orders of magnitude.
        weight = torch.randn(shape, generator=generator) * torch.logspace(-4, 2, shape[1])
        found[name], scales = fp8_folders.quantize(weight, block)
        found[f"{name}_scale_inv"] = scales.to(scale_type)
    return found


def smallest(path, found, **changes):
    """Make a checkpoint whose config.json is one of a family."""
    return fp8_folders.write(path, {"model.safetensors": found}, SMALLEST | {"max_position_embeddings": 8192} | changes)


def folder(path, found=None, **changes):
    """Make a checkpoint of three files; the scales of a weight may be in another file than the weight."""
    found = tensors() if found is None else found
    parts = {f"model-{n}-of-3.safetensors": dict(list(found.items())[n::3]) for n in range(3)}
    values = {"architectures": ["DeepseekV3ForCausalLM"], "torch_dtype": "bfloat16", "vocab_size": 7}
    return fp8_folders.write(path, parts, values | {"quantization_config": fp8_folders.config(**changes)})


def everything(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("block", "scale_type"),
    [((128, 128), torch.float32), ((128, 128), torch.bfloat16), ((64, 96), torch.float32), ((1, 128), torch.float32)],
    ids=["DeepSeek-V3", "Qwen3", "64 x 96", "rows"],
)
def test_every_weight_is_the_published_rule_bit_for_bit(tmp_path, block, scale_type):
    found = tensors(block, scale_type)
    source = folder(tmp_path / "fp8", found, weight_block_size=list(block))
    dequantize(source, tmp_path / "out")
    written = everything(tmp_path / "out")
    assert written.keys() == SHAPES.keys() | PLAIN.keys()
    for name in SHAPES:
        assert written[name].dtype is torch.bfloat16
        expected = fp8_folders.expected_bits(found[name], found[f"{name}_scale_inv"], block)
        np.testing.assert_array_equal(written[name].view(torch.uint16).numpy(), expected, err_msg=name)
    for name, kind in PLAIN.items():
        assert written[name].dtype is kind
        assert torch.equal(written[name], found[name])


def test_every_code_of_e4m3_is_decoded(tmp_path):
    codes = torch.arange(256, dtype=torch.uint8).reshape(2, 128).view(torch.float8_e4m3fn)
    scales = torch.tensor([[0.75]])
    found = {"a.weight": codes, "a.weight_scale_inv": scales}
    dequantize(folder(tmp_path / "fp8", found), tmp_path / "out")
    got = everything(tmp_path / "out")["a.weight"]
    # Of a NaN the bits are free.
    expected = torch.from_numpy(fp8_folders.expected_bits(codes, scales, (128, 128))).view(torch.bfloat16)
    assert int(got.isnan().sum()) == 2
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_the_folder_is_a_checkpoint_in_bfloat16(tmp_path):
    source = folder(tmp_path / "fp8")
    (source / "inference").mkdir()
    plan = dequantize(source, tmp_path / "models" / "out", shard_bytes=100_000)
    out = tmp_path / "models" / "out"
    assert json.loads((out / "config.json").read_text()) == {
        "architectures": ["DeepseekV3ForCausalLM"],
        "torch_dtype": "bfloat16",
        "vocab_size": 7,
    }
    assert (out / "tokenizer.json").read_text() == '{"version": "1.0"}'
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    in_files = {name: file.name for file in out.glob("*.safetensors") for name in read_header(file)}
    assert weight_map == in_files
    assert len(set(weight_map.values())) > 1
    assert (plan.quantized, plan.copied) == (len(SHAPES), len(PLAIN))
    assert plan.bytes_written == sum(tensor.nbytes for tensor in everything(out).values())


def test_no_more_than_one_written_file_is_in_memory(tmp_path, monkeypatch):
    alive: list[weakref.ref] = []
    sizes = []
    save = checkpoint_files.save_file

    def watched(shard, *arguments, **named):
        assert not [each for each in alive if each() is not None], "tensors of an earlier file are still there"
        alive[:] = [weakref.ref(tensor) for tensor in shard.values()]
        sizes.append(sum(tensor.nbytes for tensor in shard.values()))
        save(shard, *arguments, **named)

    monkeypatch.setattr(checkpoint_files, "save_file", watched)
    largest = 2 * 256 * 384
    dequantize(folder(tmp_path / "fp8"), tmp_path / "out", shard_bytes=largest)
    assert len(sizes) > 1
    assert max(sizes) <= largest


def test_no_weight_exists_in_float32(monkeypatch):
    """Products in float32 are as high as one block, whatever the weight."""
    heights = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, new: (heights.append(len(new)), copy(to, new))[1])
    values, scales = fp8_folders.quantize(torch.randn(300, 10), (128, 128))
    module.dequantized(values, scales, module.Blocks(128, 128))
    assert heights == [128, 128, 44]


# ---- what is refused ----


def without(name):
    return lambda found: found.pop(name)


def replaced(name, change):
    return lambda found: found.update({name: change(found[name])})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(f"{Q}_scale_inv"), f"{Q}_scale_inv is missing"),
        (without(Q), f"{Q}_scale_inv is surplus: {Q} is missing"),
        (replaced(Q, lambda t: t.to(torch.bfloat16)), f"{Q}_scale_inv is surplus: {Q} is BF16"),
        (replaced(f"{Q}_scale_inv", lambda t: t[:1]), f"{Q}_scale_inv is [1, 3], expected [2, 3]"),
        (replaced(f"{Q}_scale_inv", lambda t: t.half()), f"{Q}_scale_inv is F16, expected F32 or BF16"),
        (replaced(Q, lambda t: t.float().to(torch.float8_e5m2)), f"{Q} is F8_E5M2, expected F8_E4M3"),
        (replaced(Q, lambda t: t.reshape(2, 100, 300)), f"{Q} is [2, 100, 300], expected two dimensions"),
        (replaced("model.norm.weight", lambda t: t.to(torch.int8)), "model.norm.weight is I8, expected F8_E4M3 or one"),
    ],
)
def test_weights_that_are_not_what_config_json_says_are_named(tmp_path, change, words):
    found = tensors()
    change(found)
    source = folder(tmp_path / "fp8", found)
    with pytest.raises(ModelError) as caught:
        dequantize(source, tmp_path / "out")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


REFUSED = [
    ({"weight_block_size": None}, "weight_block_size is None, expected two positive integers"),
    ({"weight_block_size": [128]}, "weight_block_size is [128]"),
    ({"weight_block_size": [128, 0]}, "weight_block_size is [128, 0]"),
    ({"weight_block_size": [128, True]}, "weight_block_size is [128, True]"),
    ({"weight_block_size": [128, 64.0]}, "weight_block_size is [128, 64.0]"),
    ({"weight_block_size": 128}, "weight_block_size is 128"),
    ({"fmt": "e5m2"}, "fmt is 'e5m2', and only 'e4m3' can be converted"),
    ({"activation_scheme": "static"}, "activation_scheme is 'static', and only 'dynamic'"),
    *(
        ({"quant_method": name}, f"quant_method is {name!r}, and only 'fp8'")
        for name in ("awq", "gptq", "compressed-tensors", "mxfp4", "bitsandbytes", None)
    ),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_other_quantizations_are_named(tmp_path, changes, words):
    source = folder(tmp_path / "fp8", **changes)
    for read in (read_model_config, lambda path: dequantize(path, tmp_path / "out")):
        with pytest.raises(ModelError) as caught:
            read(source)
        assert words in str(caught.value)
        assert "quantization_config" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_config_of_compressed_tensors_may_have_another_name(tmp_path):
    source = folder(tmp_path / "fp8")
    values = json.loads((source / "config.json").read_text())
    values["compression_config"] = {"quant_method": "compressed-tensors"}
    del values["quantization_config"]
    (source / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"compression_config: quant_method is 'compressed-tensors'"):
        read_model_config(source)


def test_fp8_without_a_quantization_config_is_named(tmp_path):
    source = folder(tmp_path / "fp8")
    (source / "config.json").write_text('{"vocab_size": 7}')
    with pytest.raises(ModelError, match=r"\.weight is F8_E4M3; .*but config\.json has no quantization_config"):
        dequantize(source, tmp_path / "out")


def test_a_checkpoint_that_is_not_quantized_needs_no_conversion(tmp_path):
    dequantize(folder(tmp_path / "fp8"), tmp_path / "out")
    with pytest.raises(ModelError, match=r"out is not quantized: .* set model\.path to it as it is"):
        dequantize(tmp_path / "out", tmp_path / "again")


def test_a_file_that_is_cut_short_is_named(tmp_path):
    source = folder(tmp_path / "fp8")
    file = source / "model-1-of-3.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model-1-of-3\.safetensors has \d+ bytes, and its header describes \d+"):
        dequantize(source, tmp_path / "out")
    file.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match=r"model-1-of-3\.safetensors is not in safetensors format"):
        dequantize(source, tmp_path / "out")


def test_a_folder_that_is_not_empty_is_not_written_to(tmp_path):
    source = folder(tmp_path / "fp8")
    for out in (source, source / "config.json"):
        with pytest.raises(ConfigError, match="exists and is not an empty folder; name another one"):
            dequantize(source, out)
    (tmp_path / "empty").mkdir()
    dequantize(source, tmp_path / "empty")


# ---- a disk without room ----


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    source = folder(tmp_path / "fp8")
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError, match=rf"out takes 0\.0 GB, and {tmp_path} has 0\.0 GB free; name a folder on"):
        dequantize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("room", [3000, 100_000, 300_000])
def test_what_was_written_is_removed_when_the_disk_fills_up(tmp_path, room, exists):
    source, out = folder(tmp_path / "fp8"), tmp_path / "out"
    if exists:
        out.mkdir()
    if room == 300_000:  # where the weights fit, and a file beside them does not
        (source / "tokenizer.json").write_bytes(bytes(10**6))
    with room_for(room), pytest.raises(ResourceError) as caught:
        dequantize(source, out, shard_bytes=200_000)
    assert "large" in str(caught.value), "the kernel's own words"
    assert str(caught.value).endswith("; what was written has been removed")
    assert "\n" not in str(caught.value)
    assert out.exists() == exists
    assert not exists or not list(out.iterdir())


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(plan, out):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_copy_others", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dequantize(folder(tmp_path / "fp8"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_was_not_finished_is_no_checkpoint(tmp_path, monkeypatch):
    """As after kill -9: without a config.json no program reads it."""
    monkeypatch.setattr(module, "_remove", lambda out, created: "")
    monkeypatch.setattr(module.shutil, "copy2", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dequantize(folder(tmp_path / "fp8"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    with pytest.raises(ModelError, match=r"config\.json: No such file or directory"):
        read_model_config(tmp_path / "out")


# ---- the command line ----


def test_the_user_is_told_what_to_run_and_runs_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "my models" / "V3")
    settings = tmp_path / "run.yaml"
    settings.write_text("name: a\nmodel: {path: my models/V3}\ndata: {train: a.jsonl}\n")
    cli.main(["plan", "memory", str(settings), "--cluster-spec", "1x1xH100-80"])
    (told,) = capsys.readouterr().err.splitlines()
    command = "async-rl dequantize 'my models/V3' 'my models/V3-bf16'"
    assert "block-wise fp8" in told
    assert told.endswith(f"run {command} and set model.path to my models/V3-bf16")
    assert cli.main(["dequantize", "my models/V3", "my models/V3-bf16"]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[0] == "reading model-0-of-3.safetensors, 1 of 3"
    assert said.out == (
        "converted 5 weights of my models/V3 to bfloat16 and copied 4; set model.path to my models/V3-bf16\n"
    )
    assert cli.main(["dequantize", "my models/V3", "my models/V3-bf16"]) == 2
    assert capsys.readouterr().err == (
        "async-rl: my models/V3-bf16 exists and is not an empty folder; name another one\n"
    )
    assert cli.main(["dequantize", "absent", "out"]) == 2
    assert cli.main(["dequantize", "my models/V3", "out", "--model.dtype", "float32"]) == 2
    assert "dequantize has no option --model.dtype" in capsys.readouterr().err


def test_fp8_is_refused_before_anything_loads(tmp_path):
    """Also where config.json does not mention it, by doctor, which each run asks first, and by an evaluation."""
    source = smallest(tmp_path / "V3", tensors(), quantization_config=fp8_folders.config())
    hidden = smallest(tmp_path / "hidden", tensors())
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    told = {
        source: f"in block-wise fp8, .* run async-rl dequantize {source} {source}-bf16 and set model.path to",
        hidden: r"\.weight is F8_E4M3; .* but config\.json has no quantization_config",
    }
    for path, words in told.items():
        config = validate({"name": "a", "model": {"path": str(path)}, "data": {"train": str(tmp_path / "rows.jsonl")}})
        (check,) = inputs.model(config)
        assert check.status == "FAIL"
        assert re.search(words, check.detail)
        with pytest.raises(ModelError, match=words):
            eval_command.run(
                validate(
                    {
                        "name": "a",
                        "runs": str(tmp_path / "runs"),
                        "model": {"path": str(path)},
                        "data": {"train": "train.jsonl", "eval": str(tmp_path / "rows.jsonl")},
                    }
                ),
                None,
            )
    assert not (tmp_path / "runs").exists()
