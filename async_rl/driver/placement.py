"""Which of a run's processes share a host, and which cores of it each one computes on. Pure: knows no Ray.

The trainer's ranks are numbered so that neighbours exchange most (Megatron's order tp-cp-ep-dp-pp). A *block* is a run
of neighbours that must share a host, and one bundle of the trainer's placement group. An engine is never split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from async_rl.config.schema import ParallelSection, RunConfig
from async_rl.runtime.cores import CoreShare, HostCores
from async_rl.trainer.parallel import world_size

Resources = Mapping[str, float]
"""Amounts by Ray's names, for example ``{"GPU": 8.0}``."""

# Most processes of a run that share one core of a CPU host. Beyond them the run waits for more hosts.
_MOST_PER_CORE = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run reserves on a cluster."""

    block: int
    """Trainer ranks per block: rank r is in block r // block."""
    blocks: int
    per_block: dict[str, float]
    """What each block needs on one host."""
    per_replica: dict[str, float]
    """What each rollout engine needs on one host."""
    trainer_first: bool
    """Whether the trainer is placed before the engines."""


@dataclass(frozen=True, slots=True)
class Shares:
    """The cores of each process on its own host; without an entry a process may use any."""

    engines: Mapping[int, CoreShare]
    """By replica."""
    trainers: Mapping[int, CoreShare]
    """By rank."""


def plan(config: RunConfig, hosts: Sequence[Resources]) -> Plan:
    """Return what the run reserves on a cluster of hosts with these resources.

    The blocks are the largest for which blocks and engines fit, of engines that come and go the fewest. On CPUs that
    are too few, processes share cores, as they do on one host. If nothing fits, the plan is for hosts that are still to
    come; where none has a GPU yet, blocks are the tensor-parallel groups.
    """
    if config.resources.device == "cuda":
        kind, rank, engine, most_per_unit = "GPU", 1, config.rollout.tensor_parallel_size, 1
    else:
        kind, most_per_unit = "CPU", _MOST_PER_CORE
        rank, engine = config.resources.trainer_threads, config.resources.engine_threads
    sizes, room = config.trainer.parallel, [host.get(kind, 0.0) for host in hosts]
    largest = max(room, default=0) or sizes.tp * rank
    found: Plan | None = None
    for sharing in range(1, most_per_unit + 1):
        for block in _block_sizes(sizes, int(largest * sharing / rank)):
            candidate = _plan(kind, block, world_size(sizes) // block, rank * block / sharing, engine / sharing, room)
            if _fits(candidate, kind, room, config.rollout.replica_range.min):
                return candidate
            found = found or candidate
    assert found is not None
    return found


def _plan(kind: str, block: int, blocks: int, per_block: float, per_replica: float, room: Sequence[float]) -> Plan:
    # On hosts that are alike the trainer leaves whole hosts to the engines. Else it could take those that they need.
    alike = len({amount for amount in room if amount}) <= 1
    return Plan(
        block=block,
        blocks=blocks,
        per_block={kind: _units(per_block)},
        per_replica={kind: _units(per_replica)},
        trainer_first=alike or per_block >= per_replica,
    )


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


def _fits(plan: Plan, kind: str, room: Sequence[float], replicas: int) -> bool:
    """Return whether blocks and engines fit on hosts with ``room``, placed one after the other as Ray places them.

    Ray packs the bundles of a group on as few hosts as possible, and begins each group on the host with most room.
    """
    left = list(room)
    trainer, engines = (plan.per_block[kind], plan.blocks, plan.blocks), (plan.per_replica[kind], replicas, 1)
    for amount, count, together in (trainer, engines) if plan.trainer_first else (engines, trainer):
        remaining = count
        while remaining:
            host = max(range(len(left)), key=left.__getitem__, default=0)
            placed = min(remaining, together, int((left[host] + 1e-9) / amount)) if left else 0
            if not placed:
                return False
            left[host] -= placed * amount
            remaining -= placed
    return True


def bundle_order(hosts: Sequence[str]) -> list[int]:
    """Return the bundles in the order in which the blocks take them: those of one host are neighbours.

    ``hosts`` are the hosts of the bundles. The same hosts give the same order, whatever ran on them meanwhile.
    """
    first = {host: hosts.index(host) for host in set(hosts)}
    return sorted(range(len(hosts)), key=lambda bundle: (first[hosts[bundle]], bundle))


def core_shares(
    config: RunConfig, replicas: Mapping[int, str], ranks: Sequence[str], given: HostCores | None = None
) -> Shares:
    """Give engines and trainer ranks cores of their own on their hosts, engines first.

    ``replicas`` and ``ranks`` name the host of each. ``given`` are the cores that they have by now; those that stay on
    their host keep them. GPU hosts have more cores than processes, whose helper threads (autograd, NCCL, the driver's)
    need some too: nothing is bound there.
    """
    if not config.resources.pin_cores or config.resources.device == "cuda":
        return Shares({}, {})
    given = HostCores() if given is None else given
    engines = {f"engine {replica}": host for replica, host in replicas.items()}
    trainers = {f"rank {rank}": host for rank, host in enumerate(ranks)}
    given.keep(engines | trainers)
    for process, host in engines.items():
        given.give(process, host, config.resources.engine_threads)
    for process, host in trainers.items():
        given.give(process, host, config.resources.trainer_threads)
    return Shares(
        {replica: given.share(process) for replica, process in zip(replicas, engines, strict=True)},
        {rank: given.share(process) for rank, process in enumerate(trainers)},
    )


def amounts(resources: Resources) -> str:
    """Return CPUs and GPUs in words, for example ``1 CPU, 0 GPU``."""
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))


def needs(bundles: Sequence[Resources]) -> str:
    """Return what the equal bundles of a group need, for example ``2 x 8 GPU, each on one host``."""
    each = ", ".join(f"{amount:g} {kind}" for kind, amount in bundles[0].items())
    return f"{each} on one host" if len(bundles) == 1 else f"{len(bundles)} x {each}, each on one host"
