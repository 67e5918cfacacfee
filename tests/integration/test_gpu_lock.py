"""The locks for GPUs are what pyproject.toml resolves to. Reads the package index, and no package."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("script", ["lock_gpu.sh", "lock_sglang.sh"])
def test_the_lock_resolves_to_itself(script):
    checked = subprocess.run([ROOT / "launch" / script, "--check"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
