"""What one host of a cluster has, what a run needs of its hosts, and both side by side in a table. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from async_rl.config.schema import RunConfig
from async_rl.doctor.placement import Load, counted, filled, processes

GB = 10**9


@dataclass(frozen=True, slots=True)
class HostReport:
    """What one host has. Where ``fault`` is set, only what Ray knows of it."""

    name: str
    """Its address, and the beginning of its node's id if the cluster has several nodes there."""
    address: str
    node_id: str = ""
    """Ray's id of it, in hexadecimal digits."""
    gpus: int = 0
    """GPUs that Ray distributes."""
    free_gpus: int = 0
    """Those of them that no process has now."""
    cpus: int = 0
    """CPUs that Ray distributes; ``cores`` are those of the host."""
    store_bytes: int = 0
    """Size of Ray's object store."""
    fault: str = ""
    """Why there is no report."""
    python: str = ""
    code: str = ""
    """Version and digest of this package's source."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions by name."""
    cores: int = 0
    memory_bytes: int = 0
    """Available memory."""
    shm_bytes: int = 0
    """Free bytes in /dev/shm."""
    compiler: bool = False
    """Whether there is a C++ compiler."""
    interfaces: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """IP addresses by network interface."""
    paths: Mapping[str, Mapping[str, str] | None] = field(default_factory=dict)
    """By setting, a digest of each file; None if there is no such path."""
    modules: Mapping[str, str | None] = field(default_factory=dict)
    """Digests of the user's modules; None for one that is not found."""
    shares_runs: bool = False
    """Whether it sees what the driver writes into the folder of the runs."""
    writes_runs: bool = False
    spool_fault: str = ""
    """Why what its processes write cannot be kept at cluster.local_dir until it has reached the run folder."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run needs of its hosts."""

    device: Literal["cpu", "cuda"]
    memory_bytes: int = 0
    """Memory of all processes on CPU."""
    shm_bytes: int = 0
    """Bytes in /dev/shm of a host that has engines."""
    compiles: bool = False
    """Whether engines need a C++ compiler."""

    @property
    def unit(self) -> str:
        """What a process takes of a host: GPUs, or on CPU one of Ray's CPUs for each thread."""
        return "GPUs" if self.device == "cuda" else "CPUs"


def used_hosts(needs: Needs, hosts: Sequence[HostReport], own: HostReport) -> list[HostReport]:
    """Return the hosts on which processes of the run may be."""
    room = room_of(needs, hosts)
    return [host for host in hosts if room[host.name] or host.node_id == own.node_id]


def room_of(needs: Needs, hosts: Sequence[HostReport]) -> dict[str, int]:
    """Return what each host has of what processes take: Ray's GPUs, or its CPUs."""
    return {host.name: host.gpus if needs.device == "cuda" else host.cpus for host in hosts}


def table(config: RunConfig, needs: Needs, hosts: Sequence[HostReport], own: HostReport) -> str:
    """Return a table with a line per host: what it has, and which processes of the run come there."""
    used = {host.name for host in used_hosts(needs, hosts, own) if not host.fault}
    room = room_of(needs, [host for host in hosts if host.name in used])
    loads, (engine, rank) = filled(config, room), processes(config)
    rows: list[tuple[str, ...]] = [("host", "GPUs", "cores", "memory", "/dev/shm", "Python", "async_rl", "room for")]
    for host in hosts:
        if host.fault:
            rows.append((host.name, str(host.gpus), *[""] * 5, host.fault))
            continue
        load = loads.get(host.name, Load(0, 0))
        there = ", ".join(counted(n, what) for n, what in ((load.engines, engine.what), (load.ranks, rank.what)) if n)
        rows.append(
            (
                host.name,
                str(host.gpus),
                str(host.cores),
                f"{host.memory_bytes / GB:.1f} GB",
                f"{host.shm_bytes / GB:.1f} GB",
                host.python,
                host.code,
                (there or "-") if host.name in used else "not used",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    cells = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(f"{line.rstrip()}\n" for line in cells)
