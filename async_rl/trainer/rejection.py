"""Decides which tokens are left out of the policy loss because two policies differ too much on them. Pure.

Knows torch, NumPy and the settings. The two policies are the behaviour policy and the one that it is corrected to: the
proximal policy, or the current one where the proximal is the behaviour policy. The log ratio below is that of the
second over the behaviour policy. A rejected token has no policy loss and still counts in the divisor of the loss, so a
step that rejects much is a small step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from async_rl.config.training import RejectionSection
from async_rl.types import Float32Array


def rejected_sequences(
    log_ratio: torch.Tensor, sequence_mean: Callable[[torch.Tensor], torch.Tensor], settings: RejectionSection
) -> torch.Tensor:
    """Return bool[T]: the tokens of sequences on which the two policies differ too much.

    log_ratio: float32[T], bounded, 0 where no token counts. sequence_mean: for each token, the mean over those of its
    sequence that count.

    rule geometric_mean: the geometric mean of a sequence's ratios lies outside of [low, high]. rule k3: the mean of
    ratio - 1 - log ratio, an estimate of KL(behaviour || other), is above the bound. Both are of Liu et al., "When
    speed kills stability", 2025, and are seq_mean_k1 and seq_mean_k3 in verl/trainer/ppo/rollout_corr_helper.py, which
    takes the rejected tokens out of the divisor too.
    """
    if settings.rule == "geometric_mean":
        ratio = torch.exp(sequence_mean(log_ratio))
        return (ratio < settings.low) | (ratio > settings.high)
    return sequence_mean(torch.expm1(log_ratio) - log_ratio) > settings.limit


def largest_kept_square(squares: Float32Array, bound: float, sum_over_data: Callable[..., dict[str, float]]) -> float:
    """Return the largest squared log ratio that a token may have; infinity if no token is rejected.

    squares: the squared log ratios float32[N] of this rank's counting tokens. As many tokens as possible are kept, the
    smallest squares first, as long as their mean over the global batch is below ``bound``; equal squares share their
    fate, so the result does not depend on an order. sum_over_data: adds up over the data-parallel ranks, which call
    this together.

    M2PO, arXiv:2510.01161, as in _apply_m2po_masking of areal/trainer/ppo/actor.py, which masks the largest squares
    until the others' mean is below the threshold, but within a microbatch. The authors' own code (Infini-AI-Lab/M2PO)
    differs: it looks only at tokens that an update would move further away, and clips them.
    """
    # A set of squares below the bound has its mean below it, so only the others need an order.
    certain = squares < np.float32(bound)
    base = {"count": float(certain.sum()), "total": float(squares[certain].sum(dtype=np.float64))}
    others = np.sort(squares[~certain])
    sums = np.concatenate([[0.0], np.cumsum(others, dtype=np.float64)])

    def mean_is_below(limit: float) -> bool:
        kept = int(np.searchsorted(others, np.float32(limit), side="right"))
        found = sum_over_data(count=base["count"] + kept, total=base["total"] + float(sums[kept]))
        return found["total"] < bound * found["count"]

    if sum_over_data(count=float(len(squares)))["count"] == 0 or mean_is_below(np.inf):
        return np.inf
    # Floats from 0 up are ordered as their bits are, so halving the bits finds the very float in 31 steps.
    low, high = max(int(np.float32(bound).view(np.int32)) - 1, 0), int(np.float32(np.inf).view(np.int32))
    while high - low > 1:
        middle = (low + high) // 2
        if mean_is_below(float(np.int32(middle).view(np.float32))):
            low = middle
        else:
            high = middle
    return float(np.int32(low).view(np.float32))
