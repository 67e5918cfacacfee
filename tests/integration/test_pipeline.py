"""The whole pipeline for real: vLLM, Ray, Megatron. Invariants by their number in docs/concepts/architecture.md."""

import itertools
import json
import os
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import load_file

from async_rl.models.config import read_model_config
from async_rl.queue import codec
from tests.support.invariants import conserved
from tests.support.real_run import SCRIPTED

pytestmark = pytest.mark.e2e

STEPS = 8


def finished(run, canary: float = 1e-4) -> dict:
    assert run.wait() == 0, run.output
    run.assert_nothing_left()
    summary = run.summary
    groups = summary["groups"]
    # Invariant 5: conservation.
    assert conserved(groups)
    assert summary["exit_reason"] == "finished"
    assert len(run.rows) == summary["steps"] == summary["policy_version"]
    # Invariant 10: every push was verified.
    assert summary["sync"]["count"] == summary["steps"]
    assert summary["sync"]["canary_max"] <= canary
    return summary


def trained_groups(run):
    return [codec.decode(path.read_bytes()) for path in sorted((run.folder / "trajectories").iterdir())]


@pytest.mark.parametrize("replicas", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_resume_continues_generations_after_pushes(start_run, replicas):
    run = start_run(
        rollout__replicas=replicas, debug__dump_trajectories=64, metrics__samples_per_step=3, trainer__steps=STEPS
    )
    summary = finished(run)

    assert summary["trajectories"]["partial"] > 0
    assert summary["token_staleness"]["max"] <= 3  # invariant 4
    assert summary["on_policy_logprob_abs_diff"]["max"] <= 1e-5  # R3 in float32
    assert summary["tokens"]["resumed_prefill"] > 0
    assert summary["groups"]["trained"] == STEPS * 4
    assert summary["eval"]["n"] == 8

    groups = trained_groups(run)
    assert len(groups) == STEPS * 4
    prompts = [group.prompt.prompt_id for group in groups]
    assert len(set(prompts)) == len(prompts)  # invariant 5: none is trained twice
    for trajectory in (t for group in groups for t in group.trajectories):
        # Invariants 1 and 2 were checked when the message was decoded; a partial rollout has all its rows.
        assert trajectory.routed_experts.shape[0] == trajectory.num_tokens - 1
        # Invariant 7: versions only rise along a response.
        assert sorted(trajectory.versions.tolist()) == trajectory.versions.tolist()
    assert max(len(t.segments) for group in groups for t in group.trajectories) > 1

    samples = (run.folder / "samples.jsonl").read_text().splitlines()
    assert len(samples) == STEPS * 3
    roles = {"pipeline", "trainer-0", *(f"rollout-{replica}" for replica in range(replicas))}
    assert roles <= {path.stem for path in (run.folder / "logs").iterdir()}
    assert list((run.folder / "prometheus" / "targets").iterdir()) == []  # withdrawn at the end


def scrape(run) -> dict:
    """{role: {series: value}} of every process that announces itself to Prometheus."""
    result: dict = {}
    for path in (run.folder / "prometheus" / "targets").glob("*.json"):
        (target,) = json.loads(path.read_text())
        assert target["targets"][0].startswith("127.0.0.1:")
        with urllib.request.urlopen(f"http://{target['targets'][0]}/metrics") as response:
            text = response.read().decode()
        series = result.setdefault(path.stem, {})
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = ",".join(f'{key}="{value}"' for key, value in sample.labels.items())
                series[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return result


def test_in_flight_keeps_generations_across_pushes(start_run):
    run = start_run(async_training__partial_rollout__mode="in_flight", debug__dump_trajectories=64)
    summary = finished(run)
    # What comes out is a checkpoint like the one that went in.
    assert read_model_config(run.folder / "checkpoints" / "final").num_experts == 8
    assert (run.folder / "checkpoints" / "final" / "tokenizer.json").exists()
    assert summary["trajectories"]["partial"] > 0
    assert summary["tokens"]["resumed_prefill"] == 0
    assert summary["token_staleness"]["max"] <= 3
    for trajectory in (t for group in trained_groups(run) for t in group.trajectories):
        assert sorted(trajectory.versions.tolist()) == trajectory.versions.tolist()


def check_metrics(run) -> None:
    """Compare what every process of a run with a real engine serves with what it is bound to say."""
    scraped = scrape(run)
    # Not every step has tokens of staleness 0, and then that series is not there.
    while 'async_rl_ppo_kl{staleness="0"}' not in scraped["pipeline"]:
        assert run.process.poll() is None, run.output
        scraped = scrape(run)
    assert "async_rl_policy_version" in scraped["pipeline"]
    assert scraped["pipeline"]['async_rl_ppo_kl{staleness="0"}'] == pytest.approx(0, abs=1e-5)
    assert sum(values.get("async_rl_generated_tokens_total", 0) for values in scraped.values()) > 0
    # There before the first is killed: rate() sees no first value.
    killed = 'async_rl_user_calls_killed_total{function="reward"}'
    assert [values[killed] for values in scraped.values() if killed in values] == [0]
    engine, trainer, worker = (run.one(name) for name in ("EngineCore", "TrainerActor", "RolloutActor"))
    if len(os.sched_getaffinity(0)) >= 2:
        assert set(engine.cpu_affinity()).isdisjoint(trainer.cpu_affinity())
        assert set(worker.cpu_affinity()) == os.sched_getaffinity(0)  # the engine's front end works on any core


def test_drain_without_staleness_is_synchronous_and_outlives_its_queue(start_run):
    run = start_run(
        async_training__partial_rollout__mode="drain",
        async_training__staleness_threshold=0,
        async_training__max_staleness=0,
        trainer__steps=4,
    )
    run.wait_for_step(1)
    check_metrics(run)
    run.one("QueueProcess").kill()
    summary = finished(run)
    assert len(run.events("queue_rebuilt")) == 1
    assert summary["trajectories"]["partial"] == 0
    assert summary["token_staleness"]["max"] == 0
    assert summary["tokens_masked"] == 0
    assert summary["groups"]["issued"] == summary["groups"]["trained"] + summary["groups"]["outstanding"]


# A group of one version only is dropped under either setting: masking needs responses that last over weight syncs.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("on_stale", "engine"),
    [
        ("mask", "vllm"),
        ("drop", "tests.support.scripted_scenarios:InstantEngine"),
    ],
)
def test_invariant_4_hard_bound_with_a_tight_limit(start_run, on_stale, engine):
    run = start_run(
        async_training__staleness_threshold=3.0,
        async_training__max_staleness=1,
        async_training__on_stale=on_stale,
        rollout__engine=engine,
    )
    summary = finished(run)
    assert summary["token_staleness"]["max"] <= 1
    # So much in flight against so tight a bound: something must have been over it.
    assert (summary["tokens_masked"] if on_stale == "mask" else summary["groups"]["dropped"]) > 0


@pytest.mark.slow
def test_two_data_parallel_ranks_with_r2(start_run):
    run = start_run(
        trainer__parallel__dp=2, trainer__router_replay="R2", trainer__steps=3, async_training__require_batches=2
    )
    summary = finished(run)
    assert summary["groups"]["trained"] == 3 * 2 * 4


@pytest.mark.slow
def test_ctrl_c_leaves_a_summary_and_nothing_else(start_run):
    run = start_run(trainer__steps=10_000, **SCRIPTED)
    run.wait_for_step(2)
    # As a terminal does: to every process of the foreground group. The driver handles it, the supervisor waits for it.
    for pid in (run.driver, run.process.pid):
        os.kill(pid, signal.SIGINT)
    assert run.wait() == 130, run.output
    run.assert_nothing_left()
    assert run.summary["exit_reason"] == "interrupted"
    assert run.summary["steps"] >= 2
    assert run.summary["groups"]["trained"] >= 4 * run.summary["steps"], "those of the last step among them"


@pytest.mark.slow
def test_every_process_serves_metrics_until_a_killed_engine_ends_the_run(start_run):
    # Without an end of its own: however slowly this process looks, the run is still there.
    run = start_run(trainer__steps=10_000, recovery__max_restarts=0)
    run.wait_for_step(1)
    check_metrics(run)
    run.one("EngineCore").kill()
    assert_failed(run)


def assert_failed(run) -> None:
    assert run.wait() == 1, run.output
    run.assert_nothing_left()
    assert run.summary["exit_reason"].startswith("failed: ")
    assert run.output.count("async-rl: ") == 1  # why, in one place
    assert "Traceback" not in run.output


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["TrainerActor", "QueueProcess"])
def test_a_killed_actor_ends_the_run(start_run, victim):
    run = start_run(trainer__steps=10_000, recovery__max_restarts=0, **SCRIPTED)
    run.wait_for_step(1)
    run.one(victim).kill()
    assert_failed(run)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "supervisor"])
def test_a_killed_parent_ends_the_run(start_run, victim):
    run = start_run(trainer__steps=10_000, recovery__max_restarts=0, **SCRIPTED)
    run.wait_for_step(1)
    os.kill(run.driver if victim == "driver" else run.process.pid, signal.SIGKILL)
    code = run.wait()
    run.assert_nothing_left()
    assert code not in (0, 130)


@pytest.mark.slow
def test_a_reward_that_raises_fails_the_run_and_names_itself(start_run):
    run = start_run(reward__function="tests.support.user_rewards:fails_on_long_prompts", **SCRIPTED)
    assert run.wait() == 1, run.output
    run.assert_nothing_left()
    assert "tests.support.user_rewards:fails_on_long_prompts" in run.output
    assert "too long for me" in run.output
    assert "too long for me" in run.summary["exit_reason"]


@pytest.mark.slow
def test_a_reward_that_raises_can_cost_its_group_only(start_run):
    run = start_run(
        reward__function="tests.support.user_rewards:fails_on_long_prompts",
        reward__on_error="skip",
        eval__n=1,
        trainer__steps=4,
        **SCRIPTED,
    )
    summary = finished(run)
    assert summary["groups"]["failed"] > 0


@pytest.mark.slow
def test_memory_of_the_queue_is_bounded(start_run):
    """Invariant 6: with room for one step's groups only, rollouts wait instead of piling up."""
    run = start_run(queue__max_groups=4, async_training__staleness_threshold=3.0, trainer__steps=4, **SCRIPTED)
    finished(run)
    assert max(row["queue_groups"] for row in run.rows) <= 4


@pytest.mark.slow
def test_several_turns_with_every_segment_trained_in_its_own_context(start_run):
    run = start_run(
        rollout__environment__function="tests.support.user_rewards:ask_twice",
        async_training__partial_rollout__routing="exact",
        debug__dump_trajectories=8,
        trainer__steps=5,
    )
    assert run.wait() == 0, run.output
    assert run.summary["on_policy_logprob_abs_diff"]["max"] <= 1e-5
    assert run.summary["trajectories"]["partial"] > 0
    assert run.summary["tokens"]["exact_extra"] > 0
    assert sum(row["tokens_masked"]["not_sampled"] for row in run.rows) > 0
    groups = [codec.decode(path.read_bytes()) for path in (run.folder / "trajectories").iterdir()]
    answered = [t for group in groups for t in group.trajectories if not t.sampled.all()]
    assert answered
    for trajectory in answered:
        # Nobody tokenized anything twice: what stands between two turns is the environment's three letters.
        gaps = [b.start - a.stop for a, b in itertools.pairwise(trajectory.segments)]
        assert set(gaps) <= {0, 3}
        assert sum(gaps) == (~trajectory.sampled).sum()
    run.assert_nothing_left()


@pytest.mark.slow
def test_a_bfloat16_engine_beside_a_float32_trainer(start_run):
    """Weights are cast at each push, the canary allows for it, and what is left shows at staleness 0."""
    run = start_run(rollout__dtype="bfloat16", async_training__partial_rollout__routing="preserve")
    summary = finished(run, canary=0.5)
    assert 1e-5 < summary["on_policy_logprob_abs_diff"]["mean"] < 0.05
    assert summary["sync"]["retries"] == 0


@pytest.mark.slow
def test_a_parallel_trainer_with_checkpoints(start_run, tmp_path):
    """Weights are gathered from tensor-, expert- and pipeline-parallel ranks for every push, and verified there."""
    run = start_run(
        trainer__parallel__tp=2,
        trainer__parallel__ep=2,
        trainer__parallel__pp=2,
        trainer__loss__policy="gspo",
        trainer__loss__aggregation="sequence_mean",
        trainer__steps=4,
        checkpoint__every=2,
    )
    summary = finished(run)
    assert summary["on_policy_logprob_abs_diff"]["max"] <= 1e-5
    assert all(row["padding_ratio"] < 0.01 for row in run.rows)
    checkpoints = run.folder / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["final", "step-000002", "step-000004"]
    command = [sys.executable, "-m", "async_rl.cli", "export", str(run.folder), str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    final, exported = (
        load_file(next(folder.glob("*.safetensors"))) for folder in (checkpoints / "final", tmp_path / "out")
    )
    assert final.keys() == exported.keys()
    for name, weight in final.items():
        np.testing.assert_array_equal(exported[name], weight, err_msg=name)
