"""Settings for memory reach Megatron's configuration objects, and those that a CPU has do what they say."""

import sys
import types
from unittest.mock import patch

import numpy as np
import pytest

from async_rl.config.loading import with_settings
from async_rl.models.config import read_model_config
from tests.support.layouts import TOLERANCE, config_of, make_groups, relative, shared_out

pytestmark = pytest.mark.megatron


class FusedAdam:
    """Has the arguments that Megatron looks for in Transformer Engine's."""

    def __init__(self, master_weight_dtype, exp_avg_dtype, exp_avg_sq_dtype, use_decoupled_grad): ...


DEFAULTS = {
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "offload_modules": [],
    "fine_grained_activation_offloading": False,
    "moe_token_dispatcher_type": "allgather",
    "grad_reduce_in_fp32": True,
    "use_precision_aware_optimizer": False,
    "exp_avg_dtype": "torch.float32",
    "exp_avg_sq_dtype": "torch.float32",
    "optimizer_cpu_offload": False,
    "optimizer_offload_fraction": 0.0,
    "overlap_cpu_optimizer_d2h_h2d": False,
}
AWARE = {"use_precision_aware_optimizer": True}


def on_gpus(config):
    """Return fields of the objects that a run on GPUs would have, with stand-ins for what is not installed here."""
    import torch
    from megatron.core.transformer.moe import moe_utils

    from async_rl.trainer.megatron import arguments, optimizer

    names = ("fused_permute", "fused_permute_with_probs", "fused_sort_chunks_by_index", "fused_unpermute")
    kernels = dict.fromkeys((*names, "fused_sort_chunks_by_index_with_probs"), print)
    engine = types.ModuleType("transformer_engine.pytorch.optimizers")
    engine.FusedAdam = FusedAdam
    version = patch("megatron.core.optimizer.optimizer_config.is_te_min_version", lambda *_: True)
    modules = patch.dict(sys.modules, {engine.__name__: engine})
    with patch.multiple(moe_utils, create=True, **kernels), modules, version:
        model = arguments.transformer_config(config, read_model_config(config.model.path), "cuda")
        reduction = arguments.ddp_config(config, "cuda")
        adam = optimizer.optimizer_config(config.trainer.optimizer, torch.bfloat16)
    assert adam.use_distributed_optimizer
    assert reduction.use_distributed_optimizer
    found = {name: getattr(each, name) for each in (adam, reduction, model) for name in DEFAULTS if hasattr(each, name)}
    return {name: str(value) if isinstance(value, torch.dtype) else value for name, value in found.items()}


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({}, {}),
        (
            {"recompute": "full", "recompute_method": "block", "recompute_num_layers": 3},
            {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
        ),
        (
            {"offload_activations": ["core_attn", "moe_act"]},
            {"offload_modules": ["core_attn", "moe_act"], "fine_grained_activation_offloading": True},
        ),
        ({"moe_dispatcher": "flex"}, {"moe_token_dispatcher_type": "flex"}),
        ({"parallel.dp": 2, "parallel.ep": 2}, {"moe_token_dispatcher_type": "alltoall"}),
        ({"optimizer.gradient_dtype": "bfloat16"}, {"grad_reduce_in_fp32": False}),
        ({"optimizer.second_moment_dtype": "bfloat16"}, AWARE | {"exp_avg_sq_dtype": "torch.bfloat16"}),
        ({"optimizer.first_moment_dtype": "bfloat16"}, AWARE | {"exp_avg_dtype": "torch.bfloat16"}),
        (
            {"optimizer.offload_fraction": 0.25},
            AWARE
            | {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.25}
            | {"overlap_cpu_optimizer_d2h_h2d": True},
        ),
    ],
)
def test_settings_reach_the_objects_that_megatron_gets(ranks, checkpoint, settings, changed):
    base = config_of(checkpoint, {}, model__dtype="bfloat16", resources__device="cuda")
    config = with_settings(base, {f"trainer.{key}": value for key, value in settings.items()})
    assert ranks.call(on_gpus, config) == DEFAULTS | changed


def decays(config):
    """Return (dimensions of the parameters, weight decay) of each of Megatron's parameter groups in a step."""
    import torch
    from megatron.core.optimizer import _get_param_groups

    from async_rl.trainer.megatron.optimizer import optimizer_config, set_groups
    from async_rl.trainer.trainer import Trainer

    trainer = Trainer(config)
    try:
        adam = optimizer_config(config.trainer.optimizer, torch.float32)
        groups = [
            group | {"weight_decay": adam.weight_decay} for group in _get_param_groups(trainer._chunks, adam, None)
        ]
        set_groups(groups, config.trainer.optimizer, lr=0.5)
        assert all(group["lr"] == 0.5 for group in groups)
        return {(each.ndim, group["weight_decay"]) for group in groups for each in group["params"]}
    finally:
        trainer.close()


def test_megatrons_optimizer_does_not_decay_norms(ranks, checkpoint):
    config = config_of(checkpoint, {}, trainer__optimizer__weight_decay=0.1)
    assert ranks.call(decays, config) == {(1, 0.0), (2, 0.1)}


def train(trainer, updates):
    """Return the reports, the weights, the type of gradients, and how often each layer ran in the last update."""
    runs = {}
    for chunk in trainer._chunks:
        for layer in chunk.module.decoder.layers:
            number = layer.layer_number - 1
            layer.mlp.register_forward_hook(lambda *_, n=number: runs.update({n: runs.get(n, 0) + 1}))
    reports = []
    for shares in updates:
        runs.clear()
        reports.append(trainer.train_step(shares[trainer._place.dp], version=4, oldest_version=3))
    weights = {name: None if w is None else w.detach().float().numpy().copy() for name, w in trainer.weights()}
    kinds = {str(p.main_grad.dtype) for chunk in trainer._chunks for p in chunk.parameters()}
    again = {number: count // reports[-1].microbatches for number, count in runs.items()}
    return reports, weights, kinds, again


@pytest.fixture(scope="module")
def updates():
    return [shared_out(make_groups(seed=seed, count=4), 1) for seed in (0, 1)]


@pytest.mark.parametrize(
    ("method", "layers", "layout", "again"),
    [
        ("block", 1, {}, {0: 2, 1: 1, 2: 1, 3: 1}),
        pytest.param("uniform", 2, {}, {0: 2, 1: 2, 2: 2, 3: 2}, marks=pytest.mark.slow),
        pytest.param("block", 2, {"pp": 2, "layers_per_stage": [1, 3]}, {0: 2}, marks=pytest.mark.slow),
    ],
)
def test_so_many_layers_are_computed_again_and_nothing_changes(
    ranks, checkpoint, updates, method, layers, layout, again
):
    plain = ranks.run(train, config_of(checkpoint, {}), updates)[0]
    settings = {"recompute": "full", "recompute_method": method, "recompute_num_layers": layers}
    config = config_of(checkpoint, layout, **{f"trainer__{key}": value for key, value in settings.items()})
    reports, weights, _, runs = ranks.run(train, config, updates)[0]
    assert runs == again
    assert max(relative(weights[name], plain[1][name]) for name in weights) < TOLERANCE
    assert relative([r.loss for r in reports], [r.loss for r in plain[0]]) < TOLERANCE


def test_gradients_in_bfloat16_are_those_in_float32_but_for_their_digits(ranks, checkpoint, updates):
    base = {"model__dtype": "bfloat16", "trainer__tokens_per_microbatch": 400}
    exact, short = (
        ranks.run(train, config_of(checkpoint, {}, **base, trainer__optimizer__gradient_dtype=dtype), updates)[0]
        for dtype in ("float32", "bfloat16")
    )
    assert (exact[2], short[2]) == ({"torch.float32"}, {"torch.bfloat16"})
    norms = [[report.grad_norm for report in side[0]] for side in (exact, short)]
    assert 0 < relative(norms[1][:1], norms[0][:1]) < 1e-3
    np.testing.assert_allclose(norms[1], norms[0], rtol=0.05)  # the second is of weights that differ already
    assert max(relative(short[1][name], exact[1][name]) for name in exact[1]) < 0.05
