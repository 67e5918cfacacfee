"""Which cores of its host each of a run's processes computes on. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from async_rl.config.schema import RunConfig
from async_rl.runtime.cores import CoreShare


@dataclass(frozen=True, slots=True)
class Shares:
    """The cores of each process on its own host; without an entry a process may use any."""

    engines: Mapping[int, CoreShare]
    """By replica."""
    trainers: Mapping[int, CoreShare]
    """By rank."""


def core_shares(config: RunConfig, replicas: Mapping[int, str], ranks: Sequence[str]) -> Shares:
    """Give engines and trainer ranks cores of their own on their hosts, engines first.

    ``replicas`` and ``ranks`` name the host of each. GPU hosts have more cores than processes, whose helper threads
    (autograd, NCCL, the driver's) need some too: no process has cores of its own there (``runtime.numa``).
    """
    if not config.resources.pin_cores or config.resources.device == "cuda":
        return Shares({}, {})
    engine_threads, trainer_threads = config.resources.engine_threads, config.resources.trainer_threads
    taken: dict[str, int] = {}

    def take(host: str, threads: int) -> int:
        first = taken.get(host, 0)
        taken[host] = first + threads
        return first

    engines = {replica: take(host, engine_threads) for replica, host in replicas.items()}
    trainers = {rank: take(host, trainer_threads) for rank, host in enumerate(ranks)}
    return Shares(
        {replica: CoreShare(first, engine_threads, taken[replicas[replica]]) for replica, first in engines.items()},
        {rank: CoreShare(first, trainer_threads, taken[ranks[rank]]) for rank, first in trainers.items()},
    )
