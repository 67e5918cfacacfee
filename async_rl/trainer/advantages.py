"""Group-relative advantages. Pure: NumPy in, NumPy out; knows nobody."""

from __future__ import annotations

import numpy as np

from async_rl.types import Float32Array

# Keeps the quotient finite for rewards that differ by rounding only; far below any reward difference that is
# meant.
STD_FLOOR = 1e-6


def group_advantages(rewards: Float32Array, *, normalize_by_std: bool) -> Float32Array:
    """How much better each response did than its group: float32[n] from rewards float32[n].

    reward - mean, divided by the group's (population) standard deviation if asked: GRPO, arXiv:2402.03300,
    and without the division arXiv:2503.20783. A group whose rewards are all equal has advantages of exactly
    zero.
    """
    values = rewards.astype(np.float64)
    if np.all(values == values[0]):
        return np.zeros(len(rewards), dtype=np.float32)
    advantages = values - values.mean()
    if normalize_by_std:
        advantages /= values.std() + STD_FLOOR
    result: Float32Array = advantages.astype(np.float32)
    return result
