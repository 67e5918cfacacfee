"""The sums over a batch that the metrics of the policy are made of. Pure: torch only; knows ``types`` and ``losses``.

Sums over the tokens that count, never means: those of two microbatches, or of two ranks, add up to those of both.
Shapes: T positions, S stalenesses, R resume positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from async_rl.trainer.losses import MAX_LOG_RATIO
from async_rl.types import RESUME_POSITIONS

# A token is extreme if its importance ratio lies outside [1/τ, τ].
EXTREME_TAU = 2.0

SUMS = (
    "tokens",
    "entropy",
    "kl",
    "k3",
    "clipped",
    "extreme",
    "ratio",
    "ratio_squared",
    "abs_diff",
    "squared_diff",
    "sharpness_squared",
    "diff_sharpness",
)


@dataclass(slots=True)
class PolicySums:
    """Sums over contributing tokens, by token staleness and by position relative to a resume point; those of two
    batches add up to those of both.

    loss float64[]; sums float64[S, R, len(SUMS)]; max_abs_diff float64[S, R], largest |behaviour - current log-prob|;
    S = largest staleness allowed + 1, R = len(RESUME_POSITIONS). replayed_choices float64[2], of every position and
    layer:     choices of an expert that were replayed, and those that the trainer's own router would not have made.
    """

    loss: torch.Tensor
    sums: torch.Tensor
    max_abs_diff: torch.Tensor
    replayed_choices: torch.Tensor

    @staticmethod
    def zero(stalenesses: int, device: torch.device | str = "cpu") -> PolicySums:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        cells = (stalenesses, len(RESUME_POSITIONS))
        return PolicySums(zeros(), zeros(*cells, len(SUMS)), zeros(*cells), zeros(2))

    def add(self, other: PolicySums) -> None:
        self.loss += other.loss
        self.sums += other.sums
        torch.maximum(self.max_abs_diff, other.max_abs_diff, out=self.max_abs_diff)
        self.replayed_choices += other.replayed_choices

    def all_reduce(self, group: torch.distributed.ProcessGroup) -> None:
        """Make every rank of ``group`` hold the total."""
        torch.distributed.all_reduce(self.loss, group=group)
        torch.distributed.all_reduce(self.sums, group=group)
        torch.distributed.all_reduce(self.max_abs_diff, op=torch.distributed.ReduceOp.MAX, group=group)
        torch.distributed.all_reduce(self.replayed_choices, group=group)

    def __getitem__(self, name: str) -> float:
        """The sum over all contributing tokens."""
        return float(self.sums[..., SUMS.index(name)].sum())

    @property
    def router_disagreement(self) -> float | None:
        """Share of the replayed choices that the trainer's own router would not have made; None without any."""
        choices, unlike = self.replayed_choices.tolist()
        return float(unlike / choices) if choices else None

    def on_policy_temperature(self) -> tuple[float, float] | None:
        """What the tokens of staleness 0 say about the temperature behind the behaviour log-probs: (its ratio to the
        trainer's, share of their squared differences that it explains). None where there are no such tokens.

        A log-prob changes with the inverse temperature by the token's logit minus the mean logit, which is log-prob
        plus entropy. So this is least squares of the differences on that, right to first order.
        """
        diff, sharpness, product = (
            self.by_staleness(name)[0] for name in ("squared_diff", "sharpness_squared", "diff_sharpness")
        )
        if not sharpness:
            return None
        slope = product / sharpness
        # So far off, first order says nothing any more.
        ratio = 1 / max(1 + slope, 0.1)
        return ratio, product**2 / (diff * sharpness) if diff else 0.0

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
    sharpness = current + entropy
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
        difference.square(),
        sharpness.square(),
        -log_ratio * sharpness,
    ]
    result = PolicySums.zero(stalenesses, current.device)
    result.loss += loss
    # Views: what is added to them is added to the sums.
    result.sums.view(-1, len(SUMS)).index_add_(0, cell, torch.stack(values, dim=1))
    result.max_abs_diff.view(-1).scatter_reduce_(0, cell, difference, "amax")
    return result
