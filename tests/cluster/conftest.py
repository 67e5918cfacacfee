"""Hosts for the tests of this folder; every test that needs them is skipped, with the reason, where there are none."""

import contextlib
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, why_unavailable
from tests.cluster.runs import HostRun


@pytest.fixture
def make_hosts(tmp_path):
    """make_hosts(count, cpus=..., gpus=..., ...) -> Hosts; ended with every process when the test is over."""
    if reason := why_unavailable():
        pytest.skip(reason)
    with contextlib.ExitStack() as made:

        def make(count: int, folder: Path = tmp_path / "hosts", **options: int) -> Hosts:
            return made.enter_context(Hosts(count, folder, **options))

        yield make


@pytest.fixture
def run_on(make_hosts, recipe, tmp_path):
    """run_on(hosts, driver=0, join=True, section__key=value, ...) -> HostRun, which ends before its hosts do."""
    with contextlib.ExitStack() as made:

        def start(hosts: Hosts, *, folder: Path = tmp_path, **options) -> HostRun:
            run = HostRun(hosts, recipe, folder, **options)
            made.callback(run.close)
            return run

        yield start
