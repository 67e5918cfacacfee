"""The modules for torch, by the names that Megatron-core 0.16.1 takes them from."""

from transformer_engine.pytorch import (
    attention,
    cpu_offload,
    distributed,
    fp8,
    module,
    ops,
    optimizers,
    permutation,
    router,
    tensor,
)
from transformer_engine.pytorch.attention import DotProductAttention
from transformer_engine.pytorch.fp8 import fp8_autocast
from transformer_engine.pytorch.module import GroupedLinear, LayerNorm, LayerNormLinear, Linear, RMSNorm

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "attention",
    "cpu_offload",
    "distributed",
    "fp8",
    "fp8_autocast",
    "module",
    "ops",
    "optimizers",
    "permutation",
    "router",
    "tensor",
]
