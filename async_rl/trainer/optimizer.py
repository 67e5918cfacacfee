"""One optimizer update from accumulated gradients: warm-up, clipping, AdamW; a non-finite gradient is skipped.

Two implementations behind one protocol; the device seam chooses. Knows Megatron's DistributedDataParallel,
which keeps each parameter's summed gradient in ``main_grad``; knows neither loss nor replay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from async_rl.config import OptimizerSection

# Adam's update does not depend on the gradient's scale, but its epsilon and the clipping threshold do; the
# same small number that torch's own clipping adds keeps the quotient finite.
CLIP_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class Update:
    """What one call of ``step`` did. applied is False if the gradient was not finite: parameters are unchanged."""

    grad_norm: float
    lr: float
    applied: bool


class Optimizer(Protocol):
    def step(self) -> Update:
        """Clip, update the parameters, advance the schedule; or skip a non-finite gradient."""
        ...

    def no_update(self) -> Update:
        """What to report where there was nothing to step on."""
        ...


def warmed_up(lr: float, step: int, warmup_steps: int) -> float:
    """Learning rate of optimizer step ``step``, from 0: linear to ``lr`` over the first ``warmup_steps``."""
    return lr if step >= warmup_steps else lr * (step + 1) / warmup_steps


def _parameter_groups(parameters: list[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    # Norm scales are not decayed, as in Megatron's own optimizer: decaying them towards 0 shrinks
    # activations.
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def gradient_norm(parameters: Sequence[torch.nn.Parameter]) -> float:
    """The norm of the whole model's gradient, each of its elements counted once whatever ranks hold it.

    As Megatron-core ``optimizer/clip_grads.py`` counts, which insists on CUDA tensors: of what tensor-parallel ranks
    all have, the first one's; an embedding that the last stage has a copy of, once.
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
        square = torch.stack(torch._foreach_norm(gradients)).double().square().sum() if gradients else torch.tensor(0.0)
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
        lr = warmed_up(self._settings.lr, self._steps, self._settings.warmup_steps)
        gradients = [p.main_grad for p in self._parameters]
        norm = gradient_norm(self._parameters)
        if not math.isfinite(norm):
            return Update(grad_norm=norm, lr=lr, applied=False)
        if norm > self._settings.clip_grad:
            torch._foreach_mul_(gradients, self._settings.clip_grad / (norm + CLIP_EPSILON))
        for group in self._adam.param_groups:
            group["lr"] = lr
        for master, gradient in zip(self._masters, gradients, strict=True):
            master.grad = gradient
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                if parameter is not master:
                    parameter.copy_(master)
        self._steps += 1
        return Update(grad_norm=norm, lr=lr, applied=True)

    def no_update(self) -> Update:
        lr = warmed_up(self._settings.lr, self._steps, self._settings.warmup_steps)
        return Update(grad_norm=0.0, lr=lr, applied=False)


class MegatronAdamW:
    """Megatron's distributed optimizer: sharded states, float32 masters, clipping over the model-parallel groups."""

    def __init__(self, chunks: Sequence[torch.nn.Module], settings: OptimizerSection) -> None:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self._settings = settings
        dtype = next(chunks[0].parameters()).dtype
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(
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
            ),
            list(chunks),
        )
        self._steps = 0

    def step(self) -> Update:
        lr = warmed_up(self._settings.lr, self._steps, self._settings.warmup_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        # Megatron looks for non-finite values only under fp16 loss scaling, so the norm is taken before it
        # steps.
        self._optimizer.prepare_grads()
        norm = float(self._optimizer.get_grad_norm())
        if not math.isfinite(norm):
            return Update(grad_norm=norm, lr=lr, applied=False)
        self._optimizer.step()
        self._steps += 1
        return Update(grad_norm=norm, lr=lr, applied=True)

    def no_update(self) -> Update:
        lr = warmed_up(self._settings.lr, self._steps, self._settings.warmup_steps)
        return Update(grad_norm=0.0, lr=lr, applied=False)
