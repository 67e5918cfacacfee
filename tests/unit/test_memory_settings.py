"""Settings for memory that contradict each other, or that a CPU cannot have."""

import pytest

from async_rl.config.loading import validate
from async_rl.errors import ConfigError, ModelError
from async_rl.models.config import check_run, read_model_config
from tests.support.model_folders import QWEN3_30B_A3B, write_config


def settings(*, dtype="bfloat16", device="auto", folder="model", **trainer):
    return validate(
        {
            "model": {"path": str(folder), "dtype": dtype},
            "data": {"train": "train.jsonl", "max_prompt_tokens": 64},
            "resources": {"device": device},
            "trainer": trainer,
        }
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recompute_num_layers": 2}, ["recompute_num_layers is 2", "trainer.recompute is none", "set trainer.recomp"]),
        ({"recompute": "selective", "recompute_method": "block"}, ["recompute_method is block", "is selective"]),
        ({"dtype": "float32", "optimizer": {"gradient_dtype": "bfloat16"}}, ["gradient_dtype", "model.dtype is fl"]),
        (
            {"optimizer": {"offload_fraction": 0.5, "second_moment_dtype": "bfloat16"}},
            ["second_moment_dtype is bfloat16", "offload_fraction is 0.5"],
        ),
        ({"offload_activations": ["attn_proj"]}, ["attn_proj without core_attn"]),
        ({"offload_activations": ["moe_act"], "recompute": "full"}, ["offload_activations", "recompute is full"]),
        ({"moe_dispatcher": "allgather", "parallel": {"pp": 2}}, ["moe_dispatcher is allgather", "pp is 2"]),
        (
            {"device": "cpu", "optimizer": {"first_moment_dtype": "bfloat16"}},
            ["first_moment_dtype is bfloat16", "GPUs alone", "set it to float32"],
        ),
        ({"device": "cpu", "optimizer": {"offload_fraction": 1}}, ["offload_fraction is 1.0, which works on GPUs"]),
        ({"device": "cpu", "offload_activations": ["core_attn"]}, ["offload_activations is ['core_attn']", "to []"]),
        ({"device": "cpu", "moe_dispatcher": "flex"}, ["moe_dispatcher is flex", "set it to auto"]),
    ],
)
def test_settings_for_memory_that_cannot_work_are_refused(changes, words):
    with pytest.raises(ConfigError) as caught:
        settings(**changes)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"recompute": "full", "recompute_method": "block", "recompute_num_layers": 7},
        {"optimizer": {"gradient_dtype": "bfloat16"}, "device": "cpu"},
        {"optimizer": {"offload_fraction": 0.5}, "device": "cuda"},
        {"offload_activations": ["core_attn", "attn_proj"], "moe_dispatcher": "flex"},
    ],
)
def test_settings_for_memory_that_work(changes):
    settings(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainer": {"parallel": {"pp": 2}}}, "trainer.parallel is 2"),
        ({"rollout": {"replicas": 2}}, "rollout.replicas is 2"),
        ({"rollout": {"replicas": {"min": 1, "max": 1}}}, "rollout.replicas is min=1 max=1"),
        ({"rollout": {"tensor_parallel_size": 2}}, "rollout.tensor_parallel_size is 2"),
        ({"rollout": {"data_parallel_size": 2}}, "rollout.data_parallel_size is 2"),
        ({"rollout": {"engine": "sglang"}}, "rollout.engine has sglang"),
        ({"sync": {"backend": "nccl"}}, "sync.backend is nccl, which takes no two processes on one GPU"),
        ({"resources": {"share_gpu": True, "device": "cpu"}}, "share_gpu is True, which works on GPUs alone"),
    ],
)
def test_what_cannot_share_a_gpu_is_refused(changes, words):
    tree = {"model": {"path": "m"}, "data": {"train": "t"}, "resources": {"share_gpu": True}}
    validate(tree)
    with pytest.raises(ConfigError) as caught:
        validate(tree | changes)
    assert words in str(caught.value)


def test_layers_computed_again_together_must_divide_every_stage(tmp_path):
    folder = write_config(tmp_path / "model", QWEN3_30B_A3B)
    for pp, faulty in ((2, None), (5, 9)):  # 48 layers: 24 each; 9, 10, 10, 10, 9
        config = settings(folder=folder, recompute="full", recompute_num_layers=2, parallel={"pp": pp})
        if faulty is None:
            check_run(config, read_model_config(folder))
            continue
        with pytest.raises(ModelError, match=f"recompute_num_layers is 2, which does not divide the {faulty} layers"):
            check_run(config, read_model_config(folder))
