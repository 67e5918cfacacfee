"""Checks of machine, installation and inputs before a run starts; ``observe`` and the watchdog read running ones.

Small functions, each of which returns one or a few ``Check``s. ``async-rl doctor`` prints them; the driver calls
``require``, which raises the first FAIL. Imports neither torch nor Ray nor vLLM: versions come from package metadata,
devices from /dev.

A run that joins a cluster computes on the cluster's hosts: ``checks`` then looks at packages and inputs only, and
``cluster_checks`` judges what the hosts report.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from async_rl.config.schema import RunConfig
from async_rl.doctor import capacity, cluster, gpus, inputs, installation, machine, pass_through
from async_rl.doctor.check import Check, Status
from async_rl.doctor.host_report import HostReport
from async_rl.doctor.machine import uses_gpu

__all__ = [
    "Check",
    "HostReport",
    "Status",
    "checks",
    "cluster_checks",
    "failed",
    "report",
    "require",
    "require_cluster",
    "uses_gpu",
]

# Of the host that computes.
_COMPUTING = (
    machine.one_host,
    machine.devices,
    gpus.suitable,
    machine.compiler,
    machine.cores,
    machine.memory,
    machine.shared_memory,
)


def checks(config: RunConfig | None) -> list[Check]:
    """Check this machine, and with ``config`` whether its run can start here, or from here if it joins a cluster."""
    found = [installation.python(), *installation.packages(), *installation.torch_build()]
    if config is None:
        return [*found, *machine.present()]
    for check in (
        *(() if config.cluster.joined_address else _COMPUTING),
        machine.ports,
        inputs.folder,
        inputs.model,
        inputs.data,
        inputs.functions,
        pass_through.names,
        inputs.durable_queue,
        capacity.longest_responses,
        capacity.checkpoints,
    ):
        found.extend(check(config))
    return found


def failed(found: list[Check]) -> bool:
    """Return whether a check failed, so that a run could not start."""
    return any(check.status == "FAIL" for check in found)


def require(config: RunConfig) -> None:
    """Raise the first FAIL: a ConfigError for settings and inputs, a ResourceError for the machine."""
    _raise_first(checks(config))


def cluster_checks(config: RunConfig, hosts: Sequence[HostReport], own: HostReport) -> list[Check]:
    """Check the hosts of a cluster for a run whose device is known; ``own`` is what the driver's process sees."""
    return cluster.judge(config, machine.needs(config), hosts, own)


def require_cluster(config: RunConfig, hosts: Sequence[HostReport], own: HostReport) -> None:
    """Raise the first FAIL of the hosts, and of the inputs on the device that the hosts have decided."""
    _raise_first([*cluster_checks(config, hosts, own), *inputs.model(config)])


def _raise_first(found: Iterable[Check]) -> None:
    for check in found:
        if check.status == "FAIL":
            if check.cause is not None:
                raise check.cause
            raise check.error(f"{check.name}: {check.detail}" + (f"; {check.fix}" if check.fix else ""))


def report(found: list[Check], where: str = "machine") -> str:
    """Return one line per check, followed by one with the fix for each warn and FAIL, and a verdict at the end."""
    width = max(len(check.name) for check in found)
    lines = []
    for check in found:
        lines.append(f"{check.status:<5} {check.name:<{width}}  {check.detail}")
        if check.fix and check.status != "ok":
            lines.append(f"{'':<5} {'':<{width}}  -> {check.fix}")
    fails = sum(check.status == "FAIL" for check in found)
    if not fails:
        lines.append(f"a run can start on this {where}")
    else:
        lines.append(f"this {where} cannot run it: {fails} {'check' if fails == 1 else 'checks'} failed (see above)")
    return "\n".join(lines) + "\n"
