"""Gives samples the advantages of their rollouts, and their tokens the weights by which the loss adds up.

A rollout is what is compared and what is averaged over, however many trajectories it has: an agent that branches more
often must not count more often.

Knows ``advantages``, ``losses`` and ``samples``; what other ranks have it is given as sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from async_rl.config.training import LossSection
from async_rl.errors import TrainerError
from async_rl.trainer import losses
from async_rl.trainer.advantages import GroupAdvantages, batch_normalized, batch_sums, group_advantages, turn_return
from async_rl.trainer.rejection import largest_kept_square
from async_rl.trainer.samples import Sample
from async_rl.types import Float32Array, Group, Trajectory

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
    estimator: GroupAdvantages | None,
    *,
    max_response_tokens: int,
    sum_over_data: SumOverData,
) -> Credited:
    """Return the samples of this rank's groups, in their order, with their tokens' advantages and weights.

    groups: each with its samples. estimator: what ``load_advantages`` returns. All ranks call it together if advantages
    need the whole mini-batch (``LossSection.needs_batch_statistics``).
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
    if estimator is None:
        of_turns = {name: each for group, _ in groups for name, each in _of_turns(group, settings.turn_discount)}
    else:
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
        # A sample has its trajectory from the beginning, and perhaps not to its end.
        advantage = advantage_of[rollout] if estimator else of_turns[sample.trajectory_id][: sample.positions]
        weight = losses.token_weight(
            settings.aggregation,
            tokens=tokens[rollout],
            group_tokens=group_tokens[rollout],
            max_response_tokens=max_response_tokens,
        )
        return sample.with_advantages(advantage).with_weight(weight)

    samples = [with_its_share(sample) for sample in samples]
    if settings.rejection.rule == "second_moment":
        return _without_largest_squares(samples, settings.rejection.limit, sum_over_data)
    return Credited(samples, 0)


def _of_turns(group: Group, discount: float) -> Iterator[tuple[str, Float32Array]]:
    """Yield (trajectory id, advantages float32[P+G-1]): each turn's tokens have that of ``turn_return``.

    Raises TrainerError where it is not known which turns a rollout has.
    """
    numbers = [sorted(turn for turns in rollout.turns for turn in turns) for rollout in group.trainable]
    rewards = [
        np.array([rollout.turn_rewards.get(turn, 0.0) for turn in own])
        for rollout, own in zip(group.trainable, numbers, strict=True)
    ]
    for rollout, own, advantages in zip(group.trainable, numbers, turn_return(rewards, discount), strict=True):
        advantage_of = dict(zip(own, advantages, strict=True))
        spans = [_turn_spans(trajectory) for trajectory in rollout.trajectories]
        if list(map(len, spans)) != list(map(len, rollout.turns)):
            raise TrainerError(
                f"rollout {rollout.rollout_id}: its trajectories have {list(map(len, spans))} turns, of which "
                f"{list(map(len, rollout.turns))} are known, and trainer.loss.advantage turn_return needs all; only "
                "rollouts of agents have them, so set another one"
            )
        for trajectory, turns, places in zip(rollout.trajectories, rollout.turns, spans, strict=True):
            positions = np.zeros(trajectory.num_tokens - 1, dtype=np.float32)
            of_response = positions[len(trajectory.prompt_ids) - 1 :]
            for turn, (start, stop) in zip(turns, places, strict=True):
                of_response[start:stop] = advantage_of[turn]
            yield trajectory.trajectory_id, positions


def _turn_spans(trajectory: Trajectory) -> list[tuple[int, int]]:
    """Return (start, stop) of each turn of the policy: the longest runs of sampled response tokens."""
    edges = np.flatnonzero(np.diff(trajectory.sampled.astype(np.int8), prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


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
