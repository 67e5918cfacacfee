"""Each example of docs/examples runs: two training steps for real, on the tiny random model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from async_rl.config.loading import load
from tests.support.real_run import ROOT

EXAMPLES = sorted(path.parent for path in (ROOT / "docs" / "examples").glob("*/config.yaml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_a_config_a_readme_and_code(example):
    config = load(example / "config.yaml", {})
    assert config.name == example.name
    assert f"docs/examples/{example.name}/config.yaml" in (example / "README.md").read_text()
    assert list(example.glob("*.py"))


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_trains(example, recipe, tmp_path):
    settings = yaml.safe_load(Path(recipe).read_text())
    overrides = {
        "model.path": settings["model"]["path"],
        "data.train": settings["data"]["train"],
        "data.eval": settings["data"]["eval"],
        "runs": str(tmp_path / "runs"),
        "prepare": "null",
        "trainer.steps": "2",
        "trainer.groups_per_step": "2",
        "rollout.n": "2",
        "rollout.max_num_seqs": "8",
        "eval.n": "4",
    }
    run = subprocess.run(
        [sys.executable, "-m", "async_rl.cli", "train", str(example / "config.yaml")]
        + [f"--{key}={value}" for key, value in overrides.items()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(example)])},
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = (tmp_path / "runs" / example.name / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
