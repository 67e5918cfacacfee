"""Hosts for the tests of this folder; every test that needs them is skipped, with the reason, where there are none."""

import contextlib
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, why_unavailable


@pytest.fixture
def make_hosts(tmp_path):
    """make_hosts(count, cpus=..., gpus=..., ...) -> Hosts; ended with every process when the test is over."""
    if reason := why_unavailable():
        pytest.skip(reason)
    with contextlib.ExitStack() as made:

        def make(count: int, folder: Path = tmp_path / "hosts", **options: int) -> Hosts:
            return made.enter_context(Hosts(count, folder, **options))

        yield make
