"""``async-rl observe`` and ``replay-metrics`` as a user starts them, with a real Prometheus, and ended by Ctrl-C."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psutil
import pytest
import yaml

from async_rl.config.loading import validate
from async_rl.metrics import publish
from async_rl.metrics.exporter import Metrics
from async_rl.metrics.publish import step_row
from async_rl.observe.prometheus import SCRAPE_S
from async_rl.runtime.runfolder import RunFolder
from tests.support.prometheus_api import ask
from tests.support.step_records import step_record

PORT = 19490
GRAFANA = """#!/usr/bin/env bash
env | grep ^GF_ > "$GF_PATHS_DATA/environment"
echo "$@" > "$GF_PATHS_DATA/arguments"
exec sleep 60
"""


def until(condition):
    deadline = time.monotonic() + 4 * SCRAPE_S
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


@pytest.fixture
def started(tmp_path):
    """Starts the command line; what it said so far, by the path that is returned. Ctrl-C must leave nothing."""
    processes = []

    def start(*arguments, path=os.environ["PATH"]):
        output = tmp_path / "output.txt"
        process = subprocess.Popen(
            [sys.executable, "-m", "async_rl.cli", *map(str, arguments)],
            stdout=output.open("w"),
            stderr=subprocess.STDOUT,
            env=os.environ | {"PATH": path},
        )
        processes.append(process)
        url = until(lambda: re.search(r"Prometheus: (http://\S+)", output.read_text()) or process.poll() is not None)
        assert process.poll() is None, output.read_text()
        return url.group(1), output

    yield start
    for process in processes:
        below = psutil.Process(process.pid).children(recursive=True)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):  # whoever is impatient
            process.send_signal(number)
        assert process.wait(30) == 0
        assert not any(child.is_running() for child in below)


def write_run(runs, steps=3):
    tree = {"name": "demo", "runs": str(runs), "model": {"path": "m"}, "data": {"train": "t"}}
    with RunFolder(validate(tree)) as folder:
        for step in range(1, steps + 1):
            folder.write_step(step_row(step_record(step=step, time=time.time() - steps + step, reward_mean=step / 10)))
    return folder.path


@pytest.mark.slow
def test_runs_that_begin_later_are_watched_on_the_next_free_port(started, tmp_path):
    runs = tmp_path / "runs"
    with socket.create_server(("127.0.0.1", PORT)):
        url, output = started("observe", runs, "--port", PORT)
    assert url != f"http://127.0.0.1:{PORT}"
    assert f"port {PORT} is in use" in output.read_text()
    with Metrics("pipeline", run="later") as metrics:
        publish.publish_step(metrics, step_record(reward_mean=0.5))
        metrics.serve(run_dir=runs / "later")
        (found,) = until(lambda: ask(url, "query", query="async_rl_reward_mean")["result"])
        link = until(lambda: re.search(r"without Grafana: (\S+)", output.read_text()))[1]
        assert urllib.request.urlopen(link).status == 200
        curves = {key: values for key, values in parse_qs(urlsplit(link).query).items() if key.endswith(".expr")}
        shown = {key: ask(url, "query", query=expression)["result"] for key, (expression,) in curves.items()}
    assert found["metric"]["run"] == "later"
    assert len(shown) == 3
    assert all(shown.values()), shown
    names = {rule["name"] for group in ask(url, "rules")["groups"] for rule in group["rules"]}
    assert "OnPolicyMismatch" in names


def test_a_finished_run_is_looked_at_and_its_folder_left_as_it_is(started, tmp_path):
    path = write_run(tmp_path / "runs")
    before = sorted(path.rglob("*"))
    url, _ = started("replay-metrics", path, "--port", PORT + 100)
    (found,) = ask(url, "query", query='async_rl_reward_mean{run="demo"}')["result"]
    assert float(found["value"][1]) == 0.3
    assert sorted(path.rglob("*")) == before


def test_grafana_finds_datasource_and_dashboards_in_place(started, tmp_path):
    """With a stand-in for the program, of which there is no package here: what it is started with."""
    program = tmp_path / "bin" / "grafana"
    program.parent.mkdir()
    program.write_text(GRAFANA)
    program.chmod(0o755)
    runs = tmp_path / "runs"
    url, output = started(
        "observe", runs, "--port", PORT + 200, path=f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    )
    until(lambda: "Grafana:    http://127.0.0.1:" in output.read_text())
    home = runs / ".observe" / "grafana"
    until((home / "data" / "arguments").exists)
    assert (home / "data" / "arguments").read_text().split()[0] == "server"
    environment = dict(line.split("=", 1) for line in (home / "data" / "environment").read_text().splitlines())
    provisioning = Path(environment["GF_PATHS_PROVISIONING"])
    (source,) = yaml.safe_load((provisioning / "datasources" / "async_rl.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "async_rl.yaml").read_text())["providers"]
    assert (source["type"], source["url"], source["jsonData"]["timeInterval"]) == ("prometheus", url, "15s")
    assert (Path(provider["options"]["path"]) / "async_rl.json").exists()
    assert environment["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"


def test_without_prometheus_it_says_how_to_get_it(tmp_path):
    command = [sys.executable, "-m", "async_rl.cli", "observe", str(tmp_path)]
    ran = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "prometheus is not installed: apt install prometheus" in ran.stderr
    assert list(tmp_path.iterdir()) == []


# Forks, which take no time to start. Signals meet each at about the time when it begins to wait: one alone, or two.
INTERRUPTED = """
import mmap, os, random, signal, time
from async_rl.observe import serve

def spin(us):
    until_s = time.perf_counter() + us * 1e-6
    while time.perf_counter() < until_s:
        pass

def tells(number, handler, real=signal.signal):
    real(number, handler)
    if number == signal.SIGTERM:  # the last to be caught
        caught[0] = 1
        spin(random.random() * 30)

signal.signal = tells
for number in range(600):
    caught = mmap.mmap(-1, 1)
    pid = os.fork()
    if pid == 0:
        random.seed(number)
        serve._until_interrupted()
        os._exit(0)
    while not caught[0]:
        pass
    if number % 2:
        os.kill(pid, signal.SIGINT)
        spin(random.random() * 480)
    os.kill(pid, signal.SIGTERM)
    limit_s = time.monotonic() + 60
    while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < limit_s:
        time.sleep(0.0005)
    if ended != (pid, 0):
        os.kill(pid, signal.SIGKILL)
        raise SystemExit(f"{number}: {ended}")
"""


@pytest.mark.slow
def test_signals_end_it_whenever_they_come():
    """With a lock in the handler, a seventh missed two signals; with a handler alone, one in a hundred missed one."""
    subprocess.run([sys.executable, "-c", INTERRUPTED], check=True)
