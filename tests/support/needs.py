"""Marks for tests of what not every environment has."""

import importlib.util
import sys
from pathlib import Path

import pytest

NEEDS_SGLANG = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="requirements/sglang.txt is not installed"
)

ENVIRONMENTS_PYTHON = Path(f"{sys.prefix}-environments", "bin", "python")
"""The Python that has requirements/environments.txt; ``make test`` makes it."""

NEEDS_ENVIRONMENTS = pytest.mark.skipif(
    not (ENVIRONMENTS_PYTHON.parents[1] / ".installed").exists(),
    reason="requirements/environments.txt is not installed (make environments)",
)
