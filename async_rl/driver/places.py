"""Where the actors of a run are created: Ray's placement groups on a cluster that was joined, nothing on one host.

One group is the trainer's, with a bundle per block of ranks, and one each rollout worker's, with a bundle per host of
its engine. They outlive the actors in them, so that an actor which replaces another comes back at its place; bundles of
a lost host are placed again by Ray.
``doctor.placement`` decides what is in them. This module reserves it and looks where it came to be.

A run whose replicas come and go (``config.rollout.elastic``) has groups on one host too. Those of its first replicas
are reserved with the trainer's. Those of the others are asked for once the trainer has its place, and wait for hosts as
long as the run lasts: Ray's autoscaler starts hosts for groups that wait, and Ray places them by itself when a host
joins. Nothing is polled for them. A group that comes to a host that lacks something (``newcomers``) is replaced by one
that does not.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from async_rl.driver.host_watch import HostWatch
from async_rl.driver.newcomers import Newcomers
from async_rl.rollout.stats import worker_id
from async_rl.runtime.cores import CoreShare, HostCores
from async_rl.runtime.failures import is_host_lost
from async_rl.trainer.parallel import world_size

log = structlog.get_logger(__name__)

TRAINER = "trainer"

# Hosts that a message names with what they have left, and groups that it names because they are not placed.
_NAMED = 8

# For so long a worker that cannot be reached may turn out to be gone with its host, for which Ray takes this long where
# the host's connections are refused. Its restart is not counted then.
_CONCLUDED_S = 20.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where one actor is created."""

    cores: CoreShare | None
    """Its cores; None if it may use any."""
    options: dict[str, Any] = field(default_factory=dict)
    """Ray's options that put it there."""


class Places:
    """The places of a run's actors; begins to reserve them, unless a run on one host has a fixed number of replicas."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._ranks = world_size(config.trainer.parallel)
        self._replicas = config.rollout.replica_range
        self._elastic = config.rollout.elastic
        self._parts = config.rollout.hosts_per_engine
        self._strategy = "STRICT_PACK" if self._parts == 1 else "STRICT_SPREAD"
        self.one_host = config.cluster.joined_address is None
        """Whether all processes of the run are on the driver's host."""
        self._block = self._ranks
        self._per_replica: dict[str, float] = {}
        self._groups: dict[str, PlacementGroup] = {}
        # The host of each bundle that is placed, where it was last seen: on one host, that one.
        self._hosts: dict[str, list[str]] = {TRAINER: [""]}
        self._cores = HostCores()
        self._watch = HostWatch()
        self._newcomers: Newcomers  # of a run with groups
        self._trainer_placed, self._trainer_missing = asyncio.Event(), asyncio.Event()
        if self.one_host and not self._elastic:
            self._hosts |= {worker_id(replica): [""] for replica in range(self._replicas.max)}
        else:
            self._reserve()

    def _reserve(self) -> None:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        self._newcomers = Newcomers(self._config, [node["NodeID"] for node in nodes])
        if self._config.resources.share_gpu:  # a bundle has a GPU of its own, and both have half of that one
            both = ray.util.placement_group([{"GPU": 1.0}], strategy="STRICT_PACK")
            self._groups = {TRAINER: both, worker_id(0): both}
            return
        plan = placement.plan(self._config, [node["Resources"] for node in nodes])
        self._block, self._per_replica = plan.block, plan.per_replica
        trainer = {TRAINER: ([plan.per_block] * plan.blocks, "PACK")}
        first = map(worker_id, range(self._replicas.min))
        replicas = {name: ([plan.per_replica] * self._parts, self._strategy) for name in first}
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
        if name == TRAINER:
            self._trainer_missing.clear()
            self._trainer_placed.set()

    async def placed(self, replica: int) -> None:
        """Return once a replica has a place, which an elastic run asks for here unless the replica has one.

        While the trainer has none, no other is asked for: a replica must not take the host that the trainer waits for.
        """
        name = worker_id(replica)
        if self._elastic:
            if name in self._hosts and await self._any_is_gone(self._hosts[name]):
                self.give_up(replica)
            while not (await self._placed_after_trainer(name) and await self._all_fit(self._hosts[name])):
                self.give_up(replica)
        elif name in self._groups:
            await self._placed(name)

    async def _all_fit(self, hosts: Sequence[str]) -> bool:
        return all([await self._newcomers.fits(host) for host in hosts])

    async def _any_is_gone(self, hosts: Sequence[str]) -> bool:
        return any([await self._watch.is_gone(host) for host in hosts])

    async def _placed_after_trainer(self, name: str) -> bool:
        """Return once a group is placed, or the trainer has lost its place before: whether the group is placed."""
        await self._trainer_placed.wait()
        if name not in self._groups:
            bundles = [self._per_replica] * self._parts
            self._groups[name] = ray.util.placement_group(
                bundles, strategy=self._strategy, bundle_label_selector=self._newcomers.selectors(self._parts)
            )
            log.info("replica_waiting", replica=name, needs=needs(bundles))
        placing = asyncio.ensure_future(self._placed(name))
        missing = asyncio.ensure_future(self._trainer_missing.wait())
        try:
            await asyncio.wait([placing, missing], return_when=asyncio.FIRST_COMPLETED)
            if placing.done():
                placing.result()
            return placing.done()
        finally:
            placing.cancel()
            missing.cancel()

    def give_up(self, replica: int) -> None:
        """Give the place of a replica back, and end what is still in it.

        Ray would place the group of a lost host again by itself. But as long as no host has room for it, Ray tries this
        one again without a pause, and no other group.
        """
        self._hosts.pop(worker_id(replica), None)
        if (group := self._groups.pop(worker_id(replica), None)) is not None:
            ray.util.remove_placement_group(group)

    async def has_left(self, replica: int, error: BaseException) -> bool:
        """Return whether a host of a replica of an elastic run is gone, whose worker died of ``error``."""
        hosts = self._hosts.get(worker_id(replica))
        if not self._elastic or hosts is None:
            return False
        if await self._any_is_gone(hosts):
            return True
        if is_host_lost(error) or is_host_lost(error.__cause__):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.until_gone(replica), _CONCLUDED_S)
                return True
        return False

    async def until_gone(self, replica: int) -> None:
        """Return once a host of a replica of an elastic run is gone. Otherwise never return."""
        if not self._elastic:
            await asyncio.Event().wait()
        left = [asyncio.ensure_future(self._watch.gone(host)) for host in self._hosts[worker_id(replica)]]
        try:
            await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in left:
                each.cancel()

    async def of_trainer(self) -> list[Place]:
        """Return the place of each rank once all of them have one, also after Ray had to find others for some."""
        if TRAINER in self._groups:
            table = await asyncio.to_thread(ray.util.placement_group_table, self._groups[TRAINER])
            if table["state"] != "CREATED":
                self._trainer_placed.clear()
                self._trainer_missing.set()
            await self._placed(TRAINER)
        shares, bundles = self._shares().trainers, self._bundles()
        return [Place(shares.get(rank), self._options(TRAINER, bundle)) for rank, bundle in enumerate(bundles)]

    def of_replica(self, replica: int) -> list[Place]:
        """Return the places of a replica, which it has; see ``placed``. The first is its worker's.

        The others are those of the parts of an engine that spans hosts, in the order of their ranks.
        """
        engines = self._shares().engines
        return [
            Place(engines.get((replica, part)), self._options(worker_id(replica), part)) for part in range(self._parts)
        ]

    def _bundles(self) -> list[int]:
        """Return the trainer's bundle of each rank."""
        order = bundle_order(self._hosts[TRAINER])
        return [order[rank // self._block] for rank in range(self._ranks)]

    def _shares(self) -> Shares:
        ranks = [self._hosts[TRAINER][bundle] for bundle in self._bundles()]
        engines = {
            (replica, part): host
            for replica in range(self._replicas.max)
            for part, host in enumerate(self._hosts.get(worker_id(replica), []))
        }
        return core_shares(self._config, engines, ranks, self._cores)

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
        for group in {id(group): group for group in self._groups.values()}.values():
            ray.util.remove_placement_group(group)

    async def free(self) -> str:
        """Return what no actor has taken, for example ``1 CPU, 0 GPU``; of several hosts also by host, and what waits.

        ``12 CPU, 4 GPU (10.0.0.1: 4 CPU, 4 GPU; 10.0.0.2: 8 CPU, 0 GPU; not placed: rollout-1, 8 GPU on one host)``
        """
        free = await asyncio.to_thread(ray.available_resources)
        named: list[str] = []
        if not self.one_host:
            by_host = await asyncio.to_thread(_free_by_host)
            named += _first([f"{host}: {amounts(left)}" for host, left in by_host], "hosts")
        if waiting := await asyncio.to_thread(self._waiting):
            named.append("not placed: " + ", ".join(_first(waiting, "groups")))
        return amounts(free) + (f" ({'; '.join(named)})" if named else "")

    def _waiting(self) -> list[str]:
        """Return the groups that are not placed, each with what it needs."""
        tables = {name: ray.util.placement_group_table(group) for name, group in list(self._groups.items())}
        return [
            f"{name}, {needs(list(table['bundles'].values()))}"
            for name, table in tables.items()
            if table["state"] != "CREATED"
        ]


def _first(items: list[str], what: str) -> list[str]:
    """Return the items that a message names; of many, the first ones and how many more there are."""
    more = len(items) - _NAMED
    return items if more <= 0 else [*items[:_NAMED], f"and {more} more {what}"]


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
