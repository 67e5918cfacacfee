"""Where the actors of a run are created: Ray's placement groups on a cluster that was joined, nothing on one host.

One group is the trainer's, with a bundle per block of ranks, and one each rollout worker's. They outlive the actors in
them, so that an actor which replaces another comes back at its place; bundles of a lost host are placed again by Ray.
``doctor.placement`` decides what is in them. This module reserves it and looks where it came to be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import structlog
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from async_rl.config.schema import RunConfig
from async_rl.doctor import placement
from async_rl.doctor.placement import Resources
from async_rl.driver.core_shares import Shares, core_shares
from async_rl.rollout.stats import worker_id
from async_rl.runtime.cores import CoreShare
from async_rl.trainer.parallel import world_size

log = structlog.get_logger(__name__)

TRAINER = "trainer"

# Hosts that a message names with what they have left.
_NAMED_HOSTS = 8


@dataclass(frozen=True, slots=True)
class Place:
    """Where one actor is created."""

    cores: CoreShare | None
    """Its cores; None if it may use any."""
    options: dict[str, Any] = field(default_factory=dict)
    """Ray's options that put it there."""


class Places:
    """The places of a run's actors; begins to reserve them where the run has joined a cluster."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._ranks = world_size(config.trainer.parallel)
        self._replicas = range(config.rollout.replicas)
        self.one_host = config.cluster.joined_address is None
        """Whether all processes of the run are on the driver's host."""
        self._block = self._ranks
        self._groups: dict[str, PlacementGroup] = {}
        # The host of each bundle, where it was last seen: on one host, that one.
        self._hosts: dict[str, list[str]] = {name: [""] for name in (TRAINER, *map(worker_id, self._replicas))}
        if not self.one_host:
            self._reserve()

    def _reserve(self) -> None:
        plan = placement.plan(self._config, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        self._block = plan.block
        trainer = {TRAINER: ([plan.per_block] * plan.blocks, "PACK")}
        replicas = {worker_id(replica): ([plan.per_replica], "STRICT_PACK") for replica in self._replicas}
        for name, (bundles, strategy) in (trainer | replicas if plan.trainer_first else replicas | trainer).items():
            self._groups[name] = ray.util.placement_group(bundles, strategy=strategy)
        log.info("places_reserved", blocks=plan.blocks, ranks_per_block=plan.block, replicas=len(replicas))

    def reserved(self) -> Mapping[str, Awaitable[None]]:
        """Return a wait for each group by the name of what it is for; it ends when the group is placed."""
        return {name: self._placed(name) for name in self._groups}

    async def _placed(self, name: str) -> None:
        group = self._groups[name]
        await group.ready()
        table = await asyncio.to_thread(ray.util.placement_group_table, group)
        by_bundle = table["bundles_to_node_id"]
        self._hosts[name] = [by_bundle[bundle] for bundle in sorted(by_bundle)]

    async def of_trainer(self) -> list[Place]:
        """Return the place of each rank once all of them have one, also after Ray had to find others for some."""
        if TRAINER in self._groups:
            await self._placed(TRAINER)
        shares, bundles = self._shares().trainers, self._bundles()
        return [Place(shares.get(rank), self._options(TRAINER, bundle)) for rank, bundle in enumerate(bundles)]

    def of_replica(self, replica: int) -> Place:
        """Return the place of a replica. Where its bundle is to be placed again, Ray creates the actor afterwards."""
        return Place(self._shares().engines.get(replica), self._options(worker_id(replica), 0))

    def _bundles(self) -> list[int]:
        """Return the trainer's bundle of each rank."""
        order = bundle_order(self._hosts[TRAINER])
        return [order[rank // self._block] for rank in range(self._ranks)]

    def _shares(self) -> Shares:
        ranks = [self._hosts[TRAINER][bundle] for bundle in self._bundles()]
        replicas = {replica: self._hosts[worker_id(replica)][0] for replica in self._replicas}
        return core_shares(self._config, replicas, ranks)

    def _options(self, name: str, bundle: int) -> dict[str, Any]:
        if name not in self._groups:
            return {}
        strategy = PlacementGroupSchedulingStrategy(
            self._groups[name],
            placement_group_bundle_index=bundle,
            # What an actor starts is within its own process tree; vLLM would start Ray actors of its own otherwise.
            placement_group_capture_child_tasks=False,
        )
        return {"scheduling_strategy": strategy}

    def release(self) -> None:
        """Give the places back, and end what is still in them."""
        for group in self._groups.values():
            ray.util.remove_placement_group(group)

    async def free(self) -> str:
        """Return what no actor has taken, for example ``1 CPU, 0 GPU``; of several hosts also by host, and what waits.

        ``12 CPU, 4 GPU (10.0.0.1: 4 CPU, 4 GPU; 10.0.0.2: 8 CPU, 0 GPU; not placed: rollout-1, 8 GPU on one host)``
        """
        free = await asyncio.to_thread(ray.available_resources)
        if self.one_host:
            return amounts(free)
        by_host = await asyncio.to_thread(_free_by_host)
        named = [f"{host}: {amounts(left)}" for host, left in by_host[:_NAMED_HOSTS]]
        if len(by_host) > _NAMED_HOSTS:
            named.append(f"and {len(by_host) - _NAMED_HOSTS} more hosts")
        if waiting := await asyncio.to_thread(self._waiting):
            named.append("not placed: " + ", ".join(waiting))
        return f"{amounts(free)} ({'; '.join(named)})"

    def _waiting(self) -> list[str]:
        """Return the groups that are not placed, each with what it needs."""
        tables = {name: ray.util.placement_group_table(group) for name, group in self._groups.items()}
        return [
            f"{name}, {needs(list(table['bundles'].values()))}"
            for name, table in tables.items()
            if table["state"] != "CREATED"
        ]


def _free_by_host() -> list[tuple[str, dict[str, float]]]:
    """Return address and free resources of each host, those with most GPUs and then CPUs first."""
    left = available_resources_per_node()
    found = [(node["NodeManagerAddress"], left.get(node["NodeID"], {})) for node in ray.nodes() if node["Alive"]]
    return sorted(found, key=lambda host: (-host[1].get("GPU", 0), -host[1].get("CPU", 0), host[0]))


def bundle_order(hosts: Sequence[str]) -> list[int]:
    """Return the bundles in the order in which the blocks take them: those of one host are neighbours.

    ``hosts`` are the hosts of the bundles. The same hosts give the same order, whatever ran on them meanwhile.
    """
    first = {host: hosts.index(host) for host in set(hosts)}
    return sorted(range(len(hosts)), key=lambda bundle: (first[hosts[bundle]], bundle))


def amounts(resources: Resources) -> str:
    """Return CPUs and GPUs in words, for example ``1 CPU, 0 GPU``."""
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))


def needs(bundles: Sequence[Resources]) -> str:
    """Return what the equal bundles of a group need, for example ``2 x 8 GPU, each on one host``."""
    each = ", ".join(f"{amount:g} {kind}" for kind, amount in bundles[0].items())
    return f"{each} on one host" if len(bundles) == 1 else f"{len(bundles)} x {each}, each on one host"
