"""The sums over a batch from which the policy's metrics are computed. Pure: torch only; knows ``types`` and ``losses``.

They are sums over the contributing tokens, never means: the sums of two microbatches, or of two ranks, add up to those
of both. Shapes: T positions, N contributing tokens, S stalenesses, R resume positions, E engines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from async_rl.metrics.records import RESUME_POSITIONS
from async_rl.trainer.losses import MAX_LOG_RATIO

# A token is extreme if its importance ratio lies outside [1/τ, τ].
EXTREME_TAU = 2.0


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The contributing tokens of one microbatch, float64[N] each."""

    current: torch.Tensor
    behaviour: torch.Tensor
    entropy: torch.Tensor
    clipped: torch.Tensor
    rejected: torch.Tensor
    log_ratio: torch.Tensor
    """current - behaviour."""
    bounded: torch.Tensor
    """log_ratio within [-MAX_LOG_RATIO, MAX_LOG_RATIO]."""
    ratio: torch.Tensor
    """exp(bounded), the importance ratio."""
    sharpness: torch.Tensor
    """current + entropy: the derivative of a log-prob by the inverse temperature."""


SUMS: Mapping[str, Callable[[_Tokens], torch.Tensor]] = MappingProxyType(
    {
        "tokens": lambda t: torch.ones_like(t.log_ratio),
        "entropy": lambda t: t.entropy,
        "kl": lambda t: -t.log_ratio,
        "k3": lambda t: torch.expm1(t.bounded) - t.bounded,
        "clipped": lambda t: t.clipped,
        "rejected": lambda t: t.rejected,
        "extreme": lambda t: (t.log_ratio.abs() > math.log(EXTREME_TAU)).double(),
        "ratio": lambda t: t.ratio,
        "ratio_squared": lambda t: t.ratio.square(),
        "abs_diff": lambda t: t.log_ratio.abs(),
        "squared_diff": lambda t: t.log_ratio.square(),
        "sharpness_squared": lambda t: t.sharpness.square(),
        "diff_sharpness": lambda t: -t.log_ratio * t.sharpness,
    }
)
"""Every sum: its name and each token's contribution, [N].

kl is behaviour - current, the k1 estimate of KL(behaviour || current). k3 = e^x - 1 - x with x = current - behaviour is
its low-variance form (Schulman, "Approximating KL divergence", 2020).
"""

_COLUMN = {name: index for index, name in enumerate(SUMS)}


@dataclass(slots=True)
class PolicySums:
    """Sums over contributing tokens, by token staleness, by position relative to a resume point and by engine.

    S is the largest staleness allowed + 1, R is len(RESUME_POSITIONS), and E is len(engines) + 1: the last is for
    tokens of any other engine, such as those in the checkpoint of a run that had others.
    """

    loss: torch.Tensor
    """float64[]."""
    sums: torch.Tensor
    """float64[S, R, E, len(SUMS)]."""
    max_abs_diff: torch.Tensor
    """float64[S, R, E], largest |behaviour - current log-prob|."""
    replayed_choices: torch.Tensor
    """float64[2], over every position and layer: choices of an expert that were replayed, and how many of them the
    trainer's own router would not have made."""
    engines: tuple[str, ...] = ()
    """The engines of the run."""

    @staticmethod
    def zero(stalenesses: int, device: torch.device | str = "cpu", engines: tuple[str, ...] = ()) -> PolicySums:
        """Return sums of no token."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        cells = (stalenesses, len(RESUME_POSITIONS), len(engines) + 1)
        return PolicySums(zeros(), zeros(*cells, len(SUMS)), zeros(*cells), zeros(2), engines)

    def empty(self) -> PolicySums:
        """Return sums of no token that can be added to these."""
        return PolicySums.zero(len(self.sums), self.sums.device, self.engines)

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
        """Return the sum over all contributing tokens."""
        return float(self.sums[..., _COLUMN[name]].sum())

    @property
    def router_disagreement(self) -> float | None:
        """Share of the replayed choices that the trainer's own router would not have made; None without any."""
        choices, unlike = self.replayed_choices.tolist()
        return float(unlike / choices) if choices else None

    def on_policy_temperature(self) -> tuple[float, float] | None:
        """Estimate the temperature behind the behaviour log-probs from the tokens of staleness 0.

        Returns (its ratio to the trainer's, share of the squared differences that it explains), or None where there
        are no such tokens.

        A log-prob changes with the inverse temperature by the token's logit minus the mean logit, which is log-prob
        plus entropy. So this is least squares of the differences on that, right to first order.
        """
        diff, sharpness, product = (
            self.by_staleness(name)[0] for name in ("squared_diff", "sharpness_squared", "diff_sharpness")
        )
        if not sharpness:
            return None
        slope = product / sharpness
        # So far from 1, the first-order estimate means nothing any more.
        ratio = 1 / max(1 + slope, 0.1)
        return ratio, product**2 / (diff * sharpness) if diff else 0.0

    def by_staleness(self, name: str) -> list[float]:
        return self._along(0, name)

    def by_resume_position(self, name: str) -> list[float]:
        """Return a sum by resume position, in the order of RESUME_POSITIONS."""
        return self._along(1, name)

    def by_engine(self, name: str) -> list[float]:
        """Return a sum by engine; the last is that of engines that are not of the run."""
        return self._along(2, name)

    def max_by_staleness(self) -> list[float]:
        """Return the largest |behaviour - current log-prob| by staleness."""
        return self._largest_along(0)

    def max_by_resume_position(self) -> list[float]:
        return self._largest_along(1)

    def max_by_engine(self) -> list[float]:
        return self._largest_along(2)

    def _along(self, axis: int, name: str) -> list[float]:
        values: list[float] = self.sums[..., _COLUMN[name]].movedim(axis, 0).flatten(1).sum(dim=1).tolist()
        return values

    def _largest_along(self, axis: int) -> list[float]:
        values: list[float] = self.max_abs_diff.movedim(axis, 0).flatten(1).amax(dim=1).tolist()
        return values


@torch.no_grad()  # type: ignore[untyped-decorator]
def policy_sums(
    *,
    loss: torch.Tensor,
    current: torch.Tensor,
    behaviour: torch.Tensor,
    entropy: torch.Tensor,
    clipped: torch.Tensor,
    rejected: torch.Tensor,
    staleness: torch.Tensor,
    resume_position: torch.Tensor,
    engine: torch.Tensor,
    mask: torch.Tensor,
    empty: PolicySums,
) -> PolicySums:
    """Return ``empty``, with the sums of one microbatch.

    Arrays are [T]. Wherever mask is set, staleness, resume_position and engine int64[T] must be indices of a cell of
    ``empty``.
    """
    _, positions, engines = empty.max_abs_diff.shape
    cell = (staleness[mask] * positions + resume_position[mask]) * engines + engine[mask]
    current, behaviour, entropy = current[mask].double(), behaviour[mask].double(), entropy[mask].double()
    log_ratio = current - behaviour
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    tokens = _Tokens(
        current=current,
        behaviour=behaviour,
        entropy=entropy,
        clipped=clipped[mask].double(),
        rejected=rejected[mask].double(),
        log_ratio=log_ratio,
        bounded=bounded,
        ratio=torch.exp(bounded),
        sharpness=current + entropy,
    )
    empty.loss += loss
    # Views: adding to them adds to the sums.
    values = torch.stack([contribution(tokens) for contribution in SUMS.values()], dim=1)
    empty.sums.view(-1, len(SUMS)).index_add_(0, cell, values)
    empty.max_abs_diff.view(-1).scatter_reduce_(0, cell, log_ratio.abs(), "amax")
    return empty
