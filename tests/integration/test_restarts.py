"""Whole runs with the scripted engine whose worker dies, whose trainer fails, and which are asked to end."""

import signal
import time

import pytest

from tests.support.invariants import conserved
from tests.support.real_run import SCRIPTED

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SETTINGS = SCRIPTED | {
    "trainer__steps": 10_000,
    "recovery__backoff_s": 0.01,
    "eval__n": 1,
}


def wait_for_event(run, name, count=1):
    deadline = time.monotonic() + 180
    while len(found := run.events(name)) < count:
        assert run.process.poll() is None, f"the run ended early:\n{run.output}"
        assert time.monotonic() < deadline, f"{name} did not come:\n{run.output}"
        time.sleep(0.1)
    return found


def assert_conserved(groups):
    """Invariant 5."""
    assert conserved(groups)


def test_a_run_keeps_what_it_has_when_a_worker_dies_or_it_is_to_end(start_run, resume_run):
    run = start_run(**SETTINGS, rollout__replicas=2, checkpoint__every=10_000)
    run.wait_for_step(3)
    run.one("RolloutActor").kill()
    wait_for_event(run, "worker_restarted")
    run.wait_for_step(len(run.rows) + 2)
    # SIGUSR2: a checkpoint after the current step.
    run.process.send_signal(signal.SIGUSR2)
    on_demand = wait_for_event(run, "checkpoint_written")[0]["step"]
    run.wait_for_step(on_demand + 1)
    # SIGTERM: one of the last step, and the end.
    run.process.terminate()
    assert run.wait() == 130, run.output
    run.assert_nothing_left()
    steps = [row["step"] for row in run.rows]
    assert run.events("checkpoint_written")[-1]["step"] == steps[-1] > on_demand
    summary = run.summary
    assert summary["exit_reason"] == "interrupted"
    assert_conserved(summary["groups"])
    # A version is new weights: the restarted worker has made none.
    assert summary["policy_version"] == summary["steps"] == steps[-1]

    last = steps[-1] + 2
    resumed = resume_run(**SETTINGS | {"trainer__steps": last}, rollout__replicas=2, checkpoint__every=10_000)
    assert resumed.wait() == 0, resumed.output
    assert [row["step"] for row in resumed.rows] == list(range(1, last + 1))
    assert not (resumed.folder / "rewound-metrics.jsonl").exists(), "no step was trained twice"
    assert_conserved(resumed.summary["groups"])


def test_a_batch_that_the_trainer_fails_on_twice_is_left_out(start_run, tmp_path):
    run = start_run(
        **SETTINGS, checkpoint__every=2, trainer__loss__policy="tests.support.user_losses:runs_out_of_memory"
    )
    run.wait_for_step(3)
    (tmp_path / "faults").write_text("1\n2")
    (set_aside,) = wait_for_event(run, "batch_set_aside")
    assert "OutOfMemoryError: no memory for [T, V]" in set_aside["reason"]
    given_up = set_aside["groups"].split()
    assert 1 <= len(given_up) <= 4
    wait_for_event(run, "trainer_restarted", 2)
    run.wait_for_step(run.rows[-1]["step"] + 3)
    run.process.terminate()
    assert run.wait() == 130, run.output
    groups = run.summary["groups"]
    assert_conserved(groups)
    assert groups["failed"] == len(given_up)
    trained = {group for step in run.trained for group in step["groups"]}
    assert not trained.intersection(given_up)
