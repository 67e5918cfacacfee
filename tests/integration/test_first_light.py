"""The script for the first GPU works, as far as a CPU goes."""

import json
import subprocess
import sys

import pytest

from tests.gpu.first_light import ROOT, attempt

pytestmark = [pytest.mark.engine, pytest.mark.megatron, pytest.mark.slow]

# The others do what test_families.py does, or less than ``kill``, or need GPUs.
STEPS = ["installed", "update", "checkpoint", "speed", "engine", "engine_in_fp8", "kill"]
NEED_A_GPU = ["host_syncs", "nccl"]


def test_each_step_passes_on_a_cpu_or_says_what_it_needs():
    command = [sys.executable, "-m", "tests.gpu.first_light", "--device", "cpu", "--only", *STEPS, *NEED_A_GPU]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = json.loads(finished.stdout.splitlines()[-1])
    statuses = {name: record["status"] for name, record in found["steps"].items()}
    assert statuses == dict.fromkeys(STEPS, "passed") | dict.fromkeys(NEED_A_GPU, "skipped"), finished.stdout
    assert finished.returncode == 0
    assert found["passed"] == len(STEPS)
    assert found["steps"]["host_syncs"]["why"]


def test_a_step_that_fails_says_why(tmp_path):
    record = attempt("no_such_step", "cpu", tmp_path / "step", 100)
    assert record["status"] == "failed"
    assert "ValueError" in record["why"]


def test_a_step_that_hangs_is_ended(tmp_path):
    record = attempt("installed", "cpu", tmp_path / "step", 0.5)
    assert record["status"] == "failed"
    assert "did not end within" in record["why"]
