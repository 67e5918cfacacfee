"""A checkpoint is exported from its files, with the layers of GPUs or of a CPU, and restored with the same.

Real Megatron over gloo writes it; Transformer Engine is a stand-in (``tests/support/stand_ins``).
"""

import numpy as np
import pytest

from async_rl.driver.export import export
from async_rl.errors import CheckpointError
from async_rl.models.config import read_model_config
from async_rl.trainer.megatron.checkpoint_weights import CheckpointWeights
from tests.support.family_probes import family_config
from tests.support.layouts import LAYOUTS, TOLERANCE, config_of, largest, make_groups, relative, shared_out
from tests.support.model_families import FAMILIES
from tests.support.trainer_checkpoints import (
    SETTINGS,
    restore_and_train,
    save_and_write,
    save_in_tp2_x_pp2,
    train_and_save,
)

pytestmark = [pytest.mark.megatron, pytest.mark.slow]


@pytest.fixture(params=["local", "transformer_engine"])
def layers(request):
    return request.param


@pytest.fixture
def layer_ranks(layers, request):
    return request.getfixturevalue("ranks" if layers == "local" else "gpu_layer_ranks")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["alone", "TP2 x EP2 x PP2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_exported_is_what_the_trainer_would_write(layer_ranks, family_folders, tmp_path, name, layout, dtype):
    config = family_config(family_folders[name], name, layout, model__dtype=dtype)
    layer_ranks.run(save_and_write, config, tmp_path / "saved", tmp_path / "written")
    export(tmp_path / "saved", tmp_path / "out")
    files = [{path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("written", "out")]
    assert files[0] == files[1]


def test_another_type_of_parameters_may_be_asked_for(ranks, family_folders, tmp_path):
    """The bias of the experts stays float32, as in a trainer of that type."""
    name = "DeepSeek-V3"
    ranks.run(
        save_and_write, family_config(family_folders[name], name, "alone"), tmp_path / "saved", tmp_path / "float32"
    )
    other = family_config(family_folders[name], name, "alone", model__dtype="bfloat16")
    ranks.run(save_and_write, other, tmp_path / "other", tmp_path / "bfloat16")
    export(tmp_path / "saved", tmp_path / "out", {"model.dtype": "bfloat16"})
    files = [{path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("bfloat16", "out")]
    assert files[0] == files[1]


def test_a_checkpoint_that_lacks_weights_is_refused(ranks, family_folders, tmp_path):
    name = "Qwen3-MoE"
    ranks.run(
        save_and_write, family_config(family_folders[name], name, "alone"), tmp_path / "saved", tmp_path / "written"
    )
    weights = CheckpointWeights(tmp_path / "saved", read_model_config(family_folders[name]), "float32")
    experts = "decoder.layers.3.mlp.experts.experts.linear_fc1.weight"
    weights._saved[experts].chunks.pop()
    with pytest.raises(CheckpointError, match=f"has only a part of {experts}"):
        dict(weights)
    del weights._saved[experts]
    with pytest.raises(CheckpointError, match=r"has no weights for model\.layers\.3\.mlp\.experts\.0\.gate_proj"):
        dict(weights)
    with pytest.raises(CheckpointError, match=r"another architecture, .*; set model\.path to its own"):
        export(tmp_path / "saved", tmp_path / "out", {"model.path": str(family_folders["Qwen3"])})


# ---- restored ----


@pytest.fixture(scope="module")
def batches():
    return [make_groups(seed=seed, count=4) for seed in range(4)]


@pytest.fixture(scope="module")
def saved(gpu_layer_ranks, checkpoint, batches, tmp_path_factory):
    """(folder of checkpoints, results of the uninterrupted run) with the layers of GPUs, in TP2 x PP2."""
    return save_in_tp2_x_pp2(gpu_layer_ranks, checkpoint, batches, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("layout", ["alone", "DP2", "EP2", "VPP2", "TP2, ETP2"])
def test_a_run_is_restored_in_another_layout(gpu_layer_ranks, checkpoint, batches, saved, layout):
    folder, (weights, reports, final) = saved
    sizes = LAYOUTS.get(layout, {})
    later = [shared_out(batch, sizes.get("dp", 1)) for batch in batches[2:]]
    config = config_of(checkpoint, sizes, **SETTINGS)
    _, loaded, more, end = gpu_layer_ranks.run(restore_and_train, config, later, folder)[0]
    for name, weight in weights.items():
        np.testing.assert_array_equal(loaded[name], weight, err_msg=name)
    assert largest([r.loss for r in more], [r.loss for r in reports]) < TOLERANCE
    assert max(relative(end[name], final[name]) for name in final) < TOLERANCE


def test_a_trainer_with_other_layers_says_how_to_go_on(ranks, gpu_layer_ranks, checkpoint, saved, tmp_path):
    ways_out = r"set resources\.device to what it was, or begin a new run .*`async-rl export .*step-000002 FOLDER`"
    with pytest.raises(
        CheckpointError, match=rf"Transformer Engine's layers, which a GPU has, and .* CPU has: {ways_out}"
    ):
        ranks.run(restore_and_train, config_of(checkpoint, {}, **SETTINGS), [], saved[0])
    updates = [shared_out(make_groups(seed=0, count=4), 1)] * 2
    ranks.run(train_and_save, config_of(checkpoint, {}, **SETTINGS), updates, [], tmp_path)
    with pytest.raises(CheckpointError, match=rf"which a CPU has, and .* which a GPU has: {ways_out}"):
        gpu_layer_ranks.run(restore_and_train, config_of(checkpoint, {}, **SETTINGS), [], tmp_path)


def test_the_trained_model_is_exported(saved, tmp_path):
    from safetensors.numpy import load_file

    folder, (weights, _, _) = saved
    assert export(folder, tmp_path / "out") == folder / "step-000002"
    exported = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    assert exported.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(exported[name], weight, err_msg=name)
