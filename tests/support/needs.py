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

VERIFIERS_PYTHON = Path(f"{sys.prefix}-verifiers", "bin", "python")
"""The Python that has requirements/verifiers.txt: verifiers 0.3 and OpenEnv; ``make test-all`` makes it."""

NEEDS_VERIFIERS = pytest.mark.skipif(
    not (VERIFIERS_PYTHON.parents[1] / ".installed").exists(),
    reason="requirements/verifiers.txt is not installed (make verifiers)",
)

VERIFIERS_V1_PYTHON = Path(f"{sys.prefix}-verifiers-v1", "bin", "python")
"""The Python that has requirements/verifiers-v1.txt: verifiers 0.4; ``make test-all`` makes it."""

NEEDS_VERIFIERS_V1 = pytest.mark.skipif(
    not (VERIFIERS_V1_PYTHON.parents[1] / ".installed").exists(),
    reason="requirements/verifiers-v1.txt is not installed (make verifiers)",
)
