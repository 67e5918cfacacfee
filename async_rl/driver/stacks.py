"""The stacks of the run's processes, into its log folder, when it stands still: also of one that answers nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from async_rl.runtime.process import DUMP_STACKS

# The engine's own process, which is a child of its worker's.
_ENGINE = "EngineCore"
_WRITTEN_S = 2.0


async def dump_stacks(actors: Sequence[Any]) -> None:
    """Have each actor's process, the engines and this one write their stacks to logs/<role>.stacks.txt.

    A signal does it, so that a process writes whatever it is at.
    """
    os.kill(os.getpid(), DUMP_STACKS)
    here = ray.get_runtime_context().get_node_id()
    elsewhere: dict[str, list[int]] = {}
    for node, pid in await asyncio.to_thread(_processes, {actor._actor_id.hex() for actor in actors}):
        if node == here:
            _signal([pid])
        else:
            elsewhere.setdefault(node, []).append(pid)
    for node, pids in elsewhere.items():
        on_node = NodeAffinitySchedulingStrategy(node, soft=False)
        ray.remote(num_cpus=0)(_signal).options(scheduling_strategy=on_node).remote(pids)
    await asyncio.sleep(_WRITTEN_S)


def _processes(actor_ids: set[str]) -> list[tuple[str, int]]:
    """(node, pid) of each actor, as Ray has them on record."""
    table = ray._private.state.actors()
    return [
        (table[actor_id]["Address"]["NodeID"], table[actor_id]["Pid"]) for actor_id in actor_ids if actor_id in table
    ]


def _signal(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            engines = [child.pid for child in psutil.Process(pid).children() if _ENGINE in child.name()]
            for each in (pid, *engines):
                os.kill(each, DUMP_STACKS)
