"""Checks of a run for a cluster that is only described: so many hosts, with so many GPUs of so much memory each.

What settings and config.json decide, and nothing of this machine: neither weights nor data nor GPUs need be here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from async_rl.config.loading import with_settings
from async_rl.config.schema import RunConfig
from async_rl.doctor import capacity, pass_through
from async_rl.doctor.check import Check, refused
from async_rl.doctor.memory_plan import (
    GB,
    RANK_RESERVE,
    ClusterSpec,
    engine_faults,
    engine_memory,
    rank_fault,
    rank_memory,
    rank_room,
)
from async_rl.doctor.parameters import parameters_of
from async_rl.doctor.placement import Load, counted, misfit, plan_on, processes
from async_rl.errors import AsyncRLError, ConfigError
from async_rl.models.config import ModelConfig, check_run, read_model_config

# An address that is never asked: groups are then in the object stores of that cluster, and not of this host.
_THERE = {"resources.device": "cuda", "cluster.address": "described"}


def checks(config: RunConfig, spec: ClusterSpec) -> list[Check]:
    """Check whether the run can start on such a cluster. Raises ConfigError for settings that no GPU run can have."""
    there = with_settings(config, _THERE)
    try:
        model = read_model_config(there.model.path)
        check_run(there, model)
    except AsyncRLError as error:
        return [refused("model", error)]
    found = [
        Check(
            "model.path",
            "ok",
            f"{there.model.path}: {model.architecture}, {parameters_of(model).total / 1e9:.2f} billion parameters",
        )
    ]
    for each in (
        _placed(there, spec),
        _memory(there, model, spec),
        pass_through.names(there),
        capacity.longest_responses(there),
    ):
        found.extend(each)
    return found


def _placed(config: RunConfig, spec: ClusterSpec) -> Iterator[Check]:
    room = {f"host {number}": float(spec.gpus) for number in range(1, spec.hosts + 1)}
    if (fault := misfit(config, room, "GPUs")) is not None:
        yield Check("GPU", "FAIL", fault, "lower rollout.replicas or trainer.parallel, or describe a larger cluster")
        return
    loads = plan_on(config, room).loads
    yield Check("GPU", "ok", f"{spec}: {_said(config, loads)}")
    if config.sync_backend == "shm" and sum(load.engines + load.ranks > 0 for load in loads) > 1:
        yield Check(
            "sync.backend",
            "FAIL",
            "shm reaches engines on the trainer's host alone, but the run takes several hosts",
            "set sync.backend to auto",
            ConfigError,
        )


def _said(config: RunConfig, loads: Sequence[Load]) -> str:
    """Return what the hosts have in words, for example ``8 hosts of 8 trainer ranks, 4 hosts of 1 engine``."""
    kinds = Counter(load for load in loads if load.ranks or load.engines)
    return ", ".join(f"{counted(hosts, 'host')} of {_processes(config, load)}" for load, hosts in kinds.items())


def _processes(config: RunConfig, load: Load) -> str:
    engine, rank = processes(config)
    parts = [(load.ranks, rank.what), (load.engines, engine.what)]
    return " and ".join(counted(count, what) for count, what in parts if count)


def _memory(config: RunConfig, model: ModelConfig, spec: ClusterSpec) -> Iterator[Check]:
    if (fault := rank_fault(config, model, spec)) is not None:
        yield Check("trainer memory", "FAIL", fault, "see async-rl plan memory")
    else:
        total = rank_memory(config, model).total + RANK_RESERVE
        room = rank_room(config, model, spec.gb)
        yield Check("trainer memory", "ok", f"{total / GB:.1f} of {room / GB:.4g} GB on a rank, by estimate")
    engine = engine_memory(config, model, spec.gb)
    faults = list(engine_faults(config, engine, spec))
    for fault in faults:
        yield Check("engine memory", "FAIL", f"does not fit: {fault}", "see async-rl plan memory")
    if not faults:
        yield Check("engine memory", "ok", f"its cache holds {engine.tokens} tokens, by estimate")
