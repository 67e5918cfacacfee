"""Whole runs with the scripted engine that filter groups: over deaths of processes and a restore, and to their end."""

import pytest

from tests.support.invariants import check, conserved
from tests.support.real_run import SCRIPTED

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SETTINGS = SCRIPTED | {
    "trainer__steps": 10_000,
    "checkpoint__every": 2,
    "recovery__backoff_s": 0.01,
    "eval__n": 1,
    "rollout__filter__zero_variance": True,
    "reward__function": "tests.support.user_rewards:equal_on_even_rows",
}


def assert_filtered(run):
    groups = run.summary["groups"]
    assert conserved(groups)
    assert groups["filtered"] >= groups["trained"] // 2, "about every other one"
    rows = [int(group.partition(".")[0].partition("-")[2]) for step in run.trained for group in step["groups"]]
    assert all(row % 2 for row in rows), "no group without variance was trained"
    assert sum(row["groups_filtered"].get("zero_variance", 0) for row in run.rows) > 0


def test_filtered_groups_are_counted_once_whatever_dies_and_after_a_restore(start_run, resume_run, tmp_path):
    run = start_run(**SETTINGS, rollout__replicas=2)
    run.wait_for_step(3)
    run.one("RolloutActor").kill()
    run.wait_for_step(len(run.rows) + 2)
    run.one("QueueProcess").kill()
    run.wait_for_step(len(run.rows) + 3)
    run.process.terminate()
    assert run.wait() == 130, run.output
    assert_filtered(run)
    check(run, tmp_path, scripted=True)
    filtered, last = run.summary["groups"]["filtered"], run.rows[-1]["step"] + 3

    resumed = resume_run(**SETTINGS | {"trainer__steps": last}, rollout__replicas=2)
    assert resumed.wait() == 0, resumed.output
    assert resumed.summary["groups"]["filtered"] >= filtered
    assert_filtered(resumed)
    check(resumed, tmp_path, scripted=True)


def test_a_run_that_filters_everything_ends_and_says_what_to_set(start_run):
    right = {"reward__function": "tests.support.user_rewards:always_right"}
    run = start_run(**SETTINGS | right, watchdog__stall_s=5, watchdog__abort_s=60)  # holds for the start as well
    assert run.wait() == 1, run.output
    run.assert_nothing_left()
    assert run.events("groups_filtered")
    assert "more than rollout.filter.max_share = 0.95 of the last 200 groups" in run.summary["exit_reason"]
    groups = run.summary["groups"]
    assert conserved(groups)
    assert groups["trained"] == 0
    assert groups["filtered"] >= 200
