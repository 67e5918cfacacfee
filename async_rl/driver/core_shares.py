"""Which cores of its host each of a run's processes computes on. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from async_rl.config.schema import RunConfig
from async_rl.runtime.cores import CoreShare, HostCores


@dataclass(frozen=True, slots=True)
class Shares:
    """The cores of each process on its own host; without an entry a process may use any."""

    engines: Mapping[Hashable, CoreShare]
    """By engine, or part of one."""
    trainers: Mapping[int, CoreShare]
    """By rank."""


def core_shares(
    config: RunConfig, engines: Mapping[Any, str], ranks: Sequence[str], given: HostCores | None = None
) -> Shares:
    """Give engines and trainer ranks cores of their own on their hosts, engines first.

    ``engines`` and ``ranks`` name the host of each, ``engines`` by what is to be its key in the result. ``given`` are
    the cores that they have by now; those that stay on their host keep them. GPU hosts have more cores than processes,
    whose helper threads (autograd, NCCL, the driver's) need some too: nothing is bound there.
    """
    if not config.resources.pin_cores or config.resources.device == "cuda":
        return Shares({}, {})
    given = HostCores() if given is None else given
    names = {key: f"engine {key}" for key in engines}
    trainers = {f"rank {rank}": host for rank, host in enumerate(ranks)}
    given.keep({*names.values(), *trainers})
    for key, host in engines.items():
        given.give(names[key], host, config.resources.engine_threads)
    for process, host in trainers.items():
        given.give(process, host, config.resources.trainer_threads)
    return Shares(
        {key: given.share(process) for key, process in names.items()},
        {rank: given.share(process) for rank, process in enumerate(trainers)},
    )
