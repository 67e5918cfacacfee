"""Computes how much better each response did than the others. Pure: NumPy in, NumPy out; knows the settings' schema.

``group_advantages`` looks at one group. An estimator that normalizes over the whole mini-batch is completed by
``batch_normalized``, with the sums of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from async_rl.config.functions import load_function
from async_rl.config.training import LossSection
from async_rl.errors import TrainerError
from async_rl.types import Float32Array

# Keeps the quotient finite for rewards that differ by rounding only; far below any intended reward difference.
STD_FLOOR = 1e-6

# Rewards float32[n] of a group's responses -> their advantages float32[n].
GroupAdvantages = Callable[[Float32Array], Float32Array]


def grpo(rewards: Float32Array, *, normalize_by_std: bool) -> Float32Array:
    """Return reward - mean, optionally over the group's (population) standard deviation.

    With the division it is GRPO, arXiv:2402.03300; without it arXiv:2503.20783. A group whose rewards are all equal has
    advantages of exactly zero.
    """
    values = rewards.astype(np.float64)
    if np.all(values == values[0]):
        return np.zeros(len(rewards), dtype=np.float32)
    advantages = values - values.mean()
    if normalize_by_std:
        advantages /= values.std() + STD_FLOOR
    result: Float32Array = advantages.astype(np.float32)
    return result


def rloo(rewards: Float32Array) -> Float32Array:
    """Return reward - mean of the others' rewards: RLOO, arXiv:2402.14740."""
    values = rewards.astype(np.float64)
    others = (values.sum() - values) / (len(values) - 1)
    result: Float32Array = (values - others).astype(np.float32)
    return result


def reinforce_plus_plus(rewards: Float32Array) -> Float32Array:
    """Return reward - mean of the group, or the reward of a group of one; ``batch_normalized`` completes both.

    REINFORCE++, arXiv:2501.03262, with a baseline by group; with rollout.n 1 in its plain form, whose only baseline is
    the mean of the mini-batch.
    """
    return rewards.copy() if len(rewards) == 1 else grpo(rewards, normalize_by_std=False)


def turn_return(rewards: Sequence[npt.NDArray[np.float64]], discount: float) -> list[Float32Array]:
    """Return the advantages of the turns of a group's rollouts: their returns minus the mean of all of them.

    rewards: of each rollout float64[T], the rewards of its T turns in the order in which they ended. The return of a
    turn is its own reward and those of later turns, each times ``discount`` to the power of how many turns later it is.
    A group whose returns are all equal has advantages of exactly zero.
    """
    returns = []
    for of_rollout in rewards:
        later, found = 0.0, np.zeros(len(of_rollout))
        for turn in reversed(range(len(of_rollout))):
            found[turn] = later = of_rollout[turn] + discount * later
        returns.append(found)
    together = np.concatenate(returns)
    mean = together[0] if np.all(together == together[0]) else together.mean()
    return [(found - mean).astype(np.float32) for found in returns]


def load_advantages(settings: LossSection) -> GroupAdvantages | None:
    """Return the estimator that trainer.loss.advantage names; None for ``turn_return``, which compares turns.

    Raises TrainerError if that is a function that cannot be found, or not be called with rewards alone.
    """
    name = settings.advantage
    if name == "turn_return":
        return None
    if name == "rloo":
        return rloo
    if name == "grpo":
        return lambda rewards: grpo(rewards, normalize_by_std=settings.normalize_by_std)
    if name == "reinforce_plus_plus":
        return reinforce_plus_plus
    function = load_function("trainer.loss.advantage", name, ("rewards",), TrainerError)

    def checked(rewards: Float32Array) -> Float32Array:
        returned = function(rewards)
        try:
            result = np.asarray(returned, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise TrainerError(
                f"trainer.loss.advantage {name}: returned {returned!r}; expected a finite number for each reward"
            ) from error
        if result.shape != rewards.shape or not np.isfinite(result).all():
            raise TrainerError(
                f"trainer.loss.advantage {name}: returned {result.tolist()} for rewards {rewards.tolist()}; expected a "
                "finite number for each"
            )
        return result

    return checked


def group_advantages(group_id: str, rewards: Float32Array, estimator: GroupAdvantages) -> Float32Array:
    """Return the advantages float32[n] of a group's responses. Raises TrainerError for a reward that is not finite."""
    if not np.isfinite(rewards).all():
        raise TrainerError(f"group {group_id}: rewards {rewards.tolist()} are not all finite; fix the reward function")
    return estimator(rewards)


def batch_sums(advantages: Sequence[float], tokens: Sequence[int]) -> tuple[float, float, float]:
    """Return (tokens, sum, sum of squares) of the tokens' advantages; those of several ranks add up.

    Each of a response's ``tokens`` has the response's advantage.
    """
    values, counts = np.asarray(advantages, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    return float(counts.sum()), float((counts * values).sum()), float((counts * values**2).sum())


def batch_normalized(advantages: Sequence[float], sums: tuple[float, float, float]) -> list[float]:
    """Return (advantage - mean) / standard deviation over the tokens of the global batch, given its ``batch_sums``.

    As in REINFORCE++, arXiv:2501.03262: tokens are counted, so a long response moves mean and deviation more. All zero
    where no advantage differs.
    """
    count, total, squares = sums
    mean = total / max(count, 1.0)
    variance = squares / max(count, 1.0) - mean**2
    if variance <= STD_FLOOR**2:
        return [0.0] * len(advantages)
    return [(value - mean) / variance**0.5 for value in advantages]
