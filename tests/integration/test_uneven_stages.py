"""Stages with different numbers of layers compute what one rank computes, and load each other's checkpoints."""

import numpy as np
import pytest
import torch

from async_rl.driver import checkpoint_folder
from tests.integration.conftest import made
from tests.support.layouts import (
    TOLERANCE,
    config_of,
    differences,
    make_checkpoint,
    make_groups,
    relative,
    shared_out,
    train_and_probe,
    without_routing,
)

pytestmark = pytest.mark.megatron

LAYERS = 7
SLOW = pytest.mark.slow
LAYOUTS = {
    "4+3": {"pp": 2},
    "2+5": {"pp": 2, "layers_per_stage": [2, 5]},
    "2+2|2+1": {"pp": 2, "vpp": 2},
    "1+3|1+2, dp 2": {"dp": 2, "pp": 2, "vpp": 2, "layers_per_stage": [1, 3, 1, 2]},
    "2+3+2": {"pp": 3},
    "tp 2, ep 2, 3+4": {"tp": 2, "ep": 2, "pp": 2, "layers_per_stage": [3, 4]},
}
QUICK = ("1+3|1+2, dp 2",)


def make_seven_layers(folder):
    make_checkpoint(folder, LAYERS, dense=(1, 3, 4, 6))  # three MoE layers, as in ``layouts.SPEC``


def make_dense_layers(folder):
    make_checkpoint(folder, LAYERS, dense=range(LAYERS))


@pytest.fixture(scope="module")
def seven_layers(ranks, tmp_path_factory):
    yield from made(make_seven_layers, ranks, tmp_path_factory)


@pytest.fixture(scope="module")
def batches():
    return [make_groups(seed=seed, count=4) for seed in (0, 1, 2)]


@pytest.fixture(scope="module")
def alone(ranks, seven_layers, batches):
    return ranks.run(train_and_probe, config_of(seven_layers, {}), [shared_out(batch, 1) for batch in batches])[0]


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else SLOW) for name in LAYOUTS])
def test_uneven_stages_compute_what_one_rank_computes(ranks, seven_layers, batches, alone, name):
    layout = LAYOUTS[name]
    config = config_of(seven_layers, layout, trainer__recompute="full" if "1" in name else "none")
    updates = [shared_out(batch, layout.get("dp", 1)) for batch in batches]
    found = ranks.run(train_and_probe, config, updates)[0]
    apart = differences(found, alone)
    assert list(found[1]) == list(alone[1])
    assert max(apart.values()) < TOLERANCE


def update(trainer, shares):
    return trainer.train_step(shares[trainer._place.dp], version=4, oldest_version=3)


def weights_of(trainer):
    return {name: None if w is None else w.detach().numpy().copy() for name, w in trainer.weights()}


def train_and_save(trainer, saved, later, folder):
    update(trainer, saved)
    partial = checkpoint_folder.unfinished(folder, 1)
    if trainer._place.rank == 0:
        checkpoint_folder.begin(folder, 1)
    torch.distributed.barrier()
    entries = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(entries, trainer.begin_save(partial).finish())
    if trainer._place.rank == 0:
        checkpoint_folder.commit(partial, {name: one for each in entries for name, one in each.items()}, keep=1)
    torch.distributed.barrier()
    return weights_of(trainer), update(trainer, later), weights_of(trainer)


def restore_and_train(trainer, later, folder):
    trainer.load(checkpoint_folder.latest_valid(folder))
    return weights_of(trainer), update(trainer, later), weights_of(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_seven_layers, make_dense_layers])
@pytest.mark.parametrize(
    ("writes", "reads"),
    [
        ({}, {"pp": 2, "layers_per_stage": [2, 5]}),
        ({"pp": 2, "vpp": 2, "layers_per_stage": [1, 3, 1, 2]}, {"pp": 2}),
        ({"pp": 3}, {"tp": 2}),
    ],
)
def test_a_checkpoint_moves_between_even_and_uneven_stages(ranks, tmp_path, batches, make, writes, reads):
    """A dense model's checkpoint numbers layers in another way than that of a mixture; see Megatron's layer blocks."""
    ranks.call(make, tmp_path / "model")
    replay = "R3" if make is make_seven_layers else "off"
    first, second = ([batch if replay == "R3" else list(map(without_routing, batch))] for batch in batches[:2])
    configs = [config_of(tmp_path / "model", layout, trainer__router_replay=replay) for layout in (writes, reads)]
    saved, report, end = ranks.run(train_and_save, configs[0], first, second, tmp_path / "saved")[0]
    loaded, again, end_again = ranks.run(restore_and_train, configs[1], second, tmp_path / "saved")[0]
    for name, weight in saved.items():
        np.testing.assert_array_equal(loaded[name], weight, err_msg=name)
    assert relative([again.loss], [report.loss]) < TOLERANCE
    assert relative([again.grad_norm], [report.grad_norm]) < TOLERANCE
    assert max(relative(end_again[name], end[name]) for name in end) < TOLERANCE
