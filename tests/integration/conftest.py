"""What the integration tests share besides whole runs: trainer ranks, and a small model for them."""

import shutil

import pytest

from tests.support import gpu_layers, model_families
from tests.support.family_probes import MadeOnce
from tests.support.layouts import make_checkpoint
from tests.support.one_rank import make_checkpoints
from tests.support.ranks import Ranks

pytest.register_assert_rewrite("tests.integration.engine_conformance")


@pytest.fixture(scope="session")
def all_ranks():
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def all_gpu_layer_ranks():
    with Ranks(4, gpu_layers.use) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def ranks(all_ranks):
    """Up to four trainer ranks, for whatever layout."""
    yield all_ranks
    renew_if_met(all_ranks)


@pytest.fixture(scope="module")
def gpu_layer_ranks(all_gpu_layer_ranks):
    """The same with the layers of GPUs, on the CPU."""
    yield all_gpu_layer_ranks
    renew_if_met(all_gpu_layer_ranks)


def renew_if_met(ranks):
    # The process groups of each layout leave threads behind, and thousands of those would take the processor from what
    # runs beside. Ranks that had none are kept: each imports Megatron, which takes ten seconds.
    if ranks.met:
        ranks.renew()


@pytest.fixture(scope="module")
def models(ranks, tmp_path_factory):
    """A folder with the small models of ``one_rank`` by name."""
    yield from made(make_checkpoints, ranks, tmp_path_factory)


@pytest.fixture(scope="module")
def checkpoint(ranks, tmp_path_factory):
    """The small model of ``layouts``."""
    yield from made(make_checkpoint, ranks, tmp_path_factory)


@pytest.fixture(scope="module")
def family_folders(ranks, tmp_path_factory):
    """The small model of each family, by the family's name."""
    root = tmp_path_factory.mktemp("families")

    def make(name):
        ranks.call(model_families.make, name, root / name)
        return root / name

    yield MadeOnce(make)
    shutil.rmtree(root)


def made(make, ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    ranks.call(make, folder)
    yield folder
    shutil.rmtree(folder)
