"""What vLLM's scheduler keeps of aborted requests, and its repair, on the real scheduler; by what reasons calls end."""

from __future__ import annotations

import os
from multiprocessing import shared_memory

import pytest

from async_rl.models.config import read_model_config
from async_rl.rollout.engine.vllm import process as vllm_process
from async_rl.rollout.engine.vllm.engine import _CALL_END
from async_rl.weights.vllm.scheduler_leak import forget_freed_requests
from tests.support.engine_checkpoint import MAX_RUNNING, engine_config

ROUNDS = 20
BLOCKS = 64


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory):
    """vLLM's settings for a small MoE that returns its routed experts; nothing reads its weights."""
    from transformers import Qwen3MoeConfig

    folder = tmp_path_factory.mktemp("model")
    Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"], vocab_size=128, hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=64, max_position_embeddings=1024,
    ).save_pretrained(folder)  # fmt: skip
    config = engine_config(folder)
    environment = dict(os.environ)
    try:
        vllm_process.prepare(config, read_model_config(folder))
        settings = vllm_process.engine_args(config, 0, read_model_config(folder)).create_engine_config()
    finally:
        os.environ.clear()
        os.environ.update(environment)
    settings.cache_config.num_gpu_blocks = BLOCKS
    return settings


@pytest.fixture
def scheduler(vllm_config, monkeypatch):
    import torch
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    monkeypatch.setattr(Scheduler, "_free_request", Scheduler._free_request)  # put back at the end
    size = vllm_config.cache_config.block_size
    spec = FullAttentionSpec(block_size=size, num_kv_heads=2, head_size=32, dtype=torch.float32)
    return Scheduler(
        vllm_config,
        KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]),
        StructuredOutputManager(vllm_config),
        block_size=size,
    )


def cancelled_calls(scheduler, round_):
    """Requests that are aborted between the step that schedules them and its output. Returns how many there were."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request, RequestStatus

    names = [f"{round_}/{index}" for index in range(MAX_RUNNING)]
    for name in names:
        scheduler.add_request(Request(name, [*range(2, 9)], SamplingParams(max_tokens=9), None))
    scheduled = scheduler.schedule().num_scheduled_tokens
    scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)
    assert not scheduler.requests
    return len(scheduled)


def test_vllm_still_keeps_an_entry_of_each_aborted_request(scheduler):
    """Why ``scheduler_leak`` exists. When this fails, vLLM removes the entries by itself and the file can go."""
    aborted = sum(cancelled_calls(scheduler, round_) for round_ in range(ROUNDS))
    assert aborted == ROUNDS * MAX_RUNNING
    assert len(scheduler._re_block_ids) == aborted


def test_nothing_is_kept_of_aborted_requests(scheduler):
    for _ in range(2):  # the plugin is loaded more than once in a process
        forget_freed_requests()
    for round_ in range(ROUNDS):
        assert cancelled_calls(scheduler, round_) == MAX_RUNNING
        assert scheduler._re_block_ids == {}


def test_only_engine_processes_are_changed(scheduler, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    from async_rl.weights.vllm import plugin

    monkeypatch.setattr(plugin, "die_with_parent", lambda: None)
    monkeypatch.setattr(plugin, "_allow_amx", lambda: None)
    process = plugin.multiprocessing.current_process()
    monkeypatch.setitem(process._config, "semprefix", "/token-rollout-0")
    monkeypatch.setattr(shared_memory, "_make_filename", names := shared_memory._make_filename)
    before = Scheduler._free_request
    plugin.register()
    assert (Scheduler._free_request, shared_memory._make_filename) == (before, names)
    monkeypatch.setattr(process, "name", "EngineCore_DP0")
    plugin.register()
    assert Scheduler._free_request is not before
    assert shared_memory._make_filename().startswith("/sem.token-rollout-0-")


def test_each_reason_by_which_vllm_ends_a_call_is_known():
    """What the engine makes of each is in tests/unit/test_vllm_calls.py."""
    from vllm.v1.engine import FINISH_REASON_STRINGS

    assert {*_CALL_END, "error"} == set(FINISH_REASON_STRINGS)
