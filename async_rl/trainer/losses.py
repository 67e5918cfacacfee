"""The policy loss. Pure: torch only; knows nobody.

Everything is a *sum* over the tokens that count, never a mean: means are taken once, over the global batch,
so that no result depends on how sequences were packed or spread over ranks. Shapes: T positions.
"""

from __future__ import annotations

import torch

# Bound of |log ratio| before it is exponentiated: e^20 is far beyond any clip, and its square still fits
# float32.
MAX_LOG_RATIO = 20.0


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
