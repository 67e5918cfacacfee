"""Provides RMSNorm for Megatron's local layer specification.

torch's own is decomposed into a dozen passes over memory on the CPU and takes twice as long, and Megatron 0.16.1's
wrapper around it refuses sequence parallelism. Knows Megatron's module interface, nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class _RMSNormFunction(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    """Computes y = w * x / rms(x) over the last dimension; keeps x and one number per row for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        # A norm is one pass without a temporary; its square over D is the mean square.
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        # With u = x * inverse and g = gradient * w:  dw = sum(gradient * u),  dx = inverse * (g - u * mean(g * u)).
        x, weight, inverse = ctx.saved_tensors
        gradient = gradient.float()
        unit = x.float() * inverse
        product = gradient * unit
        weight_gradient = product.sum(dim=tuple(range(x.ndim - 1)))
        mean = (product @ weight.float()).div_(x.shape[-1]).unsqueeze(-1)
        x_gradient = (gradient * weight).addcmul_(unit, mean, value=-1).mul_(inverse)
        return x_gradient.to(x.dtype), weight_gradient.to(weight.dtype), None


class RMSNorm(torch.nn.Module):  # type: ignore[misc]  # torch has no types here
    """A norm with the constructor that Megatron calls: RMSNorm(config=..., hidden_size=..., eps=...)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums this parameter's gradient over the tensor-parallel ranks if they split the sequence.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = _RMSNormFunction.apply(x, self.weight, self.eps)
        return output
