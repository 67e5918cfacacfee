"""Marks for tests of what not every environment has."""

import importlib.util
import sys
from pathlib import Path

import pytest

NEEDS_SGLANG = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="requirements/sglang.txt is not installed"
)


def _in_venv(python: Path, lock: str, target: str) -> pytest.MarkDecorator:
    """Skip a test where the virtual environment of a Python that ``make`` makes from a lock is not there."""
    installed = (python.parents[1] / ".installed").exists()
    return pytest.mark.skipif(not installed, reason=f"requirements/{lock} is not installed (make {target})")


ENVIRONMENTS_PYTHON = Path(f"{sys.prefix}-environments", "bin", "python")
"""The Python that has requirements/environments.txt; ``make test`` makes it."""

NEEDS_ENVIRONMENTS = _in_venv(ENVIRONMENTS_PYTHON, "environments.txt", "environments")

VERIFIERS_PYTHON = Path(f"{sys.prefix}-verifiers", "bin", "python")
"""The Python that has requirements/verifiers.txt: verifiers 0.3 and OpenEnv; ``make test-all`` makes it."""

NEEDS_VERIFIERS = _in_venv(VERIFIERS_PYTHON, "verifiers.txt", "verifiers")

VERIFIERS_V1_PYTHON = Path(f"{sys.prefix}-verifiers-v1", "bin", "python")
"""The Python that has requirements/verifiers-v1.txt: verifiers 0.4; ``make test-all`` makes it."""

NEEDS_VERIFIERS_V1 = _in_venv(VERIFIERS_V1_PYTHON, "verifiers-v1.txt", "verifiers")
