"""Which groups of a batch each trainer rank gets. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from async_rl.config.training import ParallelSection
from async_rl.queue.records import GroupMeta
from async_rl.trainer.packing import split_over_ranks
from async_rl.trainer.parallel import Place, world_size

Item = TypeVar("Item")
Batch = Sequence[tuple[GroupMeta, Item]]


def rank_shares(
    batch: Batch[Item],
    sizes: ParallelSection,
    cost: Callable[[int], float],
    loads: list[float] | None = None,
) -> list[dict[str, Item]]:
    """Return the items of each rank by group id, balanced by cost over the data-parallel ranks.

    ``cost`` is that of a sequence of so many tokens. ``loads`` are the costs that each data-parallel rank has already;
    those of ``batch`` are added.
    """
    costs = [sum(map(cost, meta.lengths)) for meta, _ in batch]
    by_replica = split_over_ranks(costs, sizes.dp, loads or ())
    if loads is not None:
        for replica, indices in enumerate(by_replica):
            loads[replica] += sum(costs[index] for index in indices)
    ranks = range(world_size(sizes))
    return [
        {batch[index][0].group_id: batch[index][1] for index in by_replica[Place.of(sizes, rank).dp]} for rank in ranks
    ]


def batch_shares(
    groups: Batch[Item], size: int, shares: Callable[[Batch[Item]], Sequence[Mapping[str, Item]]]
) -> list[tuple[Mapping[str, Item], ...]]:
    """Return the ``shares`` of each rank in mini-batches of ``size`` groups, by rank."""
    batches = [groups[first : first + size] for first in range(0, len(groups), size)]
    return list(zip(*map(shares, batches), strict=True))
