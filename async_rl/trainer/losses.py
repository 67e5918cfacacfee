"""Token log-probs, the policy loss, and the sums that the metrics are made of. Pure: torch only; knows ``types``.

Everything is a *sum* over the tokens that count, never a mean: means are taken once, over the global batch,
so that no result depends on how sequences were packed or spread over ranks. Shapes: T positions, V
vocabulary, S stalenesses, R resume positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from async_rl.types import RESUME_POSITIONS

# Bound of |log ratio| before it is exponentiated: e^20 is far beyond any clip, and its square still fits
# float32.
MAX_LOG_RATIO = 20.0

# A token is extreme if its importance ratio lies outside [1/τ, τ].
EXTREME_TAU = 2.0


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


def clipped_policy_loss(
    current: torch.Tensor,
    behaviour: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped objective by token (arXiv:1707.06347), with a clip range of its own on either side
    (arXiv:2503.14476).

    All float32[T], mask bool[T]. Returns the loss summed over the mask, and bool[T]: where clipping stops the
    gradient.
    """
    log_ratio = torch.where(mask, current - behaviour, 0.0)
    ratio = torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    plain = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    loss = -torch.minimum(plain, clipped)
    # A masked position may hold anything, NaN included: select, do not multiply.
    return torch.where(mask, loss, 0.0).sum(), (clipped < plain) & mask


SUMS = ("tokens", "entropy", "kl", "k3", "clipped", "extreme", "ratio", "ratio_squared", "abs_diff")


@dataclass(slots=True)
class PolicySums:
    """Sums over contributing tokens, by token staleness and by position relative to a resume point; those of two
    batches add up to those of both.

    loss float64[]; sums float64[S, R, len(SUMS)]; max_abs_diff float64[S, R], largest |behaviour - current log-prob|;
    S = largest staleness allowed + 1, R = len(RESUME_POSITIONS).
    """

    loss: torch.Tensor
    sums: torch.Tensor
    max_abs_diff: torch.Tensor

    @staticmethod
    def zero(stalenesses: int, device: torch.device | str = "cpu") -> PolicySums:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        cells = (stalenesses, len(RESUME_POSITIONS))
        return PolicySums(zeros(), zeros(*cells, len(SUMS)), zeros(*cells))

    def add(self, other: PolicySums) -> None:
        self.loss += other.loss
        self.sums += other.sums
        torch.maximum(self.max_abs_diff, other.max_abs_diff, out=self.max_abs_diff)

    def all_reduce(self, group: torch.distributed.ProcessGroup) -> None:
        """Make every rank of ``group`` hold the total."""
        torch.distributed.all_reduce(self.loss, group=group)
        torch.distributed.all_reduce(self.sums, group=group)
        torch.distributed.all_reduce(self.max_abs_diff, op=torch.distributed.ReduceOp.MAX, group=group)

    def __getitem__(self, name: str) -> float:
        """The sum over all contributing tokens."""
        return float(self.sums[..., SUMS.index(name)].sum())

    def by_staleness(self, name: str) -> list[float]:
        return [float(value) for value in self.sums[..., SUMS.index(name)].sum(dim=1)]

    def by_resume_position(self, name: str) -> list[float]:
        """In the order of RESUME_POSITIONS."""
        return [float(value) for value in self.sums[..., SUMS.index(name)].sum(dim=0)]

    def max_by_staleness(self) -> list[float]:
        """Of |behaviour - current log-prob|."""
        return [float(value) for value in self.max_abs_diff.amax(dim=1)]

    def max_by_resume_position(self) -> list[float]:
        return [float(value) for value in self.max_abs_diff.amax(dim=0)]


@torch.no_grad()  # type: ignore[untyped-decorator]
def policy_sums(
    *,
    loss: torch.Tensor,
    current: torch.Tensor,
    behaviour: torch.Tensor,
    entropy: torch.Tensor,
    clipped: torch.Tensor,
    staleness: torch.Tensor,
    resume_position: torch.Tensor,
    mask: torch.Tensor,
    stalenesses: int,
) -> PolicySums:
    """What one microbatch adds to the metrics. Arrays [T]; wherever mask is set, staleness int64[T] is below
    ``stalenesses`` and resume_position int64[T] is an index into RESUME_POSITIONS.

    kl is behaviour - current, the k1 estimate of KL(behaviour || current); k3 = e^x - 1 - x with x = current
    - behaviour is its low-variance form (Schulman, "Approximating KL divergence", 2020).
    """
    current, behaviour, entropy = current[mask].double(), behaviour[mask].double(), entropy[mask].double()
    cell = staleness[mask] * len(RESUME_POSITIONS) + resume_position[mask]
    log_ratio = current - behaviour
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = torch.exp(bounded)
    difference = log_ratio.abs()
    values = [
        torch.ones_like(log_ratio),
        entropy,
        -log_ratio,
        torch.expm1(bounded) - bounded,
        clipped[mask].double(),
        (difference > math.log(EXTREME_TAU)).double(),
        ratio,
        ratio.square(),
        difference,
    ]
    result = PolicySums.zero(stalenesses, current.device)
    result.loss += loss
    # Views: what is added to them is added to the sums.
    result.sums.view(-1, len(SUMS)).index_add_(0, cell, torch.stack(values, dim=1))
    result.max_abs_diff.view(-1).scatter_reduce_(0, cell, difference, "amax")
    return result
