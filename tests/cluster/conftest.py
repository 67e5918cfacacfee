"""Hosts for the tests of this folder; every test that needs them is skipped, with the reason, where there are none."""

import contextlib
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, why_unavailable
from tests.cluster.runs import HostRun


@pytest.fixture
def make_hosts(tmp_path):
    """make_hosts(count, cpus=..., gpus=..., ...) -> Hosts; ended with every process when the test is over."""
    with contextlib.ExitStack() as made:
        yield _maker(made, tmp_path / "hosts")


@pytest.fixture(scope="module")
def make_shared_hosts(tmp_path_factory):
    """make_shared_hosts(count, ...) -> Hosts for all tests of a module; see ``make_hosts``."""
    with contextlib.ExitStack() as made:
        yield _maker(made, tmp_path_factory.mktemp("shared") / "hosts")


def _maker(made, where):
    if reason := why_unavailable():
        pytest.skip(reason)

    def make(count: int, folder: Path = where, **options) -> Hosts:
        return made.enter_context(Hosts(count, folder, **options))

    return make


@pytest.fixture
def run_on(recipe, tmp_path):
    """run_on(hosts, driver=0, join=True, section__key=value, ...) -> HostRun, which ends with the test."""
    with contextlib.ExitStack() as made:

        def start(hosts: Hosts, *, folder: Path = tmp_path, **options) -> HostRun:
            folder.mkdir(exist_ok=True)
            run = HostRun(hosts, recipe, folder, **options)
            made.callback(run.close)
            return run

        yield start
