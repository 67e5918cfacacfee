"""The lock for GPUs is what pyproject.toml resolves to. Reads the package index, and no package."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def test_the_lock_resolves_to_itself():
    checked = subprocess.run([ROOT / "launch" / "lock_gpu.sh", "--check"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
