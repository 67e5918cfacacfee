"""What settings add up to at real size, worked out by hand for Qwen3-30B-A3B, and what doctor says of it."""

import numpy as np
import pytest

from async_rl import doctor
from async_rl.config.loading import validate
from async_rl.doctor import capacity, machine
from async_rl.doctor.estimate import Parameters
from async_rl.doctor.sizes import object_store_bytes, worst_case
from async_rl.models.config import read_model_config
from async_rl.queue.codec import encode
from async_rl.types import Prompt, RoutingSpec, Segment, Trajectory
from tests.support.groups import grouped
from tests.support.model_folders import QWEN3_30B_A3B, write_config

# 2,048 prompt and 32,768 response tokens. Rows of routed experts: 34,815, of 48 x 8 = 384 bytes each.
RESPONSE = 34_815 * 384 + 2_048 * 4 + 32_768 * 12 + 5 * 12
GROUP = 16 * RESPONSE + 2_048 * 4


@pytest.fixture
def folder(tmp_path):
    return write_config(tmp_path / "model", QWEN3_30B_A3B)


def settings(folder, **sections):
    tree = {
        "model": {"path": str(folder)},
        "data": {"train": "train.jsonl", "max_prompt_tokens": 2048},
        "rollout": {"n": 16, "max_response_tokens": 32_768, "replicas": 64, "max_num_seqs": 256},
        "trainer": {"groups_per_step": 64},
        "queue": {},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return validate(tree)


def found(config, name) -> doctor.Check:
    (check,) = [check for check in capacity.longest_responses(config) if check.name == name]
    return check


@pytest.fixture(autouse=True)
def many_gpus(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(machine, "gpu_count", lambda: 8)
    monkeypatch.setattr(machine, "free_bytes", lambda path: 100 * machine.GB)


def test_bytes_by_hand(folder):
    sizes = worst_case(settings(folder), read_model_config(folder))
    assert sizes.routing_bytes == 384
    assert sizes.token_bytes == 396
    assert sizes.response_bytes == RESPONSE == 13_770_428
    assert sizes.group_bytes == GROUP == 220_335_040
    assert sizes.step_bytes == 64 * GROUP
    # 64 x (1 + 0.5) groups in a window.
    assert (sizes.window_groups, sizes.window_bytes) == (96, 96 * GROUP)


def test_places_prefill_and_snapshot_by_hand(folder):
    sizes = worst_case(settings(folder), read_model_config(folder))
    assert (sizes.places, sizes.outstanding_responses) == (16_384, 1_536)
    assert sizes.used_places == pytest.approx(0.094, abs=0.001)
    assert sizes.resumed_tokens == 1_536 * (2_048 + 16_384)
    assert sizes.window_tokens == 64 * 16 * 32_768
    assert sizes.resumed_share == pytest.approx(0.84, abs=0.01)
    # Twice the 16 groups that fill 256 places.
    assert sizes.in_flight_bytes == 32 * GROUP
    config = settings(folder)
    assert read_model_config(folder).kv_token_bytes(config.kv_value_bytes) == 2 * 48 * 4 * 128 * 2 == 98_304


def test_more_trajectories_than_places_grow_the_snapshot(folder):
    config = settings(folder, rollout={"max_trajectories": 512})
    sizes = worst_case(config, read_model_config(folder))
    assert sizes.in_flight_bytes == 64 * GROUP
    assert sizes.places == 16_384


def test_exact_routing_keeps_rows_for_each_segment(folder):
    exact = {"partial_rollout": {"routing": "exact"}, "max_staleness": 4}
    sizes = worst_case(settings(folder, async_training=exact), read_model_config(folder))
    assert sizes.response_bytes - RESPONSE == 4 * (2_048 + 16_384) * 384


def test_without_routed_experts(folder):
    config = settings(folder, rollout={"return_routed_experts": False}, trainer={"router_replay": "off"})
    assert worst_case(config, read_model_config(folder)).token_bytes == 12


def test_the_wire_takes_what_is_worked_out(folder):
    """All but the table and the alignment of a real message."""
    config = settings(
        folder,
        data={"max_prompt_tokens": 200},
        rollout={"n": 2, "max_response_tokens": 900},
        async_training={"max_staleness": 0},
    )
    spec = RoutingSpec(48, 8, 128)
    rows = np.broadcast_to(np.arange(8, dtype=np.uint8), (1_099, 48, 8))
    prompt = Prompt("0-0", 1, "text", np.ones(200, np.int32))
    trajectories = tuple(
        Trajectory(
            trajectory_id=f"0-0.0/{t}",
            prompt_ids=prompt.token_ids,
            response_ids=np.ones(900, np.int32),
            logprobs=np.zeros(900, np.float32),
            versions=np.zeros(900, np.int32),
            segments=(Segment(0, 900, 0),),
            finish_reason="length",
            routed_experts=rows,
            routing_spec=spec,
        )
        for t in range(2)
    )
    message = encode(grouped("0-0.0", prompt, trajectories))
    expected = worst_case(config, read_model_config(folder)).group_bytes
    assert expected <= len(message) < expected + 2_000


def test_a_step_that_the_queue_does_not_hold(folder):
    check = found(settings(folder), "queue.max_bytes")
    assert check.status == "warn"
    assert "2.1 GB, but the groups of one training step take up to 14.1 GB" in check.detail
    assert f"set queue.max_bytes to {64 * GROUP} or more" in check.fix
    check = found(settings(folder, queue={"max_bytes": 64 * GROUP}), "queue.max_bytes")
    assert check.status == "ok"
    assert "holds 64 groups" in check.detail


def test_a_step_that_the_object_store_does_not_hold(folder, monkeypatch):
    config = settings(folder, queue={"max_bytes": 64 * GROUP})
    assert found(config, "object store").status == "ok"
    monkeypatch.setattr(machine, "free_bytes", lambda path: 10 * machine.GB)
    check = found(config, "object store")
    assert check.status == "warn"
    assert "9.0 GB" in check.detail
    assert "writes groups to disk" in check.detail
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "object store" not in {check.name for check in capacity.longest_responses(config)}


def test_object_store_bytes():
    assert object_store_bytes(2**31, 100 * 2**30) == 2**31 + 2**28
    assert object_store_bytes(2**31, 10**9) == 900_000_000
    assert object_store_bytes(1, 0) == 80 * 2**20


def test_engines_that_the_staleness_budget_leaves_idle(folder):
    check = found(settings(folder), "engine places")
    assert check.status == "warn"
    assert "1536 responses (96 groups of 16): at most 9% of the places" in check.detail
    assert "rollout.max_num_seqs" in check.fix
    assert found(settings(folder, rollout={"max_num_seqs": 24}), "engine places").status == "ok"


def test_places_of_replicas_that_come_and_go(folder):
    check = found(settings(folder, rollout={"replicas": {"min": 2, "max": 6}}), "engine places")
    assert check.detail.startswith(
        "1536 (replicas x max_num_seqs, 512 with rollout.replicas.min); the staleness budget"
    )


def test_rollouts_in_the_making_of_agents(folder):
    assert "in the making" not in found(settings(folder), "engine places").detail
    agent = {"function": "my_agent:solve"}
    detail = found(settings(folder, rollout={"agent": agent}), "engine places").detail
    assert "each replica has up to 1024 rollouts in the making (max_trajectories), while" in detail
    assert "take 80% of its KV cache at most" in detail
    more = {"agent": agent, "max_kv_use": None, "max_trajectories": 300}
    detail = found(settings(folder, rollout=more), "engine places").detail
    assert "has up to 300 rollouts in the making (max_trajectories): at most 9% of the places" in detail


@pytest.mark.parametrize(
    ("training", "status", "part"),
    [
        ({}, "ok", "28,311,552 tokens (mode resume, 1536 responses half done), 0.84 per token"),
        ({"staleness_threshold": 1.0}, "warn", "prefill more than they generate"),
        ({"staleness_threshold": 1.0, "trigger_parameter_sync_step": 16}, "ok", "0.56 per token"),
        ({"partial_rollout": {"mode": "in_flight"}}, "ok", "none: with mode in_flight"),
        ({"partial_rollout": {"mode": "drain"}}, "ok", "up to 32768 tokens later"),
    ],
)
def test_prefill_of_a_weight_sync(folder, training, status, part):
    check = found(settings(folder, async_training=training), "prefill per sync")
    assert check.status == status
    assert part in check.detail


def test_prefill_is_bounded_by_the_kv_cache_where_its_size_is_known(folder):
    config = settings(folder, rollout={"kv_cache_bytes": 98_304 * 1000, "replicas": 2}, resources={"device": "cpu"})
    assert "up to 2,000 tokens" in found(config, "prefill per sync").detail


@pytest.mark.parametrize(
    ("checkpoint", "warns"),
    [
        ({"every": 1}, None),
        ({"every_s": 60.0}, None),
        ({"every": 1, "on_sigterm_s": 5.0}, "checkpoint.on_sigterm_s (5 s): a run that is ended by SIGTERM then has"),
        ({"every": 1, "on_sigterm_s": 0.0}, None),
        ({"every_s": 5.0}, "checkpoint.every_s (5 s): training then waits for each checkpoint"),
    ],
)
def test_groups_in_flight_that_take_longer_to_write_than_there_is_time(folder, checkpoint, warns):
    """A weight sync's time does not limit it: engines generate meanwhile."""
    check = found(settings(folder, checkpoint=checkpoint, sync={"timeout_s": 1.0}), "checkpoint")
    assert check.detail.startswith("up to 7.1 GB of groups in flight per replica, 7.1 s at 1 GB/s")
    assert check.status == ("ok" if warns is None else "warn")
    assert (warns or "") in check.detail
    assert ("to 14, or" in check.fix) == (warns is not None)


def test_without_checkpoints_there_is_no_time_for_them(folder):
    assert "checkpoint" not in {check.name for check in capacity.longest_responses(settings(folder))}


def test_a_group_beyond_one_message(folder, monkeypatch):
    assert "messages" not in {check.name for check in capacity.longest_responses(settings(folder))}
    monkeypatch.setattr(capacity, "MAX_MESSAGE_BYTES", GROUP - 1)
    assert found(settings(folder), "messages").status == "warn"


def test_without_a_model_there_is_nothing_to_say(tmp_path):
    assert list(capacity.longest_responses(settings(tmp_path / "absent"))) == []


@pytest.mark.parametrize(
    ("dtype", "free", "checkpoint", "status", "part"),
    [
        # A billion parameters: 4 bytes each, and 8 of moments; in bfloat16 2, 8 and 4 of the optimizer's own copy.
        ("float32", 41 * machine.GB, {"every": 5}, "ok", "takes 4.0 GB and 3 checkpoints 36.0 GB"),
        ("float32", 39 * machine.GB, {"every_s": 60.0}, "warn", "39.0 GB free"),
        ("float32", 39 * machine.GB, {"every": 5, "keep": 1}, "ok", "2 checkpoints 24.0 GB"),
        ("bfloat16", 39 * machine.GB, {"every": 5}, "warn", "takes 2.0 GB and 3 checkpoints 42.0 GB: the run ends"),
        ("float32", 5 * machine.GB, {}, "ok", "the exported model takes 4.0 GB"),
        ("float32", 3 * machine.GB, {}, "warn", "the exported model takes 4.0 GB: the run ends"),
    ],
)
def test_a_disk_without_room_for_what_a_run_keeps(folder, monkeypatch, dtype, free, checkpoint, status, part):
    monkeypatch.setattr(machine, "free_bytes", lambda path: free)
    monkeypatch.setattr(capacity.estimate, "count_parameters", lambda *_: Parameters(10**8, 9 * 10**8))
    config = settings(folder, model={"path": str(folder), "dtype": dtype}, checkpoint=checkpoint)
    (check,) = capacity.checkpoints(config)
    assert (check.name, check.status) == ("disk", status)
    assert part in check.detail
    assert ("checkpoint.keep" in check.fix) == (status == "warn")


def test_of_a_model_that_cannot_be_read_nothing_is_said_about_the_disk(tmp_path):
    assert list(capacity.checkpoints(settings(tmp_path / "absent"))) == []
