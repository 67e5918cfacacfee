"""A policy loss of your own: a soft gate in place of PPO's clip."""

from __future__ import annotations

import torch

from async_rl.config.training import LossSection
from async_rl.trainer.losses import Tokens


def soft_clip(tokens: Tokens, settings: LossSection) -> torch.Tensor:
    """Return the loss of each token, float32[T], whose weight fades as its ratio leaves 1."""
    log_ratio = tokens.log_ratio(tokens.current, tokens.proximal)
    width = torch.where(tokens.advantages > 0, settings.clip_high, settings.clip_low)
    gate = torch.exp(-0.5 * (log_ratio.detach() / width) ** 2)
    return -gate * torch.exp(log_ratio) * tokens.advantages
