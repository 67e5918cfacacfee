"""Fields of Megatron and the engines that are passed on: known ones, and none that a setting of ours decides."""

import sys
from types import SimpleNamespace

import pytest

from async_rl.config import pass_through as owned
from async_rl.config.loading import parse_overrides, validate
from async_rl.doctor import pass_through
from async_rl.doctor.pass_through import DDP, SGLANG, TRANSFORMER, VLLM, Source, fields, folders
from async_rl.errors import ConfigError
from async_rl.rollout.engine.sglang.server import arguments
from async_rl.rollout.engine.vllm.process import engine_args
from tests.unit.test_vllm_process import DENSE


def settings(engine="vllm", *, megatron=None, ddp=None, args=None, **rollout):
    return validate(
        {
            "model": {"path": "m"},
            "data": {"train": "t"},
            "trainer": {"megatron": megatron or {}, "ddp": ddp or {}},
            "rollout": {"engine": engine, "engine_args": args or {}, **rollout},
        }
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"megatron": {"num_layers": 3}}, ["trainer.megatron.num_layers is 3", "model.path"]),
        ({"megatron": {"tensor_model_parallel_size": 2}}, ["trainer.parallel.tp decides it"]),
        ({"megatron": {"bf16": True}}, ["model.dtype decides it"]),
        ({"megatron": {"moe_enable_routing_replay": False}}, ["trainer.router_replay decides it"]),
        ({"megatron": {"moe_router_fusion": True}}, ["trainer.router_fusion decides it"]),
        ({"megatron": {"moe_expert_capacity_factor": 1.5}}, ["the trainer must compute what the engine does"]),
        ({"ddp": {"grad_reduce_in_fp32": False}}, ["trainer.ddp.grad", "trainer.optimizer.gradient_dtype decides it"]),
        ({"ddp": {"overlap_param_gather": True}}, ["a weight sync", "right after an update"]),
        ({"args": {"max_model_len": 7}}, ["data.max_prompt_tokens and rollout.max_response_tokens decide it"]),
        ({"args": {"tensor_parallel_size": 2}}, ["rollout.tensor_parallel_size decides it"]),
        ({"args": {"pipeline_parallel_size": 2}}, ["the routed experts of a sequence are not returned with it"]),
        ({"args": {"kv_transfer_config": {}}}, ["the routed experts of a sequence are not returned with it"]),
        ({"args": {"logprobs_mode": "raw_logprobs"}}, ["the distribution that was sampled from"]),
        ({"args": {"quantization": "fp8_per_block"}}, ["rollout.quantization decides it"]),
        ({"args": {"kv_cache_dtype": "fp8"}}, ["rollout.kv_cache_dtype decides it"]),
        ({"engine": "sglang", "args": {"quantization": "fp8"}}, ["loaded with the weights that the trainer sends"]),
        ({"args": {"seed": 3}}, ["rollout.engine_args.seed is 3, but seed decides it"]),
        ({"engine": "sglang", "args": {"context_length": 7}}, ["rollout.max_response_tokens decide it"]),
        ({"engine": "sglang", "args": {"disable_radix_cache": False}}, ["is false", "can only be given"]),
        ({"args": {"block_size": 16}, "engines": ["vllm", "sglang"], "replicas": 2}, ["engines of several kinds"]),
    ],
)
def test_what_a_setting_of_ours_decides_is_refused_and_names_it(given, words):
    with pytest.raises(ConfigError) as caught:
        settings(**given)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("reasons", "sources"),
    [(owned.MEGATRON, [TRANSFORMER]), (owned.DDP, [DDP]), (owned.VLLM, [VLLM]), (owned.SGLANG, [SGLANG])],
)
def test_what_is_refused_are_fields_of_the_installed_packages(reasons, sources):
    """A name that the package has renamed would be refused in vain, and the new one passed on."""
    (source,) = sources
    if not folders(source.package):
        pytest.skip(f"{source.package} is not installed")
    latent = Source("megatron", "", TRANSFORMER.files, ("MLATransformerConfig",)) if source is TRANSFORMER else source
    known = fields(source, folders(source.package)) | fields(latent, folders(source.package))
    given = set(owned.why_refused(reasons))
    # Of vLLM, SGLang and Megatron no field, but names that users may try.
    assert given - known <= {"device", "moe_extended_tp", "rotary_base"} | {"mtp_standalone"}


def check(config):
    return [each for each in pass_through.names(config) if each.status != "ok"]


def test_unknown_names_are_refused_with_the_nearest(monkeypatch):
    config = settings(megatron={"moe_shared_expert_overlp": True}, ddp={"bucket_sise": 1}, args={"max_num_logs": 3})
    found = check(config)
    assert [(each.name, each.status, each.error) for each in found] == [
        ("trainer.megatron.moe_shared_expert_overlp", "FAIL", ConfigError),
        ("trainer.ddp.bucket_sise", "FAIL", ConfigError),
        ("rollout.engine_args.max_num_logs", "FAIL", ConfigError),
    ]
    assert "did you mean moe_shared_expert_overlap" in found[0].fix
    assert "bucket_size" in found[1].fix
    assert "vLLM's AsyncEngineArgs has no such field" in found[2].detail
    monkeypatch.setattr(pass_through, "folders", lambda *_: [])
    absent = check(config)
    assert [each.status for each in absent] == ["warn"] * 3
    assert absent[2].detail == "its names are not checked: vllm is not installed here"


def test_known_names_pass_and_nothing_is_imported_for_them():
    given = {"megatron": {"moe_shared_expert_overlap": True, "cpu_offloading": False}, "ddp": {"bucket_size": 1000}}
    assert check(settings(**given, args={"enable_expert_parallel": True, "block_size": 32})) == []
    assert "megatron.core" not in sys.modules
    assert "vllm" not in sys.modules


def test_names_of_an_sglang_that_is_elsewhere(tmp_path):
    fields_of = tmp_path / "lib" / "python3.11" / "site-packages" / "sglang" / "srt" / "arg_groups" / "fields"
    fields_of.mkdir(parents=True)
    (fields_of / "memory.py").write_text("class Memory:\n    page_size: int = 1\n    _hidden: int = 2\n")
    sglang = {"python": str(tmp_path / "bin" / "python")}
    config = settings("sglang", args={"page_size": 16, "hidden": 1}, sglang=sglang)
    assert [each.name for each in check(config)] == ["rollout.engine_args.hidden"]


# What a user may set although we give it too: it changes no result.
ADJUSTABLE = {"enable_prefix_caching", "enable_log_requests"}


def test_arguments_reach_vllm(monkeypatch):
    """With a stand-in for vLLM, whose import takes seconds: its arguments are then a dict."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.30.0"))
    monkeypatch.setitem(sys.modules, "vllm.config", SimpleNamespace(WeightTransferConfig=dict))
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", SimpleNamespace(AsyncEngineArgs=dict))
    monkeypatch.setitem(sys.modules, "async_rl.weights.vllm.plugin", SimpleNamespace(BACKENDS={"shm": "s"}))
    plain = engine_args(settings(), 0, DENSE)
    changed = engine_args(settings(args={"block_size": 32, "enable_prefix_caching": False}), 0, DENSE)
    assert changed == plain | {"block_size": 32, "enable_prefix_caching": False}
    assert set(plain) == (set(plain) & set(owned.why_refused(owned.VLLM))) | ADJUSTABLE, "what is ours is refused"


def test_arguments_reach_sglangs_command_line():
    given = {
        "enable_mixed_chunk": True,
        "page_size": 16,
        "cuda_graph_bs": [1, 2],
        "model_loader_extra_config": {"a": 1},
    }
    plain, changed = (arguments(settings("sglang", args=args), 0, DENSE, 1) for args in ({}, given))
    assert changed[: len(plain)] == plain
    assert changed[len(plain) :] == [
        *("--enable-mixed-chunk", "--page-size", "16", "--cuda-graph-bs", "1", "2"),
        *("--model-loader-extra-config", '{"a": 1}'),
    ]
    ours = {word[2:].replace("-", "_") for word in plain if word.startswith("--")}
    assert ours - set(owned.why_refused(owned.SGLANG)) <= {
        "attention_backend",
        "cuda_graph_backend_decode",
        "cuda_graph_backend_prefill",
    }


def test_a_mapping_on_the_command_line():
    given = parse_overrides(["--trainer.megatron", "{moe_shared_expert_overlap: true}"])
    assert given == {"trainer.megatron": {"moe_shared_expert_overlap": True}}
