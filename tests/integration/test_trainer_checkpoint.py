"""A real trainer's checkpoints are saved in one layout, restored in another, and exported."""

import inspect
import multiprocessing
import os
import shutil

import numpy as np
import pytest
import torch

from async_rl.driver import checkpoint_folder
from async_rl.driver.export import export
from async_rl.errors import CheckpointDamaged, CheckpointError
from tests.support.layouts import (
    LAYOUTS,
    TOLERANCE,
    config_of,
    largest,
    make_checkpoint,
    make_groups,
    relative,
    shared_out,
)
from tests.support.ranks import run_config
from tests.support.trainer_checkpoints import SETTINGS, restore_and_train, save_in_tp2_x_pp2

pytestmark = [pytest.mark.megatron, pytest.mark.slow]


@pytest.fixture(scope="module")
def batches():
    return [make_groups(seed=seed, count=4) for seed in range(4)]


@pytest.fixture(scope="module")
def saved(ranks, checkpoint, batches, tmp_path_factory):
    """(folder of checkpoints, results of the uninterrupted run), in TP2 x PP2."""
    return save_in_tp2_x_pp2(ranks, checkpoint, batches, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize(
    "layout",
    [
        "alone",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("DP2", "EP2", "VPP2", "TP2, ETP2", "TP2 x PP2")),
    ],
)
def test_saved_in_tp2_x_pp2_and_restored_in_another_layout(ranks, checkpoint, batches, saved, layout):
    folder, (weights, reports, final) = saved
    sizes = {"alone": {}, "TP2 x PP2": {"tp": 2, "pp": 2}}.get(layout) or LAYOUTS.get(layout, {})
    later = [shared_out(batch, sizes.get("dp", 1)) for batch in batches[2:]]
    found, loaded, more, end = ranks.run(restore_and_train, config_of(checkpoint, sizes, **SETTINGS), later, folder)[0]
    assert found == 2
    for name, weight in weights.items():
        np.testing.assert_array_equal(loaded[name], weight, err_msg=name)
    assert largest([r.loss for r in more], [r.loss for r in reports]) < TOLERANCE
    assert largest([r.grad_norm for r in more], [r.grad_norm for r in reports]) < TOLERANCE
    assert [r.lr for r in more] == [r.lr for r in reports], "the schedule continues where it was"
    # What Adam's moments would not be without.
    assert max(relative(end[name], final[name]) for name in final) < TOLERANCE


def test_the_same_layout_restores_bit_for_bit(ranks, checkpoint, batches, saved):
    folder, (_, reports, final) = saved
    config = config_of(checkpoint, {"tp": 2, "pp": 2}, **SETTINGS)
    _, _, more, end = ranks.run(restore_and_train, config, [shared_out(batch, 1) for batch in batches[2:]], folder)[0]
    assert [r.loss for r in more] == [r.loss for r in reports]
    for name, weight in final.items():
        np.testing.assert_array_equal(end[name], weight, err_msg=name)


def processes_for_a_save(trainer, folder):
    folder.mkdir(exist_ok=True)
    forks = []
    os.register_at_fork(before=lambda: forks.append(True))
    written = trainer.begin_save(folder).finish()
    return len(forks), len(multiprocessing.active_children()), sum(name.endswith(".distcp") for name in written)


def test_a_checkpoint_is_written_without_forking(ranks, checkpoint, tmp_path):
    """A process with threads must not be forked, which Megatron-core 0.16.1 does: remove the fix once it does not.

    Nor may the save start another process, which would outlive it.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    upstream = inspect.getsource(filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc)
    assert 'get_context("fork")' in upstream
    assert ranks.run(processes_for_a_save, config_of(checkpoint, {"dp": 2}), tmp_path / "saved") == [(0, 0, 2)] * 2, (
        "both write: data-parallel ranks share what they have alike"
    )


def save_to(trainer, folder):
    partial = checkpoint_folder.unfinished(folder, 1)
    if trainer._place.rank == 0:
        checkpoint_folder.begin(folder, 1)
    torch.distributed.barrier()
    if trainer._place.rank == 1:
        # Megatron names a rank's files after it: a folder in the place of one cannot be written.
        (partial / "__1_0.distcp").mkdir()
    save = trainer.begin_save(partial)
    with pytest.raises(CheckpointError, match=r"cannot be written: trainer rank 1: .*Is a directory.*__1_0.*`runs`"):
        save.finish()


def test_a_rank_that_cannot_write_is_named_by_all_and_none_waits_for_it(ranks, checkpoint, tmp_path):
    ranks.run(save_to, config_of(checkpoint, {"dp": 2}), tmp_path)


def test_a_damaged_checkpoint_is_passed_over(ranks, checkpoint, saved, tmp_path):
    folder, (weights, _, _) = saved
    shutil.copytree(folder, tmp_path / "copy")
    victim = max((tmp_path / "copy" / "step-000002").glob("*.distcp"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-100])
    found, loaded, _, _ = ranks.run(restore_and_train, config_of(checkpoint, {}), [], tmp_path / "copy")[0]
    assert found == 1
    assert any((loaded[name] != weight).any() for name, weight in weights.items())


def load_damaged(trainer, path):
    with pytest.raises(CheckpointDamaged, match=r"distcp has another checksum than when it was written"):
        trainer.load(path)
    return True


def test_every_rank_refuses_a_checkpoint_of_which_one_byte_changed(ranks, checkpoint, saved, tmp_path):
    """Also a rank that needs nothing of that file: the ranks load the same checkpoint or none."""
    shutil.copytree(saved[0], tmp_path / "copy")
    victim = max((tmp_path / "copy" / "step-000002").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    config = config_of(checkpoint, {"dp": 2})
    assert ranks.run(load_damaged, config, tmp_path / "copy" / "step-000002") == [True, True]
    ranks.call(export, tmp_path / "copy", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists(), "of the checkpoint before"
    with pytest.raises(CheckpointDamaged):
        ranks.call(export, tmp_path / "copy" / "step-000002", tmp_path / "out2")


def other_model(folder):
    import json

    make_checkpoint(folder)
    from safetensors.numpy import load_file, save_file

    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if ".layers.3." not in k}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values["num_hidden_layers"] = 3
    values["layer_types"] = None
    (folder / "config.json").write_text(json.dumps(values))


def test_a_checkpoint_of_another_model_is_refused(ranks, saved, tmp_path):
    folder, _ = saved
    ranks.call(other_model, tmp_path / "other")
    with pytest.raises(
        CheckpointError, match=r"step-000002 does not fit .*other: it is of a model with another num_layers"
    ):
        ranks.run(restore_and_train, run_config(tmp_path / "other"), [], folder)


def test_export_of_a_checkpoint_is_the_trained_model(ranks, saved, tmp_path):
    from safetensors.numpy import load_file

    folder, (weights, _, _) = saved
    source = ranks.call(export, folder, tmp_path / "out")
    assert source == folder / "step-000002"
    exported = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    assert exported.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(exported[name], weight, err_msg=name)
    assert (tmp_path / "out" / "config.json").exists()
    with pytest.raises(CheckpointError, match="not an empty folder"):
        export(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run folder"):
        export(tmp_path / "nothing", tmp_path / "out2")
