"""Collectives along the first dimension with their gradients, marks on parameters, and names for random numbers."""

import contextlib
from typing import Any

import torch
import torch.distributed as dist


class CudaRNGStatesTracker:
    """Subclassed by Megatron when it is imported, and used where ``use_te_rng_tracker`` asks for it: nowhere here."""

    def __init__(self) -> None:
        raise NotImplementedError("the stand-in for Transformer Engine tracks no random numbers of GPUs")


def get_all_rng_states() -> Any:
    raise NotImplementedError("the stand-in for Transformer Engine tracks no random numbers of GPUs")


def checkpoint(function: Any, *args: Any, **kwargs: Any):
    raise NotImplementedError("Megatron recomputes with this under FP8 alone, which the stand-in does not have")


def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False):
    """Return a context that changes nothing: the real one keeps FP8's scales apart."""
    return contextlib.nullcontext()


def set_tensor_model_parallel_attributes(tensor: torch.Tensor, is_parallel: bool, dim: int, stride: int) -> None:
    for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
        if hasattr(tensor, name):
            raise RuntimeError(f"the tensor has {name} already")
    tensor.tensor_model_parallel = is_parallel
    tensor.partition_dim = dim
    tensor.partition_stride = stride


def _gathered(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    pieces = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(pieces, tensor.contiguous(), group=group)
    return torch.cat(pieces)


def _scattered_sum(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    total = tensor.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total.chunk(group.size())[group.rank()].contiguous()


class GatherAlongFirstDim(torch.autograd.Function):
    """[N, ...] of each rank to [ranks x N, ...]; the gradients of all ranks are summed, and each gets its part."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return _gathered(tensor, group)

    @staticmethod
    def backward(ctx, gradient):
        return _scattered_sum(gradient, ctx.group), None


class ReduceScatterAlongFirstDim(torch.autograd.Function):
    """Sums [ranks x N, ...] over the ranks, of which each gets its [N, ...]."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return _scattered_sum(tensor, group)

    @staticmethod
    def backward(ctx, gradient):
        return _gathered(gradient, ctx.group), None


class AllReduce(torch.autograd.Function):
    """Sums over the ranks, each of which has the whole gradient."""

    @staticmethod
    def forward(ctx, tensor, group):
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class SumGradient(torch.autograd.Function):
    """Passes its input on, and sums the gradient over the ranks."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return AllReduce.forward(None, gradient, ctx.group), None
