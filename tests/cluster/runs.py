"""Runs whose driver is on a host of ``hosts``: alone on that host, or over all hosts through their Ray cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.hosts import Host, Hosts
from tests.support.invariants import conserved
from tests.support.real_run import CLEAN_WITHIN_S, Run

# What a run over hosts has, by what is in the command lines; Ray's own daemons stay when it joined a cluster.
PROCESSES = (
    "RolloutActor",
    "TrainerActor",
    "QueueProcess",
    "CourierProcess",
    "HostFiles",
    "EngineCore",
    "VLLM::",
    "async_rl.cli",
)


class HostRun(Run):
    """One start of a run whose driver is on ``hosts[driver]``.

    With ``join`` it runs over the cluster of all hosts, else on the driver's host alone. ``env`` is the driver's alone.
    """

    def __init__(
        self,
        hosts: Hosts,
        recipe: Path,
        folder: Path,
        *,
        driver: int = 0,
        join: bool = True,
        env: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.hosts, self._driver_host, self._env = hosts, hosts[driver], env
        if join:
            settings = {"cluster__address": hosts.address} | settings
        super().__init__(recipe, folder, **settings)

    def _start(self, command: list[str]) -> subprocess.Popen:
        return self._driver_host.popen(command, self._env, stdout=self._output, stderr=subprocess.STDOUT)

    def terminate(self, signum: int = signal.SIGTERM) -> None:
        """Send a signal to the supervisor; it would not pass from the process that entered the host."""
        os.kill(self.supervisor, signum)

    @property
    def supervisor(self) -> int:
        (found,) = psutil.Process(self.process.pid).children()
        return int(found.pid)

    @property
    def driver(self) -> int:
        (found,) = psutil.Process(self.supervisor).children()
        return int(found.pid)

    def on(self, host: Host, name: str) -> list[psutil.Process]:
        """Return the run's processes of this name on a host, forks left out."""
        found = host.processes(name)
        pids = {process.pid for process in found}
        return [process for process in found if process.ppid() not in pids]

    def hosts_of(self, name: str) -> list[Host]:
        """Return the host of each process of this name."""
        return [host for host in self.hosts for _ in self.on(host, name)]

    def one(self, name: str) -> psutil.Process:
        found = [process for host in self.hosts for process in self.on(host, name)]
        assert found, f"no process {name!r} on any host"
        return max(found, key=lambda process: process.create_time())

    def wait_until(self, condition: Any, what: str, within_s: float = 300.0) -> None:
        """Wait until ``condition()`` is true, while the run lives."""
        deadline = time.monotonic() + within_s
        while not condition():
            assert self.process.poll() is None, f"the run ended while waiting for {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}\n{self.output[-5000:]}"
            time.sleep(0.1)

    def wait_for_more(self, steps: int, within_s: float = 300.0) -> None:
        """Wait until so many more steps are trained, those included that are undone later."""
        goal = self.steps_trained + steps
        self.wait_until(lambda: self.steps_trained >= goal, f"{steps} more steps", within_s)

    @property
    def steps_trained(self) -> int:
        names = ("trained.jsonl", "rewound-trained.jsonl")
        paths = [self.folder / name for name in names]
        return sum(path.read_bytes().count(b"\n") for path in paths if path.exists())

    def assert_nothing_left(self) -> None:
        """Check that no process of the run, and no file in shared memory, is left on any host that is on."""
        deadline = time.monotonic() + CLEAN_WITHIN_S
        while left := [process for host in self.hosts for name in PROCESSES for process in host.processes(name)]:
            assert time.monotonic() < deadline, f"still alive: {[(p.pid, p.cmdline()) for p in left]}"
            time.sleep(0.2)
        # Python removes the semaphores of a process that was killed from another one, a moment later.
        while semaphores := [found for host in self.hosts if host.on for found in _semaphores(host)]:
            assert time.monotonic() < deadline, f"left in /dev/shm: {semaphores}"
            time.sleep(0.2)

    def close(self) -> None:
        """End the run as a user would, for the sake of hosts that other runs use next."""
        if self.process.poll() is None:
            with contextlib.suppress(ValueError, ProcessLookupError, psutil.Error, subprocess.TimeoutExpired):
                self.terminate()
                self.process.wait(CLEAN_WITHIN_S)
            self.process.kill()
        self._watcher.join()
        self._output.close()

    def _watch(self) -> None:
        """Do nothing: the hosts know their processes."""


def _semaphores(host: Host) -> list[str]:
    there = os.listdir(f"/proc/{host.first_process}/root/dev/shm")
    return [f"{host.name}: {name}" for name in there if name.startswith("sem.")]


def summary_is_whole(run: Run) -> dict:
    """Check conservation (invariant 5) and that each push was verified (invariant 10); return the summary."""
    summary = run.summary
    groups = summary["groups"]
    assert conserved(groups)
    assert summary["exit_reason"] == "finished", summary["exit_reason"]
    assert summary["sync"]["count"] == summary["steps"]
    assert summary["sync"]["canary_max"] <= 1e-4
    return summary
