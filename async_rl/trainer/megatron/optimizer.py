"""Makes optimizer updates from accumulated gradients: schedule, clipping, AdamW. Non-finite gradients are skipped.

Two implementations behind one protocol; the device seam chooses. Knows Megatron's DistributedDataParallel, which keeps
each parameter's summed gradient in ``main_grad``; knows neither loss nor replay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from async_rl.config.training import OptimizerSection

if TYPE_CHECKING:
    from megatron.core.optimizer import OptimizerConfig

# Keeps the quotient of the clipping finite: the same small number that torch's own clipping adds.
CLIP_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class Update:
    """The outcome of one call of ``step``."""

    grad_norm: float
    """The norm of the gradient before clipping."""
    lr: float
    applied: bool
    """False if the gradient was not finite: parameters are unchanged."""


# The form that Megatron's dist_checkpointing saves and loads: plain values and its ShardedTensors, by name.
ShardedState = dict[str, Any]


class Optimizer(Protocol):
    """Applies accumulated gradients."""

    def step(self) -> Update:
        """Clip, update the parameters, advance the schedule; or skip a non-finite gradient."""
        ...

    def no_update(self) -> Update:
        """Return the report of a step that had no gradient, and change nothing."""
        ...

    def sharded_state(self, model: ShardedState, *, loading: bool) -> ShardedState:
        """Return the optimizer's state for Megatron's distributed checkpointing; ``model`` is the model's.

        With ``loading``, the state is to be filled from a checkpoint and passed to ``load_state``.
        """
        ...

    def load_state(self, state: ShardedState) -> None:
        """Restore a state that ``sharded_state`` made and a checkpoint filled."""
        ...


def learning_rate(settings: OptimizerSection, step: int) -> float:
    """Return the learning rate of optimizer step ``step``, counted from 0.

    It rises linearly to ``lr`` over the first ``warmup_steps``. Then it is constant, or falls to ``min_lr`` at
    ``decay_steps``, linearly or along half a cosine (arXiv:1608.03983).
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant" or settings.decay_steps is None:
        return settings.lr
    done = min(1.0, (step - settings.warmup_steps) / (settings.decay_steps - settings.warmup_steps))
    left = 1.0 - done if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.min_lr + (settings.lr - settings.min_lr) * left


def _parameter_groups(parameters: list[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    # Norm scales are not decayed, as in Megatron's own optimizer: decaying them towards 0 shrinks activations.
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def gradient_norm(parameters: Sequence[torch.nn.Parameter]) -> float:
    """Compute the norm of the whole model's gradient, counting each element once even where several ranks hold it.

    It counts as Megatron-core's ``optimizer/clip_grads.py`` does, which insists on CUDA tensors: where all
    tensor-parallel ranks hold the same, the first one's; an embedding that the last stage has a copy of, once.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    counted = [p for p in parameters if param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p)]
    total = 0.0
    for of_experts, group in (
        (False, parallel_state.get_model_parallel_group()),
        (True, parallel_state.get_expert_tensor_model_pipeline_parallel_group()),
    ):
        gradients = [p.main_grad for p in counted if getattr(p, "allreduce", True) != of_experts]
        # In float32: the norm of a bfloat16 gradient would have three digits.
        norms = torch._foreach_norm(gradients, dtype=torch.float32) if gradients else []
        square = torch.stack(norms).double().square().sum() if gradients else torch.tensor(0.0)
        square = square.to(dtype=torch.float64, device=parameters[0].device)
        torch.distributed.all_reduce(square, group=group)
        total += float(square)
    return math.sqrt(total) if math.isfinite(total) else total


class TorchAdamW:
    """torch's fused AdamW on the CPU, over float32 masters where the parameters are of a smaller type."""

    def __init__(self, chunks: Sequence[torch.nn.Module], settings: OptimizerSection) -> None:
        self._settings = settings
        self._parameters = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
        self._masters = [
            p if p.dtype is torch.float32 else torch.nn.Parameter(p.detach().float()) for p in self._parameters
        ]
        self._adam = torch.optim.AdamW(
            _parameter_groups(self._masters, settings.weight_decay),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )
        self._steps = 0

    def step(self) -> Update:
        lr = learning_rate(self._settings, self._steps)
        gradients = [p.main_grad for p in self._parameters]
        norm = gradient_norm(self._parameters)
        if not math.isfinite(norm):
            return Update(grad_norm=norm, lr=lr, applied=False)
        if norm > self._settings.clip_grad:
            torch._foreach_mul_(gradients, self._settings.clip_grad / (norm + CLIP_EPSILON))
        for group in self._adam.param_groups:
            group["lr"] = lr
        for master, gradient in zip(self._masters, gradients, strict=True):
            master.grad = gradient.to(master.dtype)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                if parameter is not master:
                    parameter.copy_(master)
        self._steps += 1
        return Update(grad_norm=norm, lr=lr, applied=True)

    def no_update(self) -> Update:
        lr = learning_rate(self._settings, self._steps)
        return Update(grad_norm=0.0, lr=lr, applied=False)

    def sharded_state(self, model: ShardedState, *, loading: bool) -> ShardedState:
        from megatron.core.dist_checkpointing.optimizer import (
            get_param_id_to_sharded_param_map,
            make_sharded_optimizer_tensor,
        )

        if loading:
            self._make_moments()
        sharded = get_param_id_to_sharded_param_map(model, iter(self._parameters))
        tensors = {
            f"{kind}.{number}": make_sharded_optimizer_tensor(sharded[number], value, f"optimizer.{kind}")
            for number, master in enumerate(self._masters)
            for kind, value in self._kept(number, master).items()
        }
        return {"steps": self._steps, "tensors": tensors}

    def load_state(self, state: ShardedState) -> None:
        self._steps = state["steps"]
        for number, master in enumerate(self._masters):
            for kind, value in self._kept(number, master).items():
                with torch.no_grad():
                    value.copy_(state["tensors"][f"{kind}.{number}"])
            if self._adam.state[master]:
                self._adam.state[master]["step"].fill_(self._steps)

    def _kept(self, number: int, master: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """Return one parameter's tensors for a checkpoint. Adam has no moments before its first step."""
        state = self._adam.state[master]
        moments = {kind: state[kind] for kind in ("exp_avg", "exp_avg_sq") if kind in state}
        return moments if master is self._parameters[number] else {"master": master.detach(), **moments}

    def _make_moments(self) -> None:
        for master in self._masters:
            self._adam.state[master] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }


def optimizer_config(settings: OptimizerSection, dtype: torch.dtype) -> OptimizerConfig:
    """Translate the settings into Megatron's, for parameters of ``dtype``."""
    from megatron.core.optimizer import OptimizerConfig

    moments = {
        "exp_avg_dtype": getattr(torch, settings.first_moment_dtype),
        "exp_avg_sq_dtype": getattr(torch, settings.second_moment_dtype),
    }
    # The optimizer on the host uses the code of the one that knows types: Megatron's own arguments demand both.
    aware = settings.offload_fraction > 0 or any(each is not torch.float32 for each in moments.values())
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        use_precision_aware_optimizer=aware,
        optimizer_cpu_offload=settings.offload_fraction > 0,
        optimizer_offload_fraction=settings.offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=settings.offload_fraction > 0,
        **(moments if aware else {}),
    )


def set_groups(groups: Sequence[dict[str, Any]], settings: OptimizerSection, lr: float) -> None:
    """Give Megatron's parameter groups their learning rate and weight decay.

    Its groups carry only a factor on the decay, 0 for norms and biases, which Megatron's own scheduler would apply.
    """
    for group in groups:
        group["lr"] = lr
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]


class MegatronAdamW:
    """Megatron's distributed optimizer: sharded states, float32 masters, clipping over the model-parallel groups."""

    def __init__(self, chunks: Sequence[torch.nn.Module], settings: OptimizerSection) -> None:
        from megatron.core.optimizer import get_megatron_optimizer

        self._settings = settings
        config = optimizer_config(settings, next(chunks[0].parameters()).dtype)
        self._optimizer = get_megatron_optimizer(config, list(chunks))
        self._steps = 0

    def step(self) -> Update:
        lr = learning_rate(self._settings, self._steps)
        set_groups(self._optimizer.param_groups, self._settings, lr)
        # Megatron looks for non-finite values only under fp16 loss scaling, so the norm is taken before it steps.
        self._optimizer.prepare_grads()
        norm = float(self._optimizer.get_grad_norm())
        if not math.isfinite(norm):
            return Update(grad_norm=norm, lr=lr, applied=False)
        self._optimizer.step()
        self._steps += 1
        return Update(grad_norm=norm, lr=lr, applied=True)

    def no_update(self) -> Update:
        lr = learning_rate(self._settings, self._steps)
        return Update(grad_norm=0.0, lr=lr, applied=False)

    def sharded_state(self, model: ShardedState, *, loading: bool) -> ShardedState:
        # The form that another data-parallel size can load.
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        return {
            "steps": self._steps,
            "megatron": self._optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata),
        }

    def load_state(self, state: ShardedState) -> None:
        self._steps = state["steps"]
        self._optimizer.load_state_dict(state["megatron"])
