"""Runs a Prometheus for run folders: finds, configures and starts it on a free port, and ends it with its caller.

Knows the program ``prometheus`` and the target files of run folders; not what the metrics mean.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from signal import SIGTERM

import yaml

from async_rl.errors import ResourceError
from async_rl.runtime import runfolder
from async_rl.runtime.process import signal_on_parent_death

ASSETS = Path(__file__).parent / "assets"
"""The alerts, the dashboard, Grafana's provisioning and the compose file, which are part of the package."""

PORT = 9090
_PORTS_TRIED = 64
# Seconds. Grafana's own default; a worker answers in the process that distributes its tokens, so not more often.
SCRAPE_S = 15
# Seconds between two reads of the target files. A new run is first scraped within the sum of both periods.
_LOOK_S = 5
_READY_S = 30.0
_END_S = 10.0
# Samples of a finished run are as old as the run; by default Prometheus would delete what is older than 15 days.
_KEEP = "10y"


def program(name: str = "prometheus") -> str:
    """Return the path of a program. Raises ResourceError, which says how to install it."""
    found = shutil.which(name)
    if found is None:
        raise ResourceError(
            f"{name} is not installed: apt install prometheus (Debian, Ubuntu), brew install prometheus, or "
            f"docker compose -f {ASSETS / 'compose.yaml'} up"
        )
    return found


def free_port(first: int, tried: int = _PORTS_TRIED) -> int:
    """Return the first free port of the loopback interface from ``first`` on. Raises ResourceError."""
    for port in range(first, min(first + tried, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ResourceError(f"no port from {first} to {first + tried - 1} is free")


def settings(runs: Path | None, rules: Path | None, scrape_s: int = SCRAPE_S) -> str:
    """Return a prometheus.yml that scrapes every process of every run below ``runs``, with the alerts in ``rules``."""
    tree: dict[str, object] = {"global": {"scrape_interval": f"{scrape_s}s", "evaluation_interval": f"{scrape_s}s"}}
    if rules is not None:
        tree["rule_files"] = [str(rules.absolute())]
    if runs is not None:
        targets = runs.absolute() / runfolder.ALL_TARGETS / "*.json"
        sd = {"files": [str(targets)], "refresh_interval": f"{_LOOK_S}s"}
        tree["scrape_configs"] = [{"job_name": "async_rl", "file_sd_configs": [sd]}]
    return yaml.safe_dump(tree)


@contextlib.contextmanager
def running(
    data: Path,
    *,
    runs: Path | None = None,
    rules: Path | None = None,
    port: int = PORT,
    scrape_s: int = SCRAPE_S,
    options: Sequence[str] = (),
) -> Iterator[str]:
    """Run a Prometheus that keeps its samples in ``data`` for the length of the block; yields its URL.

    It listens on ``port`` or the next free one. Raises ResourceError where it is not installed or does not start.
    """
    path = program()
    data.mkdir(parents=True, exist_ok=True)
    config = data / "prometheus.yml"
    config.write_text(settings(runs, rules, scrape_s))
    url = f"http://127.0.0.1:{(bound := free_port(port))}"
    log = data / "prometheus.log"
    command = [
        path,
        f"--config.file={config}",
        f"--storage.tsdb.path={data}",
        f"--storage.tsdb.retention.time={_KEEP}",
        f"--web.listen-address=127.0.0.1:{bound}",
        *options,
    ]
    with program_running(command, log) as process:
        _wait_until_ready(process, url, log)
        yield url


@contextlib.contextmanager
def program_running(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the length of the block, or of this process; its output goes to ``log``.

    environment: variables in addition to those of this process.
    """
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            preexec_fn=partial(signal_on_parent_death, SIGTERM),
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise ResourceError(f"prometheus ended at once: {''.join(last)[:300]} (log: {log})")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/-/ready", timeout=1):
            return
        time.sleep(0.1)
    raise ResourceError(f"prometheus is not ready after {_READY_S:g} s (log: {log})")
