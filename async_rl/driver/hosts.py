"""Asks each host of a cluster that was up before the run what it has, and refuses a run for which one lacks something.

One short task per Ray node runs ``doctor.host.look`` there, all at once; ``doctor.cluster`` judges what they report.
This happens before any actor or the run folder is made, and decides what depends on the hosts: the device, and where
metrics are served. A run that starts a cluster of its own on this host needs none of it.
"""

from __future__ import annotations

import contextlib
import secrets
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node  # an interface for developers, of no public module
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from async_rl import doctor
from async_rl.config.paths import absolute, path_settings
from async_rl.config.schema import RunConfig
from async_rl.doctor import cluster, host, machine
from async_rl.doctor.host_report import HostReport, table
from async_rl.driver.cluster import ray_cluster
from async_rl.errors import ConfigError
from async_rl.runtime.failures import unwrap_ray_error

ANSWER_S = 120.0
"""Seconds that a host has for its report. A worker process starts and imports this package in 1 to 10 of them, and in
more where the packages are on a file system that all hosts read at once."""

_FIELDS = frozenset(field.name for field in fields(HostReport))


@dataclass(frozen=True, slots=True)
class Survey:
    """What the hosts of a cluster have."""

    hosts: Sequence[HostReport]
    own: HostReport
    """What the driver's process sees on its host."""


@contextlib.contextmanager
def joined(config: RunConfig) -> Iterator[RunConfig]:
    """Join the run's cluster, if it was up before the run, for the block; yield the settings as its hosts decide them.

    Yields ``config`` as it is for a run that starts a cluster of its own. Raises ConfigError or ResourceError for the
    first thing that a host lacks.
    """
    if config.cluster.joined_address is None:
        yield config
        return
    with ray_cluster(config):
        survey = surveyed(config)
        config = settled(config, survey)
        doctor.require_cluster(config, survey.hosts, survey.own)
        yield config


def examine(config: RunConfig) -> tuple[str, bool]:
    """Return what ``async-rl doctor CONFIG --cluster`` prints, and whether a run could start.

    Raises ConfigError if no cluster is named, and ResourceError if it cannot be joined.
    """
    if config.cluster.joined_address is None:
        raise ConfigError(
            "--cluster: no cluster is named; set cluster.address (auto for the one of this host) or RAY_ADDRESS"
        )
    config = absolute(config)
    # Under another name: the run may be under way, and of one name a cluster has one run.
    with ray_cluster(config.model_copy(update={"name": f"doctor-{secrets.token_hex(8)}"})):
        survey = surveyed(config)
        config = settled(config, survey)
    found = [*doctor.checks(config), *doctor.cluster_checks(config, survey.hosts, survey.own)]
    shown = table(config, machine.needs(config), survey.hosts, survey.own)
    return f"{shown}\n{doctor.report(found, 'cluster')}", not doctor.failed(found)


def surveyed(config: RunConfig, only: Collection[str] | None = None) -> Survey:
    """Ask every host of the cluster that this process has joined, all at once; with ``only`` those of these ids."""
    alive = (node for node in ray.nodes() if node["Alive"])
    nodes = sorted(alive, key=lambda node: (len(node["NodeManagerAddress"]), node["NodeManagerAddress"]))
    paths = {key: str(path) for key, path in path_settings(config) if _is_compared(config, key)}
    modules = list(cluster.user_modules(config))
    with _token(config.runs) as token:
        local_dir = None if config.cluster.shared_fs else str(config.cluster.local_dir or "")
        request = (paths, modules, str(token), local_dir)
        answers = _ask([node["NodeID"] for node in nodes if only is None or node["NodeID"] in only], request)
        seen = host.look(*request)
    known = _known(nodes)
    own_id = ray.get_runtime_context().get_node_id()
    hosts = [report_of(known[node_id], answer) for node_id, answer in answers.items()]
    return Survey(hosts, report_of(known[own_id], seen))


def report_of(known: Mapping[str, Any], answer: Mapping[str, Any] | str) -> HostReport:
    """Return the report of a host from what Ray knows of it, and its answer or why there is none.

    A host with another version of this package may leave fields out or have more.
    """
    if isinstance(answer, str):
        return HostReport(**known, fault=answer)
    return HostReport(**known, **{name: value for name, value in answer.items() if name in _FIELDS})


def settled(config: RunConfig, survey: Survey) -> RunConfig:
    """Return the settings with what the hosts decide: device, the cluster's address, where metrics are served.

    With cluster.shared_fs false also the host that has the run folder, which is the driver's. The address is needed by
    processes on hosts where RAY_ADDRESS is not set. On one host, metrics stay on loopback.
    """
    device = cluster.device_of(config, survey.hosts)
    address = str(ray.get_runtime_context().gcs_address)
    one_host = len({report.address for report in survey.hosts}) == 1
    run_host = None if one_host or config.cluster.shared_fs else survey.own.address
    metrics = "127.0.0.1" if one_host and config.metrics.host is None else config.metrics.host
    return config.model_copy(
        update={
            "resources": config.resources.model_copy(update={"device": device}),
            "cluster": config.cluster.model_copy(update={"address": address, "run_host": run_host}),
            "metrics": config.metrics.model_copy(update={"host": metrics}),
        }
    )


def _is_compared(config: RunConfig, key: str) -> bool:
    """Return whether a path must be the same on every host; folders that processes write to are tried instead."""
    of_redis = key.startswith("queue.redis.")
    return key not in ("runs", "cluster.local_dir") and (config.queue.backend == "redis" or not of_redis)


def _ask(node_ids: Sequence[str], request: tuple[Any, ...]) -> dict[str, dict[str, Any] | str]:
    """Return the answer of each node to ``doctor.host.look``, or in words why there is none."""
    tasks = {
        node_id: _LOOK.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False), name="doctor.look"
        ).remote(*request)
        for node_id in node_ids
    }
    done, late = ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=ANSWER_S)
    for task in late:
        ray.cancel(task, force=True)
    silent, answered = f"no answer within {ANSWER_S:g} s", set(done)
    return {node_id: _answer(task) if task in answered else silent for node_id, task in tasks.items()}


def _answer(task: Any) -> dict[str, Any] | str:
    try:
        answer: dict[str, Any] = ray.get(task)
    except Exception as error:  # noqa: BLE001  # of whatever kind: the host is named with it
        return _in_one_line(error)
    return answer


def _in_one_line(error: BaseException) -> str:
    """Return the last line of an error: where a task cannot be imported, Ray puts the reason below a traceback."""
    cause = unwrap_ray_error(error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else 'without a message'}"


def _known(nodes: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return name, address, id, GPUs, CPUs and size of the object store of each node by its id."""
    free, nodes_at = available_resources_per_node(), Counter(node["NodeManagerAddress"] for node in nodes)
    known = {}
    for node in nodes:
        address, node_id = node["NodeManagerAddress"], node["NodeID"]
        known[node_id] = {
            "name": address if nodes_at[address] == 1 else f"{address} ({node_id[:6]})",
            "address": address,
            "node_id": node_id,
            "gpus": int(node["Resources"].get("GPU", 0)),
            "free_gpus": int(free.get(node_id, {}).get("GPU", 0)),
            "cpus": int(node["Resources"].get("CPU", 0)),
            "store_bytes": int(node["Resources"].get("object_store_memory", 0)),
        }
    return known


@contextlib.contextmanager
def _token(runs: Path) -> Iterator[Path]:
    """Write a file into the folder of the runs, which holds its own name, and remove it and folders made for it."""
    made = [folder for folder in (runs, *runs.parents) if not folder.exists()]
    path = runs / f".probe-{secrets.token_hex(8)}"
    try:
        try:
            runs.mkdir(parents=True, exist_ok=True)
            path.write_text(path.name)
        except OSError as error:
            raise ConfigError(
                f"runs: cannot write to {runs} ({error.strerror}); set --runs to a folder that can be written to"
            ) from None
        yield path
    finally:
        for remove in (path.unlink, *(folder.rmdir for folder in made)):
            with contextlib.suppress(OSError):  # it was not made, or something else is in it by now
                remove()


# Made once: Ray keeps every remote function that is ever called. The worker process ends with its task, so that nothing
# of this stays on the host.
_LOOK = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(host.look)
