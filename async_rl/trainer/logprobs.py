"""Log-probs and entropies of given tokens from logits. Pure: torch only. Shapes: T positions, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch


class _TokenLogprobs(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    """Keeps the logits and one float per position for the backward pass; softmax is recomputed there."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = logits.float() / temperature
        normalizer = scaled.logsumexp(dim=-1)
        logprobs = scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - normalizer
        probabilities = torch.exp(scaled - normalizer.unsqueeze(-1))
        entropy = normalizer - torch.einsum("tv,tv->t", probabilities, scaled)
        ctx.save_for_backward(logits, targets, normalizer)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, targets, normalizer = ctx.saved_tensors
        gradient = (gradients[0] / ctx.temperature).unsqueeze(-1)
        result = torch.exp(logits.float() / ctx.temperature - normalizer.unsqueeze(-1)).mul_(-gradient)
        result.scatter_add_(-1, targets.unsqueeze(-1), gradient)
        return result.to(logits.dtype), None, None


def token_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target and the entropy there, of softmax(logits / temperature), in float32.

    logits [T, V], targets int64[T]; returns float32[T] (differentiable) and float32[T] (not).
    """
    logprobs, entropy = _TokenLogprobs.apply(logits, targets, temperature)
    return logprobs, entropy
