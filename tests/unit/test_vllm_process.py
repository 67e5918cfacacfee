"""The engine's reading of a checkpoint against the trainer's, and its environment. Without vLLM."""

import os
import sys
from types import SimpleNamespace

import pytest

from async_rl.config.loading import validate
from async_rl.errors import ModelError
from async_rl.models.config import ModelConfig
from async_rl.rollout.engine.interface import EngineLoad, Part
from async_rl.rollout.engine.vllm import process
from async_rl.rollout.engine.vllm.process import check_layout, engine_args, prepare
from async_rl.runtime import interfaces

SHAPE = {
    "architecture": "a", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_layers": 4, "num_heads": 1,
    "num_kv_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
MOE = ModelConfig(**SHAPE, num_experts=8, top_k=2, moe_intermediate_size=8, moe_layers=(0, 2, 3))
DENSE = ModelConfig(**SHAPE)


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_the_same_layout_under_either_name_passes(name):
    check_layout(SimpleNamespace(num_hidden_layers=4, num_experts_per_tok=2, **{name: 8}), MOE)
    check_layout(SimpleNamespace(num_hidden_layers=4), DENSE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 16}, r"experts \(16 in the engine, 8 in the trainer\)"),
        ({"num_experts_per_tok": 4}, r"experts per token \(4 in the engine, 2 in the trainer\)"),
        ({"num_hidden_layers": 3}, r"layers \(3 in the engine, 4 in the trainer\)"),
        ({"num_experts": None, "num_experts_per_tok": None}, r"experts \(0 in the engine"),
    ],
)
def test_another_layout_is_refused_before_anything_is_sampled(changes, message):
    engine = {"num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2} | changes
    with pytest.raises(ModelError, match=message):
        check_layout(SimpleNamespace(**engine), MOE)


def test_a_mixture_where_the_trainer_has_a_dense_model_is_refused():
    with pytest.raises(ModelError, match="experts"):
        check_layout(SimpleNamespace(num_hidden_layers=4, num_experts=8), DENSE)


@pytest.mark.parametrize(
    ("model", "enforced", "compiles"), [(MOE, False, False), (DENSE, True, False), (DENSE, False, True)]
)
def test_on_a_cpu_an_engine_that_does_not_compile_its_model_compiles_nothing(monkeypatch, model, enforced, compiles):
    monkeypatch.setattr("os.environ", dict(os.environ))
    config = SimpleNamespace(
        resources=SimpleNamespace(device="cpu", engine_threads=1),
        rollout=SimpleNamespace(engine_ranks=1, enforce_eager=enforced),
    )
    prepare(config, model)
    assert ("TORCHDYNAMO_DISABLE" not in os.environ) == compiles


@pytest.fixture
def _stub_of_vllm(monkeypatch):
    stubs = {
        "vllm": SimpleNamespace(__version__="0.30.0"),
        "vllm.config": SimpleNamespace(WeightTransferConfig=dict),
        "vllm.engine": SimpleNamespace(),
        "vllm.engine.arg_utils": SimpleNamespace(AsyncEngineArgs=dict),
    }
    for name, stub in stubs.items():
        monkeypatch.setitem(sys.modules, name, stub)


@pytest.mark.usefixtures("_stub_of_vllm")
@pytest.mark.parametrize(
    ("sizes", "executor"),
    [({}, None), ({"tensor_parallel_size": 2}, "mp"), ({"data_parallel_size": 2}, "mp")],
)
def test_the_processes_of_an_engine_are_its_children_also_in_a_placement_group(sizes, executor):
    config = validate({"model": {"path": "m"}, "data": {"train": "t"}, "rollout": sizes})
    assert engine_args(config, 0, DENSE)["distributed_executor_backend"] == executor


@pytest.mark.usefixtures("_stub_of_vllm")
def test_data_parallel_ranks_divide_places_and_cache_and_have_seeds_of_their_own():
    rollout = {"data_parallel_size": 4, "max_num_seqs": 10, "kv_cache_bytes": 2**20, "tensor_parallel_size": 2}
    resources = {"device": "cpu"}
    config = validate(
        {"model": {"path": "m"}, "data": {"train": "t"}, "rollout": rollout, "resources": resources, "seed": 100}
    )
    first, second = (engine_args(config, replica, MOE) for replica in range(2))
    assert (first["data_parallel_size"], first["tensor_parallel_size"]) == (4, 2)
    assert (first["max_num_seqs"], first["kv_cache_memory_bytes"]) == (3, 2**18)
    assert (first["seed"], second["seed"]) == (100, 104)  # each rank adds its number
    assert config.engine_gpus == 8


def test_vllm_binds_no_data_parallel_ranks_to_numa_nodes(monkeypatch):
    """It numbers the GPUs of each from 0, and would bind all of them to the node of the first."""
    monkeypatch.setattr(process, "near_gpus", lambda _: SimpleNamespace(nodes=[0, 1]))
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/numactl")
    tree = {"model": {"path": "m"}, "data": {"train": "t"}}
    assert process._gpu_nodes(validate(tree)) == [0, 1]
    assert process._gpu_nodes(validate(tree | {"rollout": {"data_parallel_size": 2}})) is None


@pytest.mark.usefixtures("_stub_of_vllm")
def test_each_part_of_an_engine_over_hosts_says_which_it_is_and_meets_the_others_on_the_network(monkeypatch):
    monkeypatch.setattr("os.environ", dict(os.environ))
    monkeypatch.setattr(interfaces, "interface_towards", {"10.0.0.1": "eth0"}.get)
    rollout = {"tensor_parallel_size": 16, "hosts_per_engine": 2}
    config = validate({"model": {"path": "m"}, "data": {"train": "t"}, "rollout": rollout})
    part = Part(1, "10.0.0.2", ("10.0.0.1", 4567))
    alone, spread = engine_args(config, 0, DENSE), engine_args(config, 0, DENSE, part)
    assert {name: value for name, value in spread.items() if name not in alone} == {
        "nnodes": 2, "node_rank": 1, "master_addr": "10.0.0.1", "master_port": 4567,
    }  # fmt: skip
    assert spread["distributed_executor_backend"] == "mp"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.pop(name, None)
    prepare(config, DENSE, part)
    assert (os.environ["VLLM_HOST_IP"], os.environ["GLOO_SOCKET_IFNAME"]) == ("10.0.0.2", "eth0")
    prepare(config, DENSE)
    assert (os.environ["VLLM_HOST_IP"], os.environ["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")


@pytest.mark.usefixtures("_stub_of_vllm")
@pytest.mark.parametrize(("nodes", "bind"), [([0, 1], True), (None, False)])
def test_vllm_is_given_the_numa_nodes_of_its_gpus(monkeypatch, nodes, bind):
    monkeypatch.setattr(process, "_gpu_nodes", lambda _: nodes)
    arguments = engine_args(validate({"model": {"path": "m"}, "data": {"train": "t"}}), 0, DENSE)
    assert (arguments["numa_bind"], arguments["numa_bind_nodes"]) == (bind, nodes)


@pytest.mark.usefixtures("_stub_of_vllm")
@pytest.mark.parametrize(
    ("resources", "size"),
    [
        ({"device": "cpu"}, 1000),
        ({"device": "cuda"}, None),
        ({"device": "cuda", "share_gpu": True}, 1000),
    ],
)
def test_the_size_of_the_cache_is_set_where_vllm_cannot_measure_what_is_left(resources, size):
    tree = {"model": {"path": "m"}, "data": {"train": "t"}, "resources": resources, "rollout": {"kv_cache_bytes": 1000}}
    assert engine_args(validate(tree), 0, DENSE)["kv_cache_memory_bytes"] == size


@pytest.mark.usefixtures("_stub_of_vllm")
@pytest.mark.parametrize(
    ("device", "layers"),
    [
        ("cpu", {"linear": "fp8_per_channel"}),
        ("cuda", {"linear": "fp8_per_channel", "moe": "fp8_per_channel"}),
    ],
)
def test_weights_in_fp8_are_converted_as_they_are_loaded(device, layers):
    rollout = {"quantization": "fp8_per_channel", "kv_cache_dtype": "fp8"}
    tree = {"model": {"path": "m"}, "data": {"train": "t"}, "resources": {"device": device}}
    arguments = engine_args(validate({**tree, "rollout": rollout}), 0, DENSE)
    assert arguments["quantization"] == "online"
    assert arguments["quantization_config"] == {**layers, "ignore": ["*.gate"]}
    assert arguments["kv_cache_dtype"] == "fp8"
    plain = engine_args(validate(tree), 0, DENSE)
    assert "quantization" not in plain
    assert plain["kv_cache_dtype"] == "auto"


def test_what_the_engine_has_to_do_is_what_its_scheduler_said_last():
    cache = SimpleNamespace(num_gpu_blocks=100, block_size=16)
    parallel = SimpleNamespace(data_parallel_size=1)
    llm = SimpleNamespace(
        vllm_config=SimpleNamespace(cache_config=cache, parallel_config=parallel), logger_manager=None
    )
    assert process.load(llm) == EngineLoad(kv_tokens=1600), "with metrics.engine off"
    logger = SimpleNamespace(last={})
    llm.logger_manager = SimpleNamespace(stat_loggers=[logger])
    assert process.load(llm) == EngineLoad(kv_tokens=1600), "before the first step"
    logger.last = {0: SimpleNamespace(num_waiting_reqs=2, num_skipped_waiting_reqs=1, kv_cache_usage=0.75)}
    assert process.load(llm) == EngineLoad(waiting=3, kv_use=0.75, kv_tokens=1600)
    logger.last[1] = SimpleNamespace(num_waiting_reqs=1, num_skipped_waiting_reqs=0, kv_cache_usage=0.25)
    llm.vllm_config.parallel_config.data_parallel_size = 2
    assert process.load(llm) == EngineLoad(waiting=4, kv_use=0.5, kv_tokens=1600), "the blocks are those of both"
