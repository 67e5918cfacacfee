"""Computes log-probs and entropies of given tokens from logits. Pure: torch only.

The vocabulary may be split over the ranks of a process group, which have equal parts of it in their order. All is
computed in float32, a block of rows at a time, so that no copy of the logits in float32 exists: beside the logits stand
their gradient, in their own type, and a few blocks. Shapes: T positions, V vocabulary, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

# Numbers in a block, 16 MB of float32. It is small against the logits of a real vocabulary, and large enough that a GPU
# spends its time in the kernels and not on launching them.
BLOCK_SIZE = 2**22


class _TokenLogprobs(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    """Keeps the logits and one float per position for the backward pass; softmax is recomputed there."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor, group: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = logits.shape[-1]
        index = targets - (0 if group is None else group.rank() * width)
        here = (index >= 0) & (index < width)
        index = index.clamp(0, width - 1)
        chosen, normalizer, expected = logits.new_empty((3, len(logits)), dtype=torch.float32)
        for rows in _blocks(logits):
            scaled = _scaled(logits[rows], temperature[rows])
            chosen[rows] = scaled.gather(-1, index[rows].unsqueeze(-1)).squeeze(-1)
            normalizer[rows] = scaled.logsumexp(dim=-1)
        if group is not None:
            chosen = _summed(torch.where(here, chosen, 0.0), group)
            normalizer = _logsumexp_over(normalizer, group)
        for rows in _blocks(logits):
            scaled = _scaled(logits[rows], temperature[rows])
            probabilities = (scaled - normalizer[rows].unsqueeze(-1)).exp_()
            expected[rows] = torch.einsum("tv,tv->t", probabilities, scaled)
        entropy = normalizer - (expected if group is None else _summed(expected, group))
        ctx.save_for_backward(logits, index, here, normalizer, temperature)
        ctx.mark_non_differentiable(entropy)
        return chosen - normalizer, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, index, here, normalizer, temperature = ctx.saved_tensors
        gradient = (gradients[0] / temperature).unsqueeze(-1)
        result = torch.empty_like(logits)
        for rows in _blocks(logits):
            block = _scaled(logits[rows], temperature[rows])
            block.sub_(normalizer[rows].unsqueeze(-1)).exp_().mul_(-gradient[rows])
            block.scatter_add_(-1, index[rows].unsqueeze(-1), gradient[rows] * here[rows].unsqueeze(-1))
            result[rows] = block
        return result, None, None, None


def token_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor | float = 1.0, group: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-prob of each target and the entropy at its position under softmax(logits / temperature).

    logits [T, V], or [T, V / ranks] on each rank of ``group``; targets int64[T]; temperature float32[T], or one.
    Returns log-probs float32[T]
    (differentiable) and entropies float32[T] (not), the same on every rank. The gradient of the log-probs must be the
    same on every rank too. A row's values and its gradient do not depend on the other rows, to the last bit on a CPU.
    """
    if not isinstance(temperature, torch.Tensor):
        temperature = logits.new_full((len(logits),), temperature, dtype=torch.float32)
    if len(logits) == 1:  # computed with a copy of itself; see _blocks
        logprobs, entropy = token_logprobs(logits.repeat(2, 1), targets.repeat(2), temperature.repeat(2), group)
        return logprobs[:1], entropy[:1]
    logprobs, entropy = _TokenLogprobs.apply(logits, targets, temperature, group)
    return logprobs, entropy


def _blocks(logits: torch.Tensor) -> Iterator[slice]:
    """Yield the rows of each block: about BLOCK_SIZE numbers, of two rows at least.

    A row's sums do not depend on the other rows that are summed with it, unless it is alone, for which torch has other
    kernels. So the rows are divided evenly, and no block is left with one.
    """
    count = len(logits)
    blocks = -(-count // max(BLOCK_SIZE // logits.shape[-1], 3))
    for block in range(blocks):
        yield slice(block * count // blocks, (block + 1) * count // blocks)


def _scaled(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Return logits / temperature, float32[R, V], in memory of its own; temperature float32[R]."""
    return logits.to(torch.float32, copy=True).div_(temperature.unsqueeze(-1))


def _summed(values: torch.Tensor, group: Any) -> torch.Tensor:
    torch.distributed.all_reduce(values, group=group)
    return values


def _logsumexp_over(values: torch.Tensor, group: Any) -> torch.Tensor:
    largest = values.clone()
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    return largest + torch.log(_summed(torch.exp(values - largest), group))
