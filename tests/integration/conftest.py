"""What the integration tests share besides whole runs: trainer ranks, and a small model for them."""

import shutil

import pytest
from layouts import make_checkpoint
from ranks import Ranks


@pytest.fixture(scope="module")
def ranks():
    """Up to four trainer ranks, for whatever layout."""
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def checkpoint(ranks, tmp_path_factory):
    """The small model of ``layouts``."""
    folder = tmp_path_factory.mktemp("model")
    ranks.call(make_checkpoint, folder)
    yield folder
    shutil.rmtree(folder)
