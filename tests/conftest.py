"""Fixtures that several folders share: whole runs with a tiny random model, a Redis server, a folder to fuzz."""

import functools
import signal
from pathlib import Path

import pytest

from tests.support.examples import register_profiles
from tests.support.real_run import Run, make_model, make_recipe
from tests.support.redis_server import RedisServer
from tests.support.tiers import read_part

register_profiles()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell without job control starts what it puts into the background with SIGINT ignored, which programs inherit;
    # a shell script cannot even trap it then.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--part", type=read_part, default=(1, 1), metavar="K/N", help="every Nth file, from the Kth")


def pytest_collection_modifyitems(config, items):
    """Put the files with whole runs first: they take longest, and nothing would run beside one that begins last.

    With ``--part`` leave out the other parts' files.
    """
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)
    part, parts = config.getoption("part")
    files = dict.fromkeys(item.path for item in items)
    mine = set(list(files)[part - 1 :: parts])
    config.hook.pytest_deselected(items=[item for item in items if item.path not in mine])
    items[:] = [item for item in items if item.path in mine]


@pytest.fixture(scope="session")
def redis_server():
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def recipe(tiny_model, tmp_path_factory) -> Path:
    return make_recipe(tmp_path_factory.mktemp("recipe"), tiny_model)


@pytest.fixture
def start_run(recipe, tmp_path):
    """start_run(section__key=value, ...) -> Run; ended with everything below it when the test is over."""
    runs = []

    def start(**settings) -> Run:
        runs.append(Run(recipe, tmp_path, **settings))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


@pytest.fixture
def resume_run(start_run):
    """resume_run(section__key=value, ...) -> Run; starts the run that ended again, from its latest valid checkpoint."""
    return functools.partial(start_run, resume=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder for a file that each example rewrites. Hypothesis refuses a folder per test function."""
    return tmp_path_factory.mktemp("fuzz")
