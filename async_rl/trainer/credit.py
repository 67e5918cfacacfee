"""Gives samples the advantages of their trajectories, and their tokens the weights by which the loss adds up.

Knows ``advantages``, ``losses`` and ``samples``; what other ranks have it is given as sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from async_rl.config.schema import LossSection
from async_rl.trainer import losses
from async_rl.trainer.advantages import GroupAdvantages, batch_normalized, batch_sums, group_advantages
from async_rl.trainer.samples import Sample
from async_rl.types import Group

SumOverData = Callable[..., dict[str, float]]
"""Adds up named numbers over the data-parallel ranks: ``Collectives.sum_over_data``."""


def with_credit(
    groups: Sequence[tuple[Group, Sequence[Sample]]],
    settings: LossSection,
    estimator: GroupAdvantages,
    *,
    max_response_tokens: int,
    sum_over_data: SumOverData,
) -> list[Sample]:
    """Return the samples of this rank's groups, in their order, with their tokens' advantages and weights.

    groups: each with its samples. All ranks call it together if advantages need the whole mini-batch
    (``LossSection.needs_batch_statistics``).
    """
    samples = [sample for _, of_group in groups for sample in of_group]
    # How many tokens of each trajectory count, in all its samples.
    tokens = dict.fromkeys((t.trajectory_id for group, _ in groups for t in group.trajectories), 0)
    for sample in samples:
        tokens[sample.trajectory_id] += int(sample.loss_mask.sum())
    values = [group_advantages(group.group_id, group.rewards, estimator).tolist() for group, _ in groups]
    advantages = [value for group in values for value in group]
    if settings.needs_batch_statistics:
        names = ("count", "sum", "squares")
        sums = dict(zip(names, batch_sums(advantages, list(tokens.values())), strict=True))
        total = sum_over_data(**sums)
        advantages = batch_normalized(advantages, (total["count"], total["sum"], total["squares"]))
    advantage_of = dict(zip(tokens, advantages, strict=True))
    return [
        sample.with_advantages(advantage_of[sample.trajectory_id]).with_weight(
            losses.token_weight(settings.aggregation, tokens[sample.trajectory_id], max_response_tokens)
        )
        for sample in samples
    ]
