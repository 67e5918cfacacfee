"""What tests share: of whole runs a tiny random model, a dataset, and a recipe; of fuzzing a folder."""

from pathlib import Path

import pytest

from tests.support.real_run import Run, make_model, make_recipe
from tests.support.redis_server import RedisServer


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

    def resume(**settings) -> Run:
        """Start the same run again, to go on."""
        return start(resume=True, **settings)

    start.again = resume
    yield start
    for run in runs:
        run.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """For a file that each example of a fuzz test writes anew; Hypothesis refuses a folder of one test's own."""
    return tmp_path_factory.mktemp("fuzz")
