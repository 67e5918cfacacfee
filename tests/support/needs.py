"""Marks for tests of what not every environment has."""

import importlib.util

import pytest

NEEDS_SGLANG = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="requirements/sglang.txt is not installed"
)
