"""Whether a run fits into GPUs that are not here."""

import json
import re

import pytest

from async_rl.cli import main
from async_rl.config.loading import to_yaml, validate
from async_rl.doctor.estimate import count_parameters, stage_memory
from async_rl.doctor.memory_plan import GB, ClusterSpec, _larger, engine_memory, plan_memory, rank_memory
from async_rl.doctor.parameters import parameters_of, rank_parameters
from async_rl.errors import ConfigError
from async_rl.models.config import read_model_config
from tests.support.model_families import configs
from tests.support.model_folders import QWEN3_4B, QWEN3_30B_A3B, write_config
from tests.unit.test_model_config import DEEPSEEK_V3, MOONLIGHT

SPEC = ClusterSpec(2, 8, "H100", 80)
SHORT = {"recompute": "full", "tokens_per_microbatch": 9216}
PARALLEL = {"dp": 4, "tp": 2, "ep": 8}
BF16 = {"gradient_dtype": "bfloat16"}
MOMENTS = {"first_moment_dtype": "bfloat16", "second_moment_dtype": "bfloat16"}


def settings(folder, model=QWEN3_30B_A3B, *, parallel=PARALLEL, trainer=(), **rollout):
    write_config(folder / "model", model)
    tree = {
        "model": {"path": str(folder / "model")},
        "data": {"train": "train.jsonl", "max_prompt_tokens": 1024},
        "rollout": {"max_response_tokens": 8192, "replicas": 4, "tensor_parallel_size": 2, **rollout},
        "trainer": {"groups_per_step": 64, "tokens_per_microbatch": 32_768, "parallel": parallel, **dict(trainer)},
    }
    return validate(tree)


@pytest.mark.parametrize(("model", "billions"), [(QWEN3_30B_A3B, 30.53), (MOONLIGHT, 15.96)])
def test_parameters_are_as_many_as_published(tmp_path, model, billions):
    found = parameters_of(read_model_config(write_config(tmp_path / "model", model)))
    assert found.total / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("name", configs())
def test_parameters_are_those_of_a_checkpoint_of_each_family(tmp_path, name):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(configs()[name])
    model.save_pretrained(tmp_path)
    shape = read_model_config(tmp_path)
    assert parameters_of(shape) == count_parameters(tmp_path, shape)


def test_the_table_of_a_run_that_fits_adds_up(tmp_path):
    config = settings(tmp_path, trainer=SHORT, parallel=PARALLEL | {"pp": 2})
    text, fits = plan_memory(config, ClusterSpec(3, 8, "H100", 80))
    assert fits
    rank = rank_memory(config, read_model_config(tmp_path / "model"))
    assert f"{(rank.total + 4 * GB) / GB:.1f} of 80" in text
    assert "3 hosts with 8 x H100 of 80 GB: 24 GPUs; needed are 24, 16 for the trainer and 4 x 2 for engines" in text
    assert text.endswith("\nfits\n")


def test_an_engine_by_hand(tmp_path):
    config = settings(tmp_path)
    engine = engine_memory(config, read_model_config(tmp_path / "model"), 80)
    assert engine.weights == 30_532_122_624 * 2 // 2
    assert engine.update == 128 * 3 * 2048 * 768 * 2
    assert engine.kv_token == 48 * 2 * 2 * 128 * 2  # two of the four heads
    assert engine.kv_cache == int(0.85 * 80e9) - engine.weights - 3 * GB


def test_a_data_parallel_engine_by_hand(tmp_path):
    config = settings(tmp_path, data_parallel_size=4)
    model = read_model_config(tmp_path / "model")
    engine = engine_memory(config, model, 80)
    experts = 48 * 128 * 3 * 2048 * 768
    assert engine.weights == (30_532_122_624 - experts) * 2 // 2 + experts * 2 // 8
    assert engine.kv_token == 48 * 2 * 2 * 128 * 2  # of a rank: two of the four heads
    text, _ = plan_memory(config, ClusterSpec(1, 80, "H100", 80))
    assert "4 x 8 for engines" in text
    assert "engine GPU (tensor_parallel_size 2, data_parallel_size 4)" in text
    text, _ = plan_memory(config, ClusterSpec(20, 4, "H100", 80))
    assert "an engine of 8 GPUs needs them on one host, and one has 4; lower rollout.data_parallel_size" in text


def test_an_engine_in_fp8_by_hand(tmp_path):
    config = settings(tmp_path, quantization="fp8_per_block", kv_cache_dtype="fp8")
    engine = engine_memory(config, read_model_config(tmp_path / "model"), 80)
    kept = 2 * 151_936 * 2048 + 48 * 2048 * (2 + 128) + 2048  # embeddings, output layer, norms and routers
    assert engine.weights == (kept * 2 + 30_532_122_624 - kept) // 2
    assert engine.kv_token == 48 * 2 * 2 * 128


def test_what_does_not_fit_is_said_with_what_would(tmp_path):
    text, fits = plan_memory(settings(tmp_path), SPEC)
    assert not fits
    assert (
        "does not fit: a trainer rank does not fit; it would with trainer.recompute full, "
        "trainer.tokens_per_microbatch 9216, trainer.optimizer.gradient_dtype bfloat16, "
        "trainer.optimizer.first_moment_dtype bfloat16, trainer.optimizer.second_moment_dtype bfloat16"
    ) in text


def test_each_setting_that_would_make_it_fit_alone_is_named(tmp_path):
    config = settings(tmp_path, trainer=SHORT)
    text, _ = plan_memory(config, ClusterSpec(1, 8, "H100", 80))
    assert (
        "it would with trainer.optimizer.gradient_dtype bfloat16, trainer.optimizer.first_moment_dtype bfloat16, "
        "trainer.optimizer.second_moment_dtype bfloat16 or with trainer.parallel.pp 2 or with trainer.parallel.tp 4 or "
        "with trainer.parallel.dp 8 or with trainer.optimizer.offload_fraction 1.0"
    ) in text
    assert "does not fit: 16 GPUs are needed, and 1 host with 8 x H100 of 80 GB have 8" in text


@pytest.mark.parametrize(
    ("rollout", "spec", "fault"),
    [
        ({"tensor_parallel_size": 1}, "2x8xL40-48", "an engine's weights; raise rollout.tensor_parallel_size"),
        ({"tensor_parallel_size": 16, "replicas": 1}, "3x8xH100-80", "an engine of 16 GPUs needs them on one host"),
        (
            {"tensor_parallel_size": 32, "hosts_per_engine": 2, "replicas": 1},
            "8x8xH100-80",
            "an engine of 32 GPUs needs 16 on each of 2 hosts, and one has 8; raise rollout.hosts_per_engine",
        ),
        (
            {"tensor_parallel_size": 16, "hosts_per_engine": 4, "replicas": 1},
            "3x8xH100-80",
            "an engine over 4 hosts (rollout.hosts_per_engine), of which there are 3",
        ),
        ({"gpu_memory_utilization": 0.42}, "2x8xH100-80", "one sequence of 9216 tokens into an engine's cache of"),
        ({"gpu_memory_utilization": 0.99}, "2x8xH100-80", "a weight sync, for which an engine needs 1.2 GB beside its"),
    ],
)
def test_engines_that_do_not_fit(tmp_path, rollout, spec, fault):
    assert f"does not fit: {fault}" in plan_memory(settings(tmp_path, **rollout), ClusterSpec.parse(spec))[0]


def shared(folder, utilization, cache_gb):
    """A run of Qwen3-4B whose trainer and engine share a GPU."""
    write_config(folder / "model", QWEN3_4B)
    tree = {
        "model": {"path": str(folder / "model")},
        "data": {"train": "train.jsonl", "max_prompt_tokens": 1024},
        "resources": {"share_gpu": True},
        "rollout": {
            "max_response_tokens": 8192,
            "gpu_memory_utilization": utilization,
            "kv_cache_bytes": cache_gb * GB,
            "return_routed_experts": False,
        },
        "trainer": SHORT | {"router_replay": "off", "optimizer": BF16 | MOMENTS},
    }
    return validate(tree)


def test_a_gpu_that_trainer_and_engine_share(tmp_path):
    text, fits = plan_memory(shared(tmp_path, 0.28, 11), ClusterSpec(1, 1, "H100", 80))
    assert "1 host with 1 x H100 of 80 GB: 1 GPUs; needed is 1, which trainer and engine share" in text
    assert fits, text
    assert re.search(r"total +\d+\.\d of 57\.6\n", text)
    assert f"keys and values, {11 * GB // 147_456} tokens  " in text


@pytest.mark.parametrize(
    ("utilization", "cache_gb", "fault"),
    [
        (
            0.28,
            12,
            "an engine of 23.0 GB into its share of 22.4 GB; lower rollout.kv_cache_bytes, or raise rollout.gpu",
        ),
        (0.28, 1, "one sequence of 9216 tokens into an engine's cache of 6781; raise rollout.kv_cache_bytes"),
        (
            0.5,
            11,
            "a trainer rank does not fit beside the engine; it would with trainer.optimizer.offload_fraction 1.0",
        ),
        (
            0.9,
            11,
            "a trainer rank does not fit beside the engine; lower rollout.gpu_memory_utilization, or set resourc",
        ),
    ],
)
def test_what_does_not_fit_into_a_shared_gpu(tmp_path, utilization, cache_gb, fault):
    text, fits = plan_memory(shared(tmp_path, utilization, cache_gb), ClusterSpec(1, 1, "H100", 80))
    assert not fits
    assert f"does not fit: {fault}" in text


def test_a_model_that_no_setting_fits(tmp_path):
    large = {"hidden_size": 7168, "num_hidden_layers": 64, "n_routed_experts": 256, "moe_intermediate_size": 2048}
    text, _ = plan_memory(settings(tmp_path, DEEPSEEK_V3 | large | {"max_position_embeddings": 163_840}), SPEC)
    assert "a trainer rank does not fit; use more GPUs for the trainer (trainer.parallel)" in text


@pytest.mark.parametrize(
    ("optimizer", "gradient", "state", "update"),
    [
        ({}, 4, 12, 0),
        (BF16, 2, 12, 4),
        (MOMENTS, 4, 2 + 2 + 2, 0),  # of the float32 copy, the half that the bfloat16 parameter lacks
        (BF16 | {"offload_fraction": 0.75}, 2, 3, 0),
    ],
)
def test_settings_of_the_optimizer_by_hand(tmp_path, optimizer, gradient, state, update):
    config = settings(tmp_path, parallel={}, trainer=SHORT | {"optimizer": optimizer})
    rank, count = rank_memory(config, read_model_config(tmp_path / "model")), 30_532_122_624
    assert (rank.parameters, rank.gradients, rank.optimizer) == (2 * count, gradient * count, state * count)
    assert rank.update == update * count


def test_a_plan_is_of_the_fullest_stage(tmp_path):
    uneven = {"pp": 2, "layers_per_stage": [8, 40], "ep": 8, "dp": 8}
    config = settings(tmp_path, parallel=uneven, trainer=SHORT)
    model = read_model_config(tmp_path / "model")
    first, last = (stage_memory(config, model, stage, gpu=True) for stage in (0, 1))
    assert rank_memory(config, model) == last
    assert last.parameters > 3 * first.parameters
    assert (first.logits, last.logits > 0) == (0, True)
    whole = parameters_of(model)
    count = sum(rank_parameters(model, config.trainer.parallel, stage).total for stage in (0, 1))
    assert count == whole.dense + whole.experts // 8


def test_layers_of_one_stage_number_are_dropped_where_more_stages_are_tried(tmp_path):
    config = settings(tmp_path, parallel=PARALLEL | {"pp": 2, "layers_per_stage": [24, 24]}, trainer=SHORT)
    assert _larger(config)[1] == {"trainer.parallel.pp": 4, "trainer.parallel.layers_per_stage": None}


@pytest.mark.parametrize("text", ["", "8xH100", "0x8xH100-80", "4x8x100-80", "4x8xH100", "4x8xH100-80GB", "x" * 300])
def test_a_spec_that_is_none(text):
    with pytest.raises(ConfigError, match=r"^--cluster-spec: .* is not HOSTSxGPUSxNAME-GB, such as 4x8xH100-80"):
        ClusterSpec.parse(text)


def test_the_command(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(settings(tmp_path)))
    assert main(["plan", "memory", str(path), "--cluster-spec", "2x8xH100-80"]) == 1
    assert "trainer rank (dp4 tp2 ep8 etp1 pp1 cp1)" in capsys.readouterr().out
    assert main(["plan", "memory", str(path), "--cluster-spec=2x8xB300-288", "--trainer.recompute", "full"]) == 0
    assert main(["plan", "memory", str(path), "--cluster-spec", "two"]) == 2
    assert json.dumps("two")[1:-1] in capsys.readouterr().err
