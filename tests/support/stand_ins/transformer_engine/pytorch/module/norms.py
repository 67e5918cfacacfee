"""Norms over the last dimension, computed in float32."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from transformer_engine.pytorch.module.base import TransformerEngineBaseModule


def normalize(kind: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float):
    wide = x.float()
    if kind == "RMSNorm":
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)
    return F.layer_norm(wide, x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


class _Norm(TransformerEngineBaseModule):
    def __init__(
        self,
        normalized_shape: Iterable[int] | int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if zero_centered_gamma:
            raise NotImplementedError("the stand-in for Transformer Engine has no zero_centered_gamma")
        if (normalized_shape is None) == (hidden_size is None):
            raise RuntimeError("One of `normalized_shape` and `hidden_size` args must be provided")
        self.eps = eps
        shape = hidden_size if normalized_shape is None else normalized_shape
        device = kwargs.pop("device", None)
        dtype = kwargs.pop("dtype", params_dtype)
        assert not kwargs, kwargs
        self.weight = torch.nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        self.bias = None
        if type(self).__name__ == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        if sequence_parallel is not None:
            for parameter in self.parameters():
                parameter.sequence_parallel = sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalize(type(self).__name__, x, self.weight, self.bias, self.eps)


class RMSNorm(_Norm):
    pass


class LayerNorm(_Norm):
    pass
