"""Whole runs whose rollout engine is SGLang: real server, Ray, Megatron, with partial rollouts and the canary."""

import statistics

import pytest

from async_rl.queue import codec
from tests.support.invariants import conserved
from tests.support.needs import NEEDS_SGLANG
from tests.support.real_run import ROOT, Run

pytestmark = [
    pytest.mark.e2e,
    NEEDS_SGLANG,
]

SGLANG = {"rollout__engine": "sglang", "recovery__max_restarts": 0}


def finished(run, steps):
    assert run.wait() == 0, run.output
    run.assert_nothing_left()
    summary = run.summary
    assert summary["exit_reason"] == "finished"
    assert len(run.rows) == summary["policy_version"] == steps
    assert conserved(summary["groups"])
    assert summary["sync"]["count"] == steps
    assert summary["sync"]["canary_max"] <= 1e-4  # at every push
    return summary


def test_generations_are_cut_at_pushes_and_resumed(start_run):
    run = start_run(debug__dump_trajectories=64, trainer__steps=5, **SGLANG)
    summary = finished(run, 5)
    assert summary["trajectories"]["partial"] > 0
    assert summary["token_staleness"]["max"] <= 3
    assert summary["on_policy_logprob_abs_diff"]["max"] <= 2e-5
    groups = [codec.decode(path.read_bytes()) for path in sorted((run.folder / "trajectories").iterdir())]
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    for trajectory in trajectories:
        assert trajectory.routed_experts.shape[0] == trajectory.num_tokens - 1
        assert sorted(trajectory.versions.tolist()) == trajectory.versions.tolist()
    assert max(len(trajectory.segments) for trajectory in trajectories) > 1
    assert (run.folder / "logs" / "rollout-0.sglang.log").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "routing"), [("in_flight", "replace"), ("drain", "replace"), ("resume", "exact")])
def test_every_mode(start_run, mode, routing):
    partial = {"async_training__partial_rollout__mode": mode, "async_training__partial_rollout__routing": routing}
    run = start_run(trainer__steps=6, **SGLANG, **partial)
    summary = finished(run, 6)
    # A later token of a frozen generation rests on activations of older weights, as with vLLM; the first step has none.
    first = run.rows[0]["on_policy_logprob_abs_diff_max"]
    assert (first if mode == "in_flight" else summary["on_policy_logprob_abs_diff"]["max"]) <= 2e-5
    assert (summary["trajectories"]["partial"] > 0) == (mode != "drain")


@pytest.mark.slow
def test_the_death_of_a_server_costs_a_restart_of_its_replica(start_run):
    run = start_run(trainer__steps=8, **SGLANG | {"recovery__max_restarts": 4})
    run.wait_for_step(2)
    run.one("sglang::scheduler").kill()
    summary = finished(run, 8)
    assert summary["steps"] == 8
    assert len(run.events("worker_restarted")) == 1


@pytest.mark.slow
def test_one_replica_of_each_engine_in_one_run(start_run):
    mixed = {"rollout__engines": "[vllm, sglang]", "rollout__replicas": 2, "recovery__max_restarts": 0}
    # One place each, so that engines take longer than the trainer, and weight syncs cut responses of both.
    run = start_run(debug__dump_trajectories=64, trainer__steps=12, rollout__max_num_seqs=1, **mixed)
    summary = finished(run, 12)
    assert summary["trajectories"]["partial"] > 0
    assert summary["on_policy_logprob_abs_diff"]["max"] <= 2e-5
    sampled = {engine for row in run.rows for engine in row["ppo_kl_by_engine"]}
    assert sampled == {"vllm", "sglang"}
    groups = [codec.decode(path.read_bytes()) for path in sorted((run.folder / "trajectories").iterdir())]
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    assert {segment.engine for trajectory in trajectories for segment in trajectory.segments} == {"vllm", "sglang"}
    for engine in sampled:  # partial rollouts of both
        assert any(t.is_partial and t.segments[-1].engine == engine for t in trajectories)


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_as_with_vllm(tmp_path, seed):
    """The demo as it is, whose greedy evaluation begins at about 0.2."""
    run = Run(ROOT / "configs" / "tiny_moe.yaml", tmp_path, name="run", trainer__steps=40, seed=seed, **SGLANG)
    try:
        summary = finished(run, 40)
    finally:
        run.close()
    rewards = [row["reward_mean"] for row in run.rows]
    assert statistics.fmean(rewards[-8:]) > statistics.fmean(rewards[:8]) + 0.1
    assert summary["eval"]["last"] > summary["eval"]["first"] + 0.1
