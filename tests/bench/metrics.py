"""What being watched costs: two equal runs side by side, one with everything on and one with everything off, of which
one is stopped (SIGSTOP) while the other goes on, in turns of a few seconds.

On: vLLM's own metrics, the timeline, and a Prometheus that scrapes every process and evaluates the alerts. Off: none of
them. Nothing is learned and no response ends before its limit, so that all steps cost the same. A step is timed on its
run's own clock, which stands while the run is stopped. A machine that others use too is faster in one minute than in
the next, by more than what is to be measured; turns of seconds give both runs the same share of it.
The parts are timed by themselves too: what the driver does for a step, and what a scrape takes the processes of a run.
Printed last, one JSON line:

    step_ratio_on_over_off     seconds per step, on over off
    step_ratio_90              where 90 of 100 such calls would find it, by resampling minutes
    cpu_ratio_on_over_off      the same of the processor's seconds, into which no waiting enters;  cpu_ratio_90
    cpu_us_per_token           the processor's microseconds per trained token of each process, on and off
    steps, tokens_per_step     of both runs, on and off
    publish_share              seconds to publish one step and to write out one scrape, over a step
    scrape_share               seconds in which all processes serve one scrape, over the time between two

    .venv/bin/python tests/bench/metrics.py [--minutes 20] [--turn 2] [--config configs/tiny_moe.yaml] [--control]

--control: both runs with everything off; how far from 1 the ratios come then is what this method cannot tell.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Not this folder: here, "import queue" of any library would find the bench of that name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import collections
import contextlib
import json
import shutil
import signal
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator

import numpy as np
import psutil
from bench.runs import ROOT, start
from prometheus_client import generate_latest
from step_records import step_record

from async_rl import config_file, inputs
from async_rl.metrics import publish
from async_rl.metrics.exporter import Metrics
from async_rl.observe import prometheus

SETTINGS = {
    "trainer.steps": 10_000_000,
    "trainer.optimizer.lr": 1e-9,
    "rollout.max_response_tokens": 40,  # as many as a response of the demo has on average
    "eval.n": 1,
    "eval.every": 0,
}
OFF = {"metrics.engine": "false", "metrics.timeline_bytes": 0, "metrics.samples_per_step": 0}
RULES = ROOT / "dashboards" / "prometheus" / "rules.yml"
WARM_UP_STEPS = 10
SCRAPES = 20
RESAMPLES = 2000


class SideRun:
    """A run of the pipeline that can be stopped and let go on, with every process below it and those in ``beside``."""

    def __init__(self, config: Path, runs: Path, settings: dict[str, object]) -> None:
        self.runs = runs
        self.beside: list[psutil.Process] = []
        # On its own clock, in seconds: when each step ended, and when each turn, with what each process had taken.
        self.steps: list[float] = []
        self.turns: list[tuple[float, collections.Counter[str]]] = []
        self.tokens = 0
        self._rows = runs / "run" / "metrics.jsonl"
        self._read = 0
        self._process = start(config, runs, "run", SETTINGS | settings)
        self._stopped: list[psutil.Process] = []
        self._pauses: list[tuple[float, float]] = []
        self._stopped_at = 0.0

    def read_steps(self) -> None:
        """Those that were written since the last call."""
        if self._process.poll() is not None:
            sys.exit(f"the run in {self.runs} ended early")
        if not self._rows.exists():
            return
        with self._rows.open("rb") as file:
            file.seek(self._read)
            whole, _, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + 1 if whole else 0
        for line in whole.splitlines():
            row = json.loads(line)
            self.steps.append(self._own_time(row["time"]))
            self.tokens += row["trained_tokens"]

    def turn(self, seconds: float) -> None:
        """Let it go on for so long."""
        self.go_on()
        time.sleep(seconds)
        self.stop()
        self.turns.append((self._own_time(self._stopped_at), _cpu_seconds(self._stopped)))
        self.read_steps()

    def stop(self) -> None:
        self._stopped = self._processes()
        _signal(self._stopped, signal.SIGSTOP)
        self._stopped_at = time.time()

    def go_on(self) -> None:
        if self._stopped:
            self._pauses.append((self._stopped_at, time.time()))
        _signal(self._stopped, signal.SIGCONT)
        self._stopped = []

    def _own_time(self, moment: float) -> float:
        return moment - sum(min(end, moment) - begin for begin, end in self._pauses if begin < moment)

    def stretches(self, turns: int) -> np.ndarray:
        """float[n, 3]: seconds, seconds of the processor and steps of each stretch of so many turns, from the end of
        one step to the end of another."""
        steps, ends = np.asarray(self.steps), np.asarray([end for end, _ in self.turns])
        cpu = [used.total() for _, used in self.turns]
        first = np.searchsorted(steps, ends[0::turns])
        first = first[first < len(steps)]
        bounds = np.stack([steps[first], np.interp(steps[first], ends, cpu), first], axis=1)
        return np.diff(bounds, axis=0)

    def cpu_us_per_token(self) -> dict[str, float]:
        """Of each process from the end of the first turn to that of the last."""
        (began, before), (ended, after) = self.turns[0], self.turns[-1]
        first, last = np.interp([began, ended], self.steps, range(len(self.steps)))
        tokens = (last - first) * self.tokens / len(self.steps)
        used = after - before
        return {name: round(seconds / tokens * 1e6, 2) for name, seconds in used.most_common()}

    def scrape_seconds(self) -> float:
        """In which its processes, one after the other, serve a scrape each; waiting for their turn is among it."""
        files = (self.runs / ".prometheus").glob("*.json")
        targets = [json.loads(path.read_text())[0]["targets"][0] for path in files]
        took = []
        for _ in range(SCRAPES):
            time.sleep(0.5)
            began = time.perf_counter()
            for target in targets:
                urllib.request.urlopen(f"http://{target}/metrics").read()
            took.append(time.perf_counter() - began)
        return statistics.median(took)

    def close(self) -> None:
        self.go_on()
        self._process.terminate()
        self._process.wait()

    def _processes(self) -> list[psutil.Process]:
        top = psutil.Process(self._process.pid)
        return [top, *top.children(recursive=True), *self.beside]


def _cpu_seconds(processes: Iterable[psutil.Process]) -> collections.Counter[str]:
    """By what the processes are for."""
    used: collections.Counter[str] = collections.Counter()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            # Ray and vLLM write what a process is for over its command line.
            title = process.cmdline()[0].split(".")[0].strip()
            name = title.removeprefix("ray::") if "::" in title else process.name()
            used[name] += times.user + times.system
    return used


def _signal(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def alternate(on: SideRun, off: SideRun, seconds: float, turn: float) -> None:
    """Turns of both, each first in every other pair."""
    on.stop()
    off.stop()
    end = time.monotonic() + seconds
    first, second = on, off
    while time.monotonic() < end:
        first.turn(turn)
        second.turn(turn)
        first, second = second, first


def ratios(on: np.ndarray, off: np.ndarray) -> np.ndarray:
    """float[2]: seconds per step and seconds of the processor per step, on over off, of float[n, 3] stretches each."""
    on, off = on.sum(axis=0), off.sum(axis=0)
    return (on[:2] / on[2]) / (off[:2] / off[2])


def spread(on: np.ndarray, off: np.ndarray) -> np.ndarray:
    """float[2, 2]: of either ratio the 5th and 95th per cent, when the stretches are drawn anew from the same ones."""
    draw = np.random.default_rng(0)
    picks = draw.integers(len(on), size=(RESAMPLES, len(on)))
    return np.quantile([ratios(on[pick], off[pick]) for pick in picks], (0.05, 0.95), axis=0).T


def endless(config: Path, folder: Path) -> Path:
    """The model of ``config`` in ``folder``, without a token that ends a response."""
    settings = config_file.load(config)
    inputs.prepare(settings)
    shutil.copytree(settings.model.path, folder)
    for path in (folder / "config.json", folder / "generation_config.json"):
        if path.exists():
            path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}))
    return folder


@contextlib.contextmanager
def prometheus_beside(runs: Path) -> Iterator[list[psutil.Process]]:
    """A Prometheus on the runs in ``runs``, to be stopped and let go on with a run."""
    before = set(psutil.Process().children())
    # Half of the time it is stopped, so that it would scrape twice as often as it does beside a run that is not.
    with prometheus.running(
        runs.parent / f"{runs.name}-data", runs=runs, rules=RULES, scrape_s=2 * prometheus.SCRAPE_S
    ):
        yield list(set(psutil.Process().children()) - before)


def publishing(rounds: int = 200) -> float:
    """Seconds that the driver takes to publish one step and to write out one scrape."""
    record = step_record(response_tokens=tuple(range(64)), segments=(1, 2) * 32, interruptions=(0, 1) * 32)
    with Metrics("pipeline") as metrics:
        publish.publish_start(metrics)
        took = []
        for _ in range(rounds):
            began = time.perf_counter()
            publish.publish_step(metrics, record)
            generate_latest(metrics.registry)
            took.append(time.perf_counter() - began)
    return statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--turn", type=float, default=2.0, help="seconds")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny_moe.yaml")
    parser.add_argument("--control", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        runs = Path(folder)
        model = {"model.path": endless(arguments.config, runs / "model")}
        on = SideRun(arguments.config, runs / "on", model | (OFF if arguments.control else {}))
        stack.callback(on.close)
        off = SideRun(arguments.config, runs / "off", model | OFF)
        stack.callback(off.close)
        for run in (on, off):
            while len(run.steps) < WARM_UP_STEPS:
                time.sleep(0.5)
                run.read_steps()
        if not arguments.control:
            on.beside = stack.enter_context(prometheus_beside(on.runs))
        alternate(on, off, arguments.minutes * 60, arguments.turn)
        on.go_on()
        scrape = on.scrape_seconds()
        off.go_on()
    minute = max(1, round(60 / (2 * arguments.turn)))
    stretches = [run.stretches(minute) for run in (on, off)]
    size = min(len(each) for each in stretches)
    stretches = [each[:size] for each in stretches]
    step, cpu = ratios(*stretches)
    step_spread, cpu_spread = spread(*stretches)
    seconds, _, steps = stretches[1].sum(axis=0)
    result = {
        "step_ratio_on_over_off": round(step, 4),
        "step_ratio_90": step_spread.round(4).tolist(),
        "cpu_ratio_on_over_off": round(cpu, 4),
        "cpu_ratio_90": cpu_spread.round(4).tolist(),
        "cpu_us_per_token": [run.cpu_us_per_token() for run in (on, off)],
        "steps": [int(each[:, 2].sum()) for each in stretches],
        "tokens_per_step": [round(run.tokens / len(run.steps), 1) for run in (on, off)],
        "step_seconds": round(seconds / steps, 4),
        "publish_share": round(publishing() / (seconds / steps), 5),
        "scrape_share": round(scrape / prometheus.SCRAPE_S, 5),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
