"""The ports on which processes listen, as ``ss`` lists them, and the table of docs/reference/ports.md beside them."""

from __future__ import annotations

import ipaddress
import re
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reference" / "ports.md"

# By what a process has in its command line, in this order: its name in the table.
_NAMES = (
    ("gcs_server", "gcs_server"),
    ("raylet/raylet", "raylet"),
    ("ray/dashboard/agent.py", "dashboard_agent"),
    ("ray::DashboardAgent", "dashboard_agent"),
    ("ray/_private/runtime_env/agent", "runtime_env_agent"),
    ("ray::RuntimeEnvAgent", "runtime_env_agent"),
    ("ray/_private/log_monitor.py", "log_monitor"),
    ("ray/dashboard/dashboard.py", "dashboard"),
    ("autoscaler", "autoscaler"),
    ("ray.util.client.server", "ray_client_server"),
    ("RolloutActor", "RolloutActor"),
    ("EnginePart", "EnginePart"),
    ("TrainerActor", "TrainerActor"),
    ("QueueProcess", "QueueProcess"),
    ("CourierProcess", "CourierProcess"),
    ("HostFiles", "HostFiles"),
    ("EngineCore", "EngineCore"),
    ("VLLM::Worker", "EngineCore"),
    ("engine.sglang.launcher", "sglang"),
    ("sglang::", "sglang"),
    ("ray::", "Ray's other workers"),
    ("default_worker.py", "Ray's other workers"),
    ("async_rl.cli train", "driver"),
    ("redis-server", "redis-server"),
)


class Listener(NamedTuple):
    """One port, or one Unix socket, on which a process waits for others."""

    process: str
    """Its name in the table, or its command line if it is not there."""
    protocol: str
    address: str
    port: int
    pid: int


class Row(NamedTuple):
    """One row of the table: a process, what it serves, and where it may listen."""

    process: str
    serves: str
    one_host: str
    several_hosts: str


def listeners(processes: Collection[psutil.Process], enter: Sequence[str] = ()) -> list[Listener]:
    """Return the TCP and UDP ports on which these processes wait. ``enter``: a command that enters their network."""
    named = {process.pid: name_of(process) for process in processes}
    listed = subprocess.run([*enter, "ss", "-H", "-tulnp"], capture_output=True, text=True, check=True).stdout
    found = []
    for line in listed.splitlines():
        protocol, _, _, _, local = line.split()[:5]
        address, _, port = local.rpartition(":")
        for pid in map(int, re.findall(r"pid=(\d+)", line)):
            if pid in named:
                found.append(Listener(named[pid], protocol, _plain(address), int(port), pid))
    return found


def unix_sockets(processes: Collection[psutil.Process], enter: Sequence[str] = ()) -> dict[str, bool]:
    """Return the paths of the Unix sockets at which these processes wait: whether another user may connect to each.

    ``enter``: a command that enters their network, by which the kernel tells such sockets apart, too.
    """
    pids = {process.pid for process in processes}
    listed = subprocess.run([*enter, "ss", "-H", "-xlp"], capture_output=True, text=True, check=True).stdout
    found = {}
    for line in listed.splitlines():
        owners = pids.intersection(map(int, re.findall(r"pid=(\d+)", line)))
        if not owners:
            continue
        path = line.split()[4]
        file = Path(f"/proc/{min(owners)}/root{path}")
        # Without a file there are no permissions.
        found[path] = path.startswith("@") or (file.is_socket() and bool(file.stat().st_mode & 0o002))
    return found


def scope(address: str, own: str) -> str:
    """Return who can reach a port at ``address``, in the table's words; ``own`` is the host's address."""
    if address in ("*", "0.0.0.0", "::"):
        return "all interfaces"
    if ipaddress.ip_address(address).is_loopback:
        return "loopback"
    return "host's address" if address == own else address


def table() -> list[Row]:
    """Return the rows of the document's table."""
    rows = []
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) >= 5 and cells[0] != "process":
            rows.append(Row(cells[0].strip("`"), cells[1], cells[2], cells[3]))
    return rows


def undocumented(found: Sequence[Listener], *, own: str, joined: bool, spanning: bool = False) -> Iterator[str]:
    """Yield each port that the table does not have, or has at another place. ``spanning``: of engines over hosts."""
    allowed: Mapping[str, set[str]] = {}
    for row in table():
        allowed = {**allowed, row.process: allowed.get(row.process, set()) | _places(row, joined=joined)}
    for port in found:
        where = scope(port.address, own)
        process = f"{port.process} over hosts" if spanning and port.process == "EngineCore" else port.process
        if where not in allowed.get(process, set()):
            yield f"{port.process} (pid {port.pid}): {port.protocol} {port.address}:{port.port} is on {where}"


def _places(row: Row, *, joined: bool) -> set[str]:
    cell = row.several_hosts if joined else row.one_host
    return {place.strip() for place in cell.split(",")} - {"none"}


def _plain(address: str) -> str:
    """Return an address without brackets and interface, and an IPv4 address that is written as IPv6 as itself."""
    address = address.strip("[]").partition("%")[0]
    return address.removeprefix("::ffff:") if "." in address else address


def name_of(process: psutil.Process) -> str:
    """Return a process's name in the table, or its command line if it is not there."""
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return "ended"
    return next((name for part, name in _NAMES if part in words), words)
