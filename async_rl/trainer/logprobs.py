"""Computes log-probs and entropies of given tokens from logits. Pure: torch only.

The vocabulary may be split over the ranks of a process group, which have equal parts of it in their order. Shapes: T
positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch


class _TokenLogprobs(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    """Keeps the logits and one float per position for the backward pass; softmax is recomputed there."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: float, group: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = logits.float() / temperature
        width = logits.shape[-1]
        index = targets - (0 if group is None else group.rank() * width)
        here = (index >= 0) & (index < width)
        index = index.clamp(0, width - 1)
        chosen = scaled.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        normalizer = scaled.logsumexp(dim=-1)
        if group is not None:
            chosen = _summed(torch.where(here, chosen, 0.0), group)
            normalizer = _logsumexp_over(normalizer, group)
        probabilities = torch.exp(scaled - normalizer.unsqueeze(-1))
        expected = torch.einsum("tv,tv->t", probabilities, scaled)
        entropy = normalizer - (expected if group is None else _summed(expected, group))
        ctx.save_for_backward(logits, index, here, normalizer)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return chosen - normalizer, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, index, here, normalizer = ctx.saved_tensors
        gradient = (gradients[0] / ctx.temperature).unsqueeze(-1)
        result = torch.exp(logits.float() / ctx.temperature - normalizer.unsqueeze(-1)).mul_(-gradient)
        result.scatter_add_(-1, index.unsqueeze(-1), gradient * here.unsqueeze(-1))
        return result.to(logits.dtype), None, None, None


def token_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0, group: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-prob of each target and the entropy at its position under softmax(logits / temperature).

    logits [T, V], or [T, V / ranks] on each rank of ``group``; targets int64[T]. Returns log-probs float32[T]
    (differentiable) and entropies float32[T] (not), the same on every rank. The gradient of the log-probs must be the
    same on every rank too.
    """
    logprobs, entropy = _TokenLogprobs.apply(logits, targets, temperature, group)
    return logprobs, entropy


def _summed(values: torch.Tensor, group: Any) -> torch.Tensor:
    torch.distributed.all_reduce(values, group=group)
    return values


def _logsumexp_over(values: torch.Tensor, group: Any) -> torch.Tensor:
    largest = values.clone()
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    return largest + torch.log(_summed(torch.exp(values - largest), group))
