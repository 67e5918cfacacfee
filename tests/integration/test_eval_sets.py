"""Evaluation sets of whole runs with the scripted engine, over kills: real broker, Ray, driver and trainer."""

import collections
import json
import os

import pytest

from tests.support.real_run import SCRIPTED

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def lines(run, name):
    return [json.loads(line) for line in (run.folder / name).read_text().splitlines()]


def test_each_set_has_one_result_for_each_version_over_a_kill_of_the_run(start_run, resume_run, recipe):
    """The kill comes while a version may be evaluated, whose checkpoint is written."""
    settings = {
        **SCRIPTED,
        "eval__n": 4,
        "eval__every": 1,
        "eval__sets__own__path": recipe.parent / "eval.jsonl",
        "eval__sets__own__k": 3,
        "eval__sets__own__limit": 4,
        "checkpoint__every": 1,
        "checkpoint__keep": 1,
        "checkpoint__keep_best": "own",
        "checkpoint__on_sigterm_s": 0,  # in which the step would end, and with it the version that is evaluated
    }
    run = start_run(trainer__steps=10_000, **settings)
    run.wait_for_step(3)
    os.kill(run.driver, 9)
    assert run.wait() == 137
    run.assert_nothing_left()
    steps = len(run.rows) + 3
    run = resume_run(trainer__steps=steps, **settings)
    assert run.wait() == 0, run.output
    run.assert_nothing_left()
    recorded = collections.Counter((line["set"], line["policy_version"]) for line in lines(run, "evals.jsonl"))
    assert set(recorded.values()) == {1}
    versions = range(run.summary["policy_version"] + 1)
    assert set(recorded) == {(name, version) for name in ("held_out", "own") for version in versions}
    shown = [row["eval_version"].get("own") for row in run.rows]
    shown = [version for version in shown if version is not None]
    assert shown == sorted(set(shown))
    last = run.summary["eval_sets"]["own"]["last"]
    assert (last["policy_version"], last["k"], last["problems"]) == (steps, 3, 4)
    assert run.summary["eval"]["last"] == run.summary["eval_sets"]["held_out"]["last"]["avg"]["mean"]
    assert "best_checkpoint" in run.summary
    assert {line["set"] for line in lines(run, "eval_samples.jsonl")} == {"held_out", "own"}
