"""Hosts on this machine, for tests: what differs between hosts differs between them, the rest is shared.

Each host is a set of namespaces of the kernel: network, processes, mounts, host name, inter-process communication. It
has an address of its own behind a switch, its own /dev/shm, a folder of its own at ``INSIDE`` for Ray's temporary files
and as a working directory, and its own name in /etc/hosts. All other files are shared, at the same paths, as on a
cluster with a shared file system. Addresses are the same in each set of hosts, because no set can reach another.

No namespace has a name. They end with the first process of their host, which the kernel ends when the process that made
the hosts dies, whatever it dies of. So nothing is left after a test, and nothing has to be looked for before one.

    with Hosts(2, tmp_path) as hosts:
        hosts.start_ray()
        hosts[1].link.limit(mbit=1000)
        hosts[0].run([sys.executable, "driver.py"])
        hosts[1].kill()
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import psutil

from tests.support.processes import words

ROOT = Path(__file__).resolve().parents[2]
INSIDE = Path("/media")
"""Where each host sees its own folder. Every Linux has this one, and it is short: Ray makes sockets below it, whose
paths have at most 107 characters."""
NETWORK = "10.201.0"
RAY_PORT = 6379
STARTED_WITHIN_S = 120.0

_NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid", "--mount-proc")
# Who is not root becomes root of a namespace of users, which the switch has and the hosts enter.
_IS_ROOT = os.geteuid() == 0
_NEW_USERS = () if _IS_ROOT else ("--user", "--map-root-user")
_ENTER_USERS = () if _IS_ROOT else ("-U", "--preserve-credentials")
_PROGRAMS = ("ip", "tc", "bridge", "unshare", "nsenter", "setpriv", "mount", "hostname")
# How this process has to do with a cluster does not matter to the hosts.
_NOT_INHERITED = ("-u", "RAY_ADDRESS", "-u", "RAY_AUTH_TOKEN")
# The first process of a host: it sets the host up, says so, and then adopts processes whose parents ended.
_FIRST_PROCESS = """
set -e
hostname "$1"
mount -t tmpfs -o "size=$2" shm /dev/shm
mount --bind "$3" {inside}
mount --bind "$4" /etc/hosts
mount --bind "$5" /etc/resolv.conf
ip link set lo up
echo ready
while :; do sleep 3600 & wait $!; done
"""


class HostsError(Exception):
    """A host, or a process that it was asked to run, did not do what it must."""


@functools.cache
def why_unavailable() -> str | None:
    """Return why this machine cannot make hosts; None if it can."""
    if missing := [program for program in _PROGRAMS if shutil.which(program) is None]:
        return f"hosts need the programs {', '.join(missing)} (packages iproute2 and util-linux)"
    tried = subprocess.run(
        [
            "unshare",
            *_NEW_USERS,
            *_NAMESPACES,
            "--fork",
            "ip",
            "link",
            "add",
            "name",
            "one",
            "type",
            "veth",
            "peer",
            "name",
            "two",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        return f"hosts need a kernel that grants namespaces and veth links, or root: {tried.stderr.strip()}"
    return None


class Link:
    """The cable between a host and the switch. Each end is an interface, and limits what leaves through it."""

    def __init__(self, port: str, switch: int, host: int) -> None:
        self._port, self._switch, self._host = port, switch, host

    def limit(self, mbit: float, *, delay_ms: float = 0.0) -> None:
        """Limit the rate in each direction, and delay every packet by ``delay_ms`` where the kernel has netem."""
        burst = max(64_000, int(mbit * 1e6 / 8 / 100))  # what passes within 10 ms, and at least one large packet
        for pid, device in ((self._switch, self._port), (self._host, "eth0")):
            tc = ("tc", "qdisc", "replace", "dev", device)
            limits = ("rate", f"{mbit}mbit", "burst", str(burst), "latency", "100ms")
            _inside(pid, *tc, "root", "handle", "1:", "tbf", *limits)
            if delay_ms:
                _inside(
                    pid, *tc, "parent", "1:1", "handle", "10:", "netem", "delay", f"{delay_ms}ms", "limit", "100000"
                )

    def unlimit(self) -> None:
        """Take every limit away."""
        for pid, device in ((self._switch, self._port), (self._host, "eth0")):
            _inside(pid, "tc", "qdisc", "del", "dev", device, "root")

    def cut(self) -> None:
        """Let the switch drop every packet from and to the host. No process is notified, as in a network partition."""
        _inside(self._switch, "bridge", "link", "set", "dev", self._port, "state", "disabled")

    def heal(self) -> None:
        """Undo ``cut``."""
        _inside(self._switch, "bridge", "link", "set", "dev", self._port, "state", "forwarding")

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes that the host has sent and received through the link so far, with all headers."""
        (shown,) = json.loads(_inside(self._switch, "ip", "-j", "-s", "link", "show", "dev", self._port))
        return int(shown["stats64"]["rx"]["bytes"]), int(shown["stats64"]["tx"]["bytes"])


class Host:
    """One host; see the module. It is off until ``boot``."""

    def __init__(self, number: int, folder: Path, switch: int, *, cpus: int, gpus: int, store_bytes: int) -> None:
        self._number = number
        self.name, self.address = f"host-{number}", f"{NETWORK}.{number}"
        self.folder = folder / self.name
        """What the host sees at INSIDE; it outlives the host."""
        self.cpus, self.gpus = cpus, gpus
        self._store_bytes = store_bytes
        self._shared = folder
        self._switch = switch
        self._port = f"port{number}"
        self._holder: subprocess.Popen[str] | None = None
        self.first_process = 0
        """Its pid as seen from outside."""
        self.link = Link(self._port, switch, 0)

    def boot(self) -> None:
        """Make the host's namespaces, and connect it to the switch."""
        for name in ("tmp", "work"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        files = [str(self._shared / name) for name in ("etc-hosts", "etc-resolv.conf")]
        size = str(self._store_bytes + 2**29)  # Ray's store, semaphores, what else uses shared memory
        script = _FIRST_PROCESS.format(inside=INSIDE)
        first = ["bash", "-c", script, self.name, self.name, size, str(self.folder), *files]
        self._holder, self.first_process = _hold([*_NAMESPACES, *first], users_of=self._switch)
        pid, port = str(self.first_process), self._port
        _inside(self._switch, "ip", "link", "add", "name", port, "type", "veth", "peer", "name", "eth0", "netns", pid)
        # Always the same, as a card in a host has: the others keep it for a minute.
        _inside(self.first_process, "ip", "link", "set", "eth0", "address", f"02:00:00:00:00:{self._number:02x}")
        _inside(self.first_process, "ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        _inside(self.first_process, "ip", "link", "set", "eth0", "up")
        # Libraries ask for the route to a public address in order to learn the host's own.
        _inside(self.first_process, "ip", "route", "add", "default", "via", f"{NETWORK}.254")
        _inside(self._switch, "ip", "link", "set", port, "master", "switch", "up")
        self.link = Link(port, self._switch, self.first_process)

    @property
    def on(self) -> bool:
        """Whether the host runs."""
        return self._holder is not None and self._holder.poll() is None

    def kill(self, *, silently: bool = True) -> None:
        """End every process of the host by SIGKILL, and its network, /dev/shm and mounts with them.

        silently: cut the link first, as when power fails, so that no connection is closed; else the kernel closes them.
        """
        if self._holder is None:
            return
        if silently and self.on:
            self.link.cut()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.first_process, 9)
        self._holder.wait(STARTED_WITHIN_S)
        self._holder = None
        with contextlib.suppress(HostsError):  # the kernel removes it, at some moment
            _inside(self._switch, "ip", "link", "del", self._port)

    def command(self, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> list[str]:
        """Return the command that runs ``arguments`` on the host, in its working directory."""
        variables = [f"{name}={value}" for name, value in self._environment(env or {}).items()]
        enter = ["nsenter", "-t", str(self.first_process), *_ENTER_USERS, "-m", "-u", "-i", "-n", "-p", "--"]
        return [*enter, "env", "-C", str(INSIDE / "work"), *_NOT_INHERITED, *variables, *arguments]

    def network_command(self, *command: str) -> list[str]:
        """Return the command that runs ``command`` with the host's network and all else of this machine."""
        return _network_command(self.first_process, *command)

    def popen(self, arguments: Sequence[str], env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen:
        """Start a process on the host."""
        return subprocess.Popen(self.command(arguments, env), stdin=subprocess.DEVNULL, **options)

    def run(self, arguments: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 600.0) -> str:
        """Run a process on the host to its end and return what it printed. Raises HostsError when it fails."""
        done = subprocess.run(
            self.command(arguments, env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            raise HostsError(
                f"{self.name}: {' '.join(arguments)}: exit code {done.returncode}\n{done.stderr}{done.stdout}"
            )
        return done.stdout

    def python(self, code: str, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """Run Python code on the host and return what it printed."""
        return self.run([sys.executable, "-c", code, *arguments], env)

    def start_ray(self, head: Host | None = None, env: Mapping[str, str] | None = None) -> None:
        """Start Ray, with ``env`` in its processes: as the head of a cluster, or joining that of ``head``."""
        where = ["--head", "--port", str(RAY_PORT), "--include-dashboard", "false"]
        if head is not None:
            where = ["--address", f"{head.address}:{RAY_PORT}"]
        has = ["--num-cpus", self.cpus, "--num-gpus", self.gpus, "--object-store-memory", self._store_bytes]
        options = ["--disable-usage-stats", "--node-ip-address", self.address, "--temp-dir", INSIDE / "ray", *has]
        ray = Path(sys.executable).parent / "ray"
        self.run([str(word) for word in (ray, "start", *where, *options)], env, timeout_s=STARTED_WITHIN_S)

    def processes(self, name: str = "") -> list[psutil.Process]:
        """Return the processes on the host that have ``name`` in their command line, with their pids outside."""
        if not self.on:
            return []
        mine = _namespace(self.first_process)
        here = (found for found in psutil.process_iter() if _namespace(found.pid) == mine)
        return [found for found in here if name in " ".join(words(found))]

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self._shared / "token")}
        # Ray gives up a node that is not there after 30 s, which several on a few cores may need.
        patience = {"RAY_raylet_start_wait_time_s": f"{STARTED_WITHIN_S:.0f}"}
        return {"TMPDIR": str(INSIDE / "tmp"), "PYTHONPATH": path, **token, **patience, **more}


class Hosts(Sequence[Host]):
    """Some hosts behind one switch, as a context manager; the first one is the head of Ray's cluster."""

    def __init__(
        self,
        count: int,
        folder: Path,
        *,
        cpus: int | Sequence[int] = 2,
        gpus: int | Sequence[int] = 0,
        store_bytes: int = 300 * 2**20,
        boot: bool = True,
    ) -> None:
        """Make ``count`` hosts with folders in ``folder``. cpus, gpus: what Ray counts, on every host or on each."""
        if reason := why_unavailable():
            raise HostsError(reason)
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._switch, switch = _hold(["--net", "bash", "-c", "echo ready; exec sleep infinity"])
        cpus, gpus = ([each] * count if isinstance(each, int) else list(each) for each in (cpus, gpus))
        self._hosts = [
            Host(number, folder, switch, cpus=cpus[number - 1], gpus=gpus[number - 1], store_bytes=store_bytes)
            for number in range(1, count + 1)
        ]
        try:
            _inside(switch, "ip", "link", "add", "switch", "type", "bridge")
            _inside(switch, "ip", "link", "set", "switch", "up")
            lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in self._hosts)]
            (folder / "etc-hosts").write_text("\n".join(lines) + "\n")
            (folder / "etc-resolv.conf").write_text("")  # names of other networks are refused at once
            (folder / "token").touch(0o600)
            (folder / "token").write_text(secrets.token_hex(32))
            for host in self._hosts if boot else ():
                host.boot()
        except BaseException:
            self.close()
            raise

    def __getitem__(self, index: Any) -> Any:
        return self._hosts[index]

    def __len__(self) -> int:
        return len(self._hosts)

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    @property
    def address(self) -> str:
        """The address of Ray's cluster."""
        return f"{self._hosts[0].address}:{RAY_PORT}"

    def start_ray(self, env: Mapping[str, str] | None = None) -> None:
        """Start Ray's head on the first host, then let the others that are on join at the same time."""
        head, *others = (host for host in self._hosts if host.on)
        head.start_ray(env=env)
        with ThreadPoolExecutor(max(1, len(others))) as pool:
            list(pool.map(lambda host: host.start_ray(head, env), others))

    def close(self) -> None:
        """End every process on every host, and all that was made for the hosts except for their folders."""
        for host in self._hosts:
            host.kill(silently=False)
        self._switch.kill()
        self._switch.wait(STARTED_WITHIN_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _hold(arguments: Sequence[str], users_of: int | None = None) -> tuple[subprocess.Popen[str], int]:
    """Start the first process in new namespaces; return the process that holds it, and its pid.

    The kernel kills the holder when the thread that runs this ends, and the first process with the holder. It forgets
    that when a process becomes root, so that comes first: by entering the namespace of ``users_of``, or in a new one.
    """
    become_root: Sequence[str] = ()
    if users_of is None and _NEW_USERS:
        become_root = ["unshare", *_NEW_USERS]
    elif users_of is not None and _ENTER_USERS:
        become_root = ["nsenter", "-t", str(users_of), *_ENTER_USERS]
    holder = subprocess.Popen(
        [*become_root, "setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child=SIGKILL", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stderr is not None
    if holder.stdout.readline() != "ready\n":
        holder.kill()
        raise HostsError(f"a host did not start: {holder.stderr.read().strip()}")
    (child,) = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
    return holder, int(child)


def _inside(pid: int, *command: str) -> str:
    """Run a command of this machine in the network of the process ``pid``."""
    return _run(*_network_command(pid, *command))


def _network_command(pid: int, *command: str) -> list[str]:
    return ["nsenter", "-t", str(pid), *_ENTER_USERS, "-n", "--", *command]


def _run(*command: str) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostsError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _namespace(pid: int) -> str | None:
    """Return the process namespace of a process; None if the process has ended."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def wait_until(condition: Any, within_s: float, what: str) -> None:
    """Wait until ``condition()`` is true. Raises HostsError after ``within_s``."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise HostsError(f"not within {within_s:g} s: {what}")
        time.sleep(0.05)
