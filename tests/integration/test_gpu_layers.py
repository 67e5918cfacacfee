"""The layers of GPUs, which are Transformer Engine's, compute what Megatron's own layers on a CPU do.

Real Megatron over gloo, float32. Transformer Engine is a stand-in in plain torch (``tests/support/stand_ins``), so this
shows what Megatron and the trainer make of its modules: names, layouts, marks on parameters, replay. Of its kernels it
shows nothing.

`pytest -s` prints the tables that docs/evidence/trainer.md quotes.
"""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.support import gpu_layers, model_families
from tests.support.family_probes import (
    LAYOUTS as FAMILY_LAYOUTS,
)
from tests.support.family_probes import (
    TF32_TOLERANCE,
    MadeOnce,
    assert_same_tensors,
    family_config,
    furthest,
    look,
    sequences,
    write_folder,
)
from tests.support.layouts import (
    LAYOUTS,
    TOLERANCE,
    VOCAB,
    config_of,
    differences,
    make_groups,
    relative,
    shared_out,
    train_and_probe,
)
from tests.support.model_families import DENSE, FAMILIES
from tests.support.ranks import Ranks
from tests.support.trainer_checkpoints import save_and_write

pytestmark = pytest.mark.megatron

SLOW = pytest.mark.slow
# `make test` has latent attention, whose modules differ most between the two, in the layout that marks matter in.
QUICK = ("DeepSeek-V3", "TP2")


def cases(layouts):
    pairs = itertools.product(FAMILIES, layouts)
    return [pytest.param(*pair, marks=() if pair == QUICK else SLOW) for pair in pairs]


def look_at_layers(trainer, *arguments):
    """Do what ``look`` does, and return the names of the classes that the model is made of too."""
    return look(trainer, *arguments), {type(module).__name__ for chunk in trainer._chunks for module in chunk.modules()}


# The experts that the routers would choose are forced on both, so that rounding changes none.
def forced_routing(name, ids):
    if name in DENSE:
        return None
    settings = model_families.configs()[name]
    experts = getattr(settings, "n_routed_experts", None) or getattr(settings, "num_local_experts", None)
    experts = experts or settings.num_experts
    layers = {"Qwen3-MoE": 3, "Mixtral": 4}.get(name, 3)
    rng = np.random.default_rng(3)
    order = rng.random((sum(map(len, ids)) - len(ids), layers, experts)).argsort(-1)
    rows = order[..., : settings.num_experts_per_tok].astype(np.int32)
    return np.split(rows, np.cumsum([len(one) - 1 for one in ids])[:-1])


def questions(name):
    ids = sequences()
    return ids, forced_routing(name, ids), model_families.token_weights(ids)


@pytest.fixture(scope="module")
def local(ranks, family_folders):
    """What Megatron's own layers compute on one rank."""

    def computed(name):
        config = family_config(family_folders[name], name, "alone")
        result, layers = ranks.run(look_at_layers, config, *questions(name))[0]
        assert not any(kind.startswith("TE") for kind in layers)
        return result

    return MadeOnce(computed)


@pytest.mark.parametrize(("name", "layout"), cases(FAMILY_LAYOUTS))
def test_a_family_computes_the_same_with_the_layers_of_gpus(gpu_layer_ranks, family_folders, local, name, layout):
    config, expected = family_config(family_folders[name], name, layout), local[name]
    found, layers = gpu_layer_ranks.run(look_at_layers, config, *questions(name))[0]
    assert {"TEDotProductAttention", "TERowParallelLinear"} < layers
    assert name in DENSE or "TEGroupedMLP" in layers
    apart = furthest(found[0], expected[0])
    scale = max(np.abs(gradient).max() for gradient in expected[2].values())
    worst = max(np.abs(found[2][key] - gradient).max() / scale for key, gradient in expected[2].items())
    norms = relative(found[3], expected[3])
    print(f"\n  {name:12} {layout:16} log-probs {apart:.1e} gradients {worst:.1e} norm {norms:.1e}")
    assert found[2].keys() == expected[2].keys()
    assert max(apart, worst, norms) < TOLERANCE
    if name not in DENSE:
        same = np.concatenate([np.sort(a, -1) == np.sort(b, -1) for a, b in zip(found[1], expected[1], strict=True)])
        assert same.all(-1).mean() > 0.98, "the routers agree too, but for rounding"


@pytest.fixture(scope="module")
def tf32_rank():
    with Ranks(1, gpu_layers.use_in_tf32) as ranks:
        yield ranks


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_float32_on_gpus_has_products_in_tf32(tf32_rank, family_folders, local, name):
    """What tests/gpu may expect of the real ones: they differ by more than the rounding of float32."""
    config, expected = family_config(family_folders[name], name, "alone"), local[name]
    found = tf32_rank.run(look, config, *questions(name))[0]
    apart = furthest(found[0], expected[0])
    print(f"\n  {name:12} in TF32: log-probs {apart:.1e}")
    assert TOLERANCE < apart < TF32_TOLERANCE / 2


# All that trainer.recompute_modules takes, by the families that have it. One of them, moe_act, only these layers have.
RECOMPUTED = {
    "Qwen3-MoE": ["core_attn", "mlp", "layernorm", "moe_act"],
    "DeepSeek-V3": ["core_attn", "mlp", "layernorm", "moe_act", "shared_experts", "mla_up_proj"],
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", FAMILY_LAYOUTS)
@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputing_any_module_changes_nothing(gpu_layer_ranks, family_folders, local, name, layout):
    settings = {"trainer__recompute": "selective", "trainer__recompute_modules": RECOMPUTED[name]}
    config, expected = family_config(family_folders[name], name, layout, **settings), local[name]
    found = gpu_layer_ranks.run(look, config, *questions(name))[0]
    scale = max(np.abs(gradient).max() for gradient in expected[2].values())
    assert max(np.abs(found[2][key] - gradient).max() / scale for key, gradient in expected[2].items()) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["alone", "TP2 x EP2 x PP2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_is_bit_exact(gpu_layer_ranks, family_folders, tmp_path, name, layout):
    gpu_layer_ranks.run(write_folder, family_config(family_folders[name], name, layout), tmp_path / "out")
    assert_same_tensors(family_folders[name], tmp_path / "out")


# ---- exported ----


# Megatron's absence is what a None among the modules means to Python.
EXPORT = """
import sys
from pathlib import Path
sys.modules["megatron"] = sys.modules["transformer_engine"] = None
from async_rl.driver.export import export
export(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_checkpoint_of_gpus_is_exported_without_megatron(gpu_layer_ranks, family_folders, tmp_path):
    """Latent attention and experts: most of their tensors have other names there than with Megatron's own layers."""
    config = family_config(family_folders[QUICK[0]], *QUICK)
    gpu_layer_ranks.run(save_and_write, config, tmp_path / "saved", tmp_path / "written")
    command = [sys.executable, "-c", EXPORT, tmp_path / "saved", tmp_path / "out"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_tensors(family_folders[QUICK[0]], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "written").iterdir()
    )


# ---- updates, in every layout ----


@pytest.fixture(scope="module")
def batches():
    # The last rank of a data-parallel layout gets nothing in the third update.
    return [make_groups(seed=seed, count=count) for seed, count in ((0, 6), (1, 6), (2, 1))]


@pytest.fixture(scope="module")
def alone(ranks, checkpoint, batches):
    (result,) = ranks.run(train_and_probe, config_of(checkpoint, {}), [shared_out(batch, 1) for batch in batches])
    return result


RECOMPUTE = {
    "none": {},
    "full": {"trainer__recompute": "full"},
    "moe": {"trainer__recompute": "selective", "trainer__recompute_modules": ["moe"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", ["alone", *LAYOUTS])
def test_updates_with_replay_are_the_same_in_every_layout(gpu_layer_ranks, checkpoint, batches, alone, name, recompute):
    layout = LAYOUTS.get(name, {})
    updates = [shared_out(batch, layout.get("dp", 1)) for batch in batches]
    # The experts that were executed are compared with those asked for, in all updates and recomputations.
    config = config_of(checkpoint, layout, trainer__verify_replay_steps=len(updates), **RECOMPUTE[recompute])
    found = gpu_layer_ranks.run(train_and_probe, config, updates)[0]
    apart = differences(found, alone)
    print(f"\n  {name:16} {recompute:5} " + " ".join(f"{what} {value:.1e}" for what, value in apart.items()))
    assert list(found[1]) == list(alone[1])
    assert max(apart.values()) < TOLERANCE


def train_and_score(trainer, updates):
    losses = [trainer.train_step(shares[trainer._place.dp], version=4, oldest_version=3).loss for shares in updates]
    return losses, trainer.logprobs(sequences_of(VOCAB), None)


def sequences_of(vocabulary):
    return [ids % vocabulary for ids in sequences()]


@pytest.mark.slow
def test_bfloat16_runs_too(ranks, gpu_layer_ranks, checkpoint, batches):
    """Transformer Engine refuses a parameter of another type than its input, such as a norm that stayed float32."""
    config = config_of(checkpoint, LAYOUTS["TP2 x EP2 x PP2"], model__dtype="bfloat16")
    updates = [shared_out(batch, 1) for batch in batches]
    found, expected = (each.run(train_and_score, config, updates)[0] for each in (gpu_layer_ranks, ranks))
    apart = furthest(found[1], expected[1])
    print(f"\n  bfloat16: log-probs {apart:.1e}, losses {found[0]} and {expected[0]}")
    assert found[0] == pytest.approx(expected[0], abs=0.02)
    assert apart < 0.5


# ---- Megatron's own layers where Transformer Engine is installed ----


def install_with_gemm():
    """Have Megatron find Transformer Engine, of a version whose products it would take on any device."""
    gpu_layers.install()
    import sys
    from types import ModuleType

    from transformer_engine.pytorch.module import base

    def refuse(*_, **__):
        raise AssertionError("a product of Transformer Engine on the CPU")

    base.get_workspace = refuse
    extensions = ModuleType("transformer_engine.pytorch.cpp_extensions")
    extensions.general_gemm = refuse
    sys.modules[extensions.__name__] = extensions


@pytest.mark.slow
def test_a_cpu_computes_the_same_where_transformer_engine_is_installed(checkpoint, batches, alone):
    """An engine host's trainer in tests, `async-rl export`, the demo's warm-up: on a GPU host they have it."""
    with Ranks(1, install_with_gemm) as ranks:
        updates = [shared_out(batch, 1) for batch in batches]
        (found,) = ranks.run(train_and_probe, config_of(checkpoint, {}), updates)
    assert [r.loss for r in found[0]] == [r.loss for r in alone[0]]
    for key, weight in alone[1].items():
        np.testing.assert_array_equal(found[1][key], weight, err_msg=key)
