"""Finds room for a run's processes on the hosts of a cluster: which share a host, and what each reserves. Pure.

The driver reserves what ``plan`` returns. The doctor says by the same plan whether a run fits, and ``misfit`` why not.
This module does not know Ray, which does the placing: ``_place`` predicts where.

The trainer's ranks are numbered so that neighbours exchange most (Megatron's order tp-cp-ep-dp-pp). A *block* is a run
of neighbours that must share a host, and one bundle of the trainer's placement group. An engine has as many hosts as
rollout.hosts_per_engine says, all different, and a *part* on each: one bundle of the engine's placement group.

On GPUs a plan fits whenever the run can be placed at all: engines of one size leave the same number of GPUs free
however they are distributed, and each rank takes any one of these. Blocks of more ranks are placed if they find room
with all engines placed before them, or all after them, as Ray places: other distributions are not tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from async_rl.config.schema import RunConfig
from async_rl.config.training import ParallelSection
from async_rl.trainer.parallel import world_size

T = TypeVar("T")

Resources = Mapping[str, float]
"""Amounts by Ray's names, for example ``{"GPU": 8.0}``."""

# Most processes of a run that share one core of a CPU host. Beyond them the run waits for more hosts.
_MOST_PER_CORE = 64


@dataclass(frozen=True, slots=True)
class Need:
    """Processes of one kind, alike in what they need."""

    what: str
    """One of them, for example ``engine``."""
    count: int
    """Those that need room on one host: of an engine over several hosts, each part."""
    size: float
    """GPUs that each needs on one host, half a one where two share it, or on CPU its threads."""
    settings: str
    """The settings that ``count`` and ``size`` come from."""
    apart: int = 1
    """How many of them in turn must be on different hosts, the parts of an engine."""

    @property
    def units(self) -> float:
        """GPUs, or on CPU threads, of all of them."""
        return self.count * self.size


@dataclass(frozen=True, slots=True)
class Load:
    """The processes of a run on one host."""

    engines: int
    """Engines, or parts of such as span hosts."""
    ranks: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run reserves on a cluster."""

    block: int
    """Trainer ranks per block: rank r is in block r // block."""
    blocks: int
    per_block: dict[str, float]
    """What each block needs on one host."""
    per_replica: dict[str, float]
    """What each rollout engine needs on each of its hosts."""
    trainer_first: bool
    """Whether the trainer is placed before the engines."""
    sharing: int
    """The most processes that share a core; 1 on GPUs, which are not shared."""
    fits: bool
    """Whether the hosts have room for all; else the plan is for hosts that are still to come."""
    loads: tuple[Load, ...]
    """The processes of each host, in the order of the hosts; where not all fit, those that do."""


def kind(config: RunConfig) -> str:
    """Return Ray's name of what processes take of a host."""
    return "GPU" if config.resources.device == "cuda" else "CPU"


def processes(config: RunConfig, engines: int | None = None) -> tuple[Need, Need]:
    """Return what the engines and the trainer's ranks need, for a run whose device is known.

    ``engines`` is their number; None for that of the run, of engines that come and go for the fewest.
    """
    rollout, resources, hosts = config.rollout, config.resources, config.rollout.hosts_per_engine
    engine, rank = config.engine_gpus, config.rank_gpus
    settings = "rollout.replicas or rollout.tensor_parallel_size", "trainer.parallel"
    if kind(config) == "CPU":
        engine, rank = resources.engine_threads, resources.trainer_threads
        settings = "rollout.replicas or resources.engine_threads", "trainer.parallel or resources.trainer_threads"
    count = rollout.replica_range.min if engines is None else engines
    return (
        Need("engine" if hosts == 1 else "engine part", count * hosts, engine, settings[0], apart=hosts),
        Need("trainer rank", world_size(config.trainer.parallel), rank, settings[1]),
    )


def plan(config: RunConfig, hosts: Sequence[Resources], engines: int | None = None) -> Plan:
    """Return what the run reserves on a cluster of hosts with these resources; ``engines`` as for ``processes``.

    The blocks are the largest for which blocks and engines fit. On CPUs that are too few, processes share cores, as
    they do on one host. If nothing fits, the plan is for hosts that are still to come; where none has a GPU yet, blocks
    are the tensor-parallel groups.
    """
    room = [host.get(kind(config), 0.0) for host in hosts]
    candidates = _candidates(config, room, processes(config, engines))
    first = next(candidates)
    if first.fits:
        return first
    return next((found for found in candidates if found.fits), replace(first, loads=_unshared(config, room)))


def plan_on(config: RunConfig, room: Mapping[str, float], engines: int | None = None) -> Plan:
    """Return the plan for hosts with so much room each, by name: GPUs, or on CPU Ray's CPUs."""
    return plan(config, [{kind(config): amount} for amount in room.values()], engines)


def filled(config: RunConfig, room: Mapping[str, float]) -> dict[str, Load]:
    """Return the processes of each host once all engines have come that may come and find room there."""
    found = plan_on(config, room)
    loads = dict(zip(room, found.loads, strict=True))
    if not found.fits:
        return loads
    (unit,) = found.per_replica
    engine, block = found.per_replica[unit], found.per_block[unit]
    left = {
        host: room[host] - load.engines * engine - load.ranks // found.block * block for host, load in loads.items()
    }
    for _ in range(config.rollout.replica_range.max - config.rollout.replica_range.min):
        hosts = _most_room(left, config.rollout.hosts_per_engine, engine)
        for host in hosts:
            left[host] -= engine
            loads[host] = replace(loads[host], engines=loads[host].engines + 1)
    return loads


def _most_room(left: Mapping[T, float], count: int, amount: float) -> list[T]:
    """Return so many different hosts, those with most room first; none where one of them has less than ``amount``."""
    hosts = sorted(left, key=left.__getitem__, reverse=True)[:count]
    return hosts if len(hosts) == count and left[hosts[-1]] + 1e-9 >= amount else []


def _candidates(config: RunConfig, room: Sequence[float], needs: tuple[Need, Need]) -> Iterator[Plan]:
    """Yield the possible plans, the best first."""
    unit, (engine, rank), sizes = kind(config), needs, config.trainer.parallel
    largest = max(room, default=0) or sizes.tp * rank.size
    # On hosts that are alike the trainer leaves whole hosts to the engines. Else it could take those that they need.
    alike = len({amount for amount in room if amount}) <= 1
    for sharing in range(1, 2 if unit == "GPU" else _MOST_PER_CORE + 1):
        for block in _block_sizes(sizes, int(largest * sharing / rank.size)):
            per_block, per_replica = _units(rank.size * block / sharing), _units(engine.size / sharing)
            blocks = rank.count // block
            trainer_first = alike or per_block >= per_replica
            for order in (trainer_first, not trainer_first):
                engines = replace(engine, size=per_replica)
                loads = _place(room, engines, replace(rank, size=per_block, count=blocks), trainer_first=order)
                yield Plan(
                    block=block,
                    blocks=blocks,
                    per_block={unit: per_block},
                    per_replica={unit: per_replica},
                    trainer_first=order,
                    sharing=sharing,
                    fits=sum(load.engines + load.ranks for load in loads) == engine.count + blocks,
                    loads=tuple(Load(load.engines, load.ranks * block) for load in loads),
                )


def _unshared(config: RunConfig, room: Sequence[float]) -> tuple[Load, ...]:
    """Return the processes of each host, where none share a core and ranks are apart: as many as find room."""
    engine, rank = processes(config)
    return _place(room, engine, rank, trainer_first=rank.size > engine.size)


def _place(room: Sequence[float], engines: Need, blocks: Need, *, trainer_first: bool) -> tuple[Load, ...]:
    """Return how many engines and blocks come to each host; ``ranks`` are blocks.

    Ray packs the blocks, which are one group, on as few hosts as possible. Each engine is a group, whose parts come to
    different hosts. Each group begins on the host with most room.
    """
    left = dict(enumerate(room))
    placed = {"engines": [0] * len(room), "ranks": [0] * len(room)}

    def place_engines() -> None:
        for _ in range(engines.count // engines.apart):
            for host in _most_room(left, engines.apart, engines.size):
                left[host] -= engines.size
                placed["engines"][host] += 1

    def place_blocks() -> None:
        count = blocks.count
        while count and left:
            host = max(left, key=left.__getitem__)
            here = min(count, int((left[host] + 1e-9) / blocks.size))
            if not here:
                break
            left[host] -= here * blocks.size
            placed["ranks"][host] += here
            count -= here

    for place in (place_blocks, place_engines) if trainer_first else (place_engines, place_blocks):
        place()
    return tuple(map(Load, placed["engines"], placed["ranks"]))


def _units(amount: float) -> float:
    """Return ``amount`` as Ray counts it, in ten-thousandths."""
    return math.floor(amount * 10_000) / 10_000


def block_size(sizes: ParallelSection, limit: int) -> int:
    """Return the ranks of a block on hosts with places for ``limit`` of them.

    Whole tensor-parallel groups come first, then those that split an expert, then context and expert parallelism. Of a
    group that no host has room for, a block has as many neighbours as divide it.
    """
    block = 1
    for group in (sizes.tp, sizes.etp, sizes.tp * sizes.cp, sizes.etp * sizes.ep):
        divisors = (size for size in range(1, group + 1) if group % size == 0)
        block = max(grown for size in divisors if (grown := math.lcm(block, size)) <= max(limit, block))
    return block


def _block_sizes(sizes: ParallelSection, limit: int) -> Iterator[int]:
    """Yield the possible sizes of a block from the largest down."""
    size = block_size(sizes, max(limit, 1))
    yield size
    while size > 1:
        size = block_size(sizes, size - 1)
        yield size


def misfit(config: RunConfig, room: Mapping[str, float], units: str) -> str | None:
    """Say in one line why a run does not fit on hosts with so much room, by name, each process with its own.

    For example that no host has 8 GPUs for an engine; None if all fit. units: what is counted, for example ``GPUs``.
    """
    found = plan_on(config, room)
    if found.fits and found.sharing == 1:
        return None
    if (fault := too_large(config, room, units)) is not None:
        return fault
    there, needs = _listed_room(room), processes(config)
    total, needed = sum(room.values()), sum(need.units for need in needs)
    wanted = " and ".join(counted(need.count, need.what) + (f" of {need.size:g}" * (need.size > 1)) for need in needs)
    if total < needed:
        most = "" if found.fits or kind(config) == "GPU" else f", and at most {_MOST_PER_CORE} processes share one"
        return f"{total:g} {units} in all ({there}), but {needed:g} are needed for {wanted}{most}"
    loads = _unshared(config, list(room.values()))
    engines, ranks = sum(load.engines for load in loads), sum(load.ranks for load in loads)
    need, placed = (needs[0], engines) if engines < needs[0].count else (needs[1], ranks)
    apart = ", and the parts of an engine need different hosts" * (need.apart > 1)
    return (
        f"{total:g} {units} are enough in all ({there}), but {need.count - placed} of {wanted} find no host with "
        f"{need.size:g} free: each needs its {units} on one host{apart}"
    )


def too_large(config: RunConfig, room: Mapping[str, float], units: str) -> str | None:
    """Say in one line which process alone fits no host with so much room; None if each does."""
    for need in processes(config):
        if need.size > max(room.values(), default=0):
            return f"no host has {need.size:g} {units} for {_one(need.what)} ({_listed_room(room)})"
    return None


def _listed_room(room: Mapping[str, float]) -> str:
    return listed([f"{host}: {amount:g}" for host, amount in room.items()])


def listed(items: Sequence[str], most: int = 8) -> str:
    """Join items by commas, of many only the first ones and how many more there are."""
    more = len(items) - most
    return ", ".join(items) if more <= 0 else f"{', '.join(items[:most])} and {more} more"


def counted(count: int, what: str) -> str:
    """Return a number of things in words, for example ``1 engine`` or ``2 engines``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _one(what: str) -> str:
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"
