"""``async-rl eval`` with the real vLLM engine: a Hugging Face folder, and a checkpoint that a trainer wrote."""

import json
import os
import subprocess
import sys

import psutil
import pytest

from tests.support.real_run import ROOT, SCRIPTED

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def evaluated(recipe, folder, *words):
    """Evaluate, and return the results and the table; nothing is left of the engine."""
    command = [sys.executable, "-m", "async_rl.cli", "eval", str(recipe), "--runs", str(folder), *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=environment, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    mark = str(folder)
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if mark in " ".join(p.info["cmdline"] or ())]
    assert left == [], "left running"
    table, _, last = done.stdout.rstrip("\n").rpartition("\n")
    return json.loads(last), table


def sets(recipe):
    """A set of four problems, three sampled responses each, from the recipe's held-out file."""
    path = recipe.parent / "eval.jsonl"
    words = {"path": str(path), "k": "3", "limit": "4", "top_k": "20", "pass_k": "[1, 2, 3]", "pass_at": "0.5"}
    return [f"--eval.sets.sorted.{key}={value}" for key, value in words.items()]


def test_a_model_folder_is_evaluated_on_every_set(recipe, tmp_path):
    result, table = evaluated(recipe, tmp_path, *sets(recipe))
    held_out, own = result["sets"]["held_out"], result["sets"]["sorted"]
    assert (held_out["problems"], held_out["k"]) == (8, 1)
    assert (own["problems"], own["k"], list(own["pass"])) == (4, 3, ["1", "2", "3"])
    passes = [own["pass"][k]["mean"] for k in "123"]
    assert passes == sorted(passes)
    assert 1 <= own["response_tokens_mean"] <= 120
    assert table.splitlines()[0].startswith("set ")
    again, _ = evaluated(recipe, tmp_path, "--name", "again", *sets(recipe))
    assert again["sets"]["held_out"]["avg"] == held_out["avg"], "greedy"


def test_a_checkpoint_of_a_trainer_is_exported_and_evaluated(start_run, recipe, tmp_path):
    run = start_run(trainer__steps=2, checkpoint__every=1, eval__n=1, **SCRIPTED)
    assert run.wait() == 0, run.output
    step = run.folder / "checkpoints" / "step-000002"
    of_step, _ = evaluated(recipe, tmp_path, "--checkpoint", str(step))
    of_run, _ = evaluated(recipe, tmp_path, "--checkpoint", str(run.folder))
    assert of_step["checkpoint"] == str(step)
    assert of_run["checkpoint"] == str(run.folder / "checkpoints" / "final")
    assert of_step["sets"]["held_out"]["avg"] == of_run["sets"]["held_out"]["avg"], "the same weights"
