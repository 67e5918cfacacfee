"""Gives samples the advantages of their rollouts, and their tokens the weights by which the loss adds up.

A rollout is what is compared and what is averaged over, however many trajectories it has: an agent that branches more
often must not count more often.

Knows ``advantages``, ``losses`` and ``samples``; what other ranks have it is given as sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from async_rl.config.training import LossSection
from async_rl.errors import TrainerError
from async_rl.trainer import losses
from async_rl.trainer.advantages import GroupAdvantages, batch_normalized, batch_sums, group_advantages
from async_rl.trainer.rejection import largest_kept_square
from async_rl.trainer.samples import Sample
from async_rl.types import Float32Array, Group

SumOverData = Callable[..., dict[str, float]]
"""Adds up named numbers over the data-parallel ranks: ``Collectives.sum_over_data``."""


class Credited(NamedTuple):
    """The samples of a rank's groups, ready to be trained."""

    samples: list[Sample]
    """With advantages and weights."""
    rejected: int
    """How many of their counting tokens got an advantage of 0 because two policies differ too much on them."""


def with_credit(
    groups: Sequence[tuple[Group, Sequence[Sample]]],
    settings: LossSection,
    estimator: GroupAdvantages,
    *,
    max_response_tokens: int,
    sum_over_data: SumOverData,
) -> Credited:
    """Return the samples of this rank's groups, in their order, with their tokens' advantages and weights.

    groups: each with its samples. All ranks call it together if advantages need the whole mini-batch
    (``LossSection.needs_batch_statistics``).
    """
    samples = [sample for _, of_group in groups for sample in of_group]
    rollout_of = {
        t.trajectory_id: rollout.rollout_id
        for group, _ in groups
        for rollout in group.trainable
        for t in rollout.trajectories
    }
    # How many tokens of each rollout count, in all its samples.
    tokens = dict.fromkeys((rollout.rollout_id for group, _ in groups for rollout in group.trainable), 0)
    for sample in samples:
        tokens[rollout_of[sample.trajectory_id]] += int(sample.loss_mask.sum())
    group_tokens = {
        rollout.rollout_id: sum(tokens[other.rollout_id] for other in group.trainable)
        for group, _ in groups
        for rollout in group.trainable
    }
    values = [group_advantages(group.group_id, group.rewards, estimator).tolist() for group, _ in groups]
    advantages = [value for group in values for value in group]
    if settings.advantage == "reinforce_plus_plus":
        names = ("count", "sum", "squares")
        sums = dict(zip(names, batch_sums(advantages, list(tokens.values())), strict=True))
        total = sum_over_data(**sums)
        advantages = batch_normalized(advantages, (total["count"], total["sum"], total["squares"]))
    advantage_of = dict(zip(tokens, advantages, strict=True))

    def with_its_share(sample: Sample) -> Sample:
        rollout = rollout_of[sample.trajectory_id]
        weight = losses.token_weight(
            settings.aggregation,
            tokens=tokens[rollout],
            group_tokens=group_tokens[rollout],
            max_response_tokens=max_response_tokens,
        )
        return sample.with_advantages(advantage_of[rollout]).with_weight(weight)

    samples = [with_its_share(sample) for sample in samples]
    if settings.rejection.rule == "second_moment":
        return _without_largest_squares(samples, settings.rejection.limit, sum_over_data)
    return Credited(samples, 0)


def _without_largest_squares(samples: Sequence[Sample], bound: float, sum_over_data: SumOverData) -> Credited:
    """Take the advantages of the tokens that ``largest_kept_square`` rejects."""
    squares = [_squared_log_ratio(sample) for sample in samples]
    counting = [values[sample.loss_mask] for values, sample in zip(squares, samples, strict=True)]
    together = np.concatenate(counting) if counting else np.zeros(0, dtype=np.float32)
    largest = largest_kept_square(together, bound, sum_over_data)
    left = [
        sample.with_advantages(np.where(values > largest, np.float32(0), sample.advantages))
        for values, sample in zip(squares, samples, strict=True)
    ]
    return Credited(left, int((together > largest).sum()))


def _squared_log_ratio(sample: Sample) -> Float32Array:
    """Return the squared log ratio of the proximal to the behaviour policy, float32[N-1]; 0 where no token counts."""
    if sample.proximal is None:
        raise TrainerError(f"{sample.name}: no proximal log-probs; rejection.rule second_moment needs them")
    squares: Float32Array = np.where(sample.loss_mask, sample.proximal - sample.logprobs, np.float32(0)) ** 2
    return squares
