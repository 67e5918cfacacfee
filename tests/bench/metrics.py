"""What being watched costs: two equal runs side by side, one with everything on and one with everything off, of which
one is stopped (SIGSTOP) while the other goes on, in turns of a few seconds.

On: vLLM's own metrics, the timeline, and a Prometheus that scrapes every process and evaluates the alerts. Off: none of
them. Nothing is learned, so that all steps cost the same on average; but responses are sampled, so one run's steps have
some more tokens than the other's, and steps of as many tokens are compared. A machine that others use too is faster in
one minute than in the next, by more than what is to be measured; turns of seconds give both runs the same share of it.
The parts are timed by themselves too: what the driver does for a step, and what a scrape takes the processes of a run.
Printed last, one JSON line:

    step_ratio_on_over_off     seconds per step of as many trained tokens, on over off
    step_ratio_90              where 90 of 100 such calls would find it, by resampling minutes
    cpu_ratio_on_over_off      the same of the processor's seconds, into which no waiting enters;  cpu_ratio_90
    steps, tokens_per_step     of both runs, on and off
    publish_share              seconds to publish one step and to write out one scrape, over a step
    scrape_share               seconds in which all processes serve one scrape, over the time between two

    .venv/bin/python tests/bench/metrics.py [--minutes 20] [--turn 5] [--config configs/tiny_moe.yaml] [--control]

--control: both runs with everything off; how far from 1 the ratios come then is what this method cannot tell.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Not this folder: here, "import queue" of any library would find the bench of that name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import itertools
import json
import random
import signal
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import psutil
from bench.runs import ROOT, start
from prometheus_client import generate_latest
from step_records import step_record

from async_rl.metrics import publish
from async_rl.metrics.exporter import Metrics
from async_rl.observe import prometheus

SETTINGS = {"trainer.steps": 10_000_000, "trainer.optimizer.lr": 1e-9, "eval.n": 1, "eval.every": 0}
OFF = {"metrics.engine": "false", "metrics.timeline_bytes": 0, "metrics.samples_per_step": 0}
RULES = ROOT / "dashboards" / "prometheus" / "rules.yml"
WARM_UP_STEPS = 10
SCRAPES = 20
RESAMPLES = 2000


class Turn(NamedTuple):
    """What a run did between being let go and being stopped."""

    seconds: float
    cpu_seconds: float
    steps: int
    tokens: int


class SideRun:
    """A run of the pipeline that can be stopped and let go on, with every process below it and those in ``beside``."""

    def __init__(self, config: Path, runs: Path, settings: dict[str, object]) -> None:
        self.runs = runs
        self.beside: list[psutil.Process] = []
        self._rows = runs / "run" / "metrics.jsonl"
        self._read = 0
        self._process = start(config, runs, "run", SETTINGS | settings)
        self._stopped: list[psutil.Process] = []

    def new_rows(self) -> list[dict[str, Any]]:
        """Of the steps since the last call."""
        if self._process.poll() is not None:
            sys.exit(f"the run in {self.runs} ended early")
        if not self._rows.exists():
            return []
        with self._rows.open("rb") as file:
            file.seek(self._read)
            whole, _, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + 1 if whole else 0
        return [json.loads(line) for line in whole.splitlines()]

    def turn(self, seconds: float) -> Turn:
        """Let it go on for so long."""
        cpu, began = self._cpu_seconds(), time.perf_counter()
        self.go_on()
        time.sleep(seconds)
        self.stop()
        took = time.perf_counter() - began
        rows = self.new_rows()
        return Turn(took, self._cpu_seconds() - cpu, len(rows), sum(row["trained_tokens"] for row in rows))

    def stop(self) -> None:
        self._stopped = self._processes()
        _signal(self._stopped, signal.SIGSTOP)

    def go_on(self) -> None:
        _signal(self._stopped, signal.SIGCONT)

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

    def _cpu_seconds(self) -> float:
        total = 0.0
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total


def _signal(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def alternate(on: SideRun, off: SideRun, seconds: float, turn: float) -> list[tuple[Turn, Turn]]:
    """Turns of both, each first in every other pair."""
    for run in (on, off):
        run.stop()
        run.new_rows()
    pairs = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if len(pairs) % 2 == 0:
            with_, without = on.turn(turn), off.turn(turn)
        else:
            without, with_ = off.turn(turn), on.turn(turn)
        pairs.append((with_, without))
    on.go_on()
    off.go_on()
    return pairs


def summed(turns: Iterable[Turn]) -> Turn:
    return Turn(*(sum(column) for column in zip(*turns, strict=True)))


def costs(turns: Iterable[Turn]) -> tuple[float, float]:
    """Seconds per trained token, and seconds of the processor."""
    total = summed(turns)
    return total.seconds / total.tokens, total.cpu_seconds / total.tokens


def ratios(pairs: Iterable[tuple[Turn, Turn]]) -> tuple[float, float]:
    on, off = (costs(turns) for turns in zip(*pairs, strict=True))
    return on[0] / off[0], on[1] / off[1]


@contextlib.contextmanager
def prometheus_beside(runs: Path) -> Iterator[list[psutil.Process]]:
    """A Prometheus on the runs in ``runs``, to be stopped and let go on with a run."""
    before = set(psutil.Process().children())
    # Half of the time it is stopped, so that it would scrape twice as often as it does beside a run that is not.
    with prometheus.running(
        runs.parent / f"{runs.name}-data", runs=runs, rules=RULES, scrape_s=2 * prometheus.SCRAPE_S
    ):
        yield list(set(psutil.Process().children()) - before)


def spread(pairs: Sequence[tuple[Turn, Turn]], size: int) -> list[list[float]]:
    """Of either ratio the 5th and 95th per cent, when stretches of ``size`` pairs are drawn anew from the same ones:
    a step that one turn begins and the next one ends makes neighbours unlike."""
    stretches = [pairs[first : first + size] for first in range(0, len(pairs), size)]
    draw = random.Random(0)
    drawn = [ratios(itertools.chain.from_iterable(draw.choices(stretches, k=len(stretches)))) for _ in range(RESAMPLES)]
    cuts = [statistics.quantiles(ratio, n=20) for ratio in zip(*drawn, strict=True)]
    return [[round(cut[0], 4), round(cut[-1], 4)] for cut in cuts]


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
    parser.add_argument("--turn", type=float, default=5.0, help="seconds")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny_moe.yaml")
    parser.add_argument("--control", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        runs = Path(folder)
        on = SideRun(arguments.config, runs / "on", OFF if arguments.control else {})
        stack.callback(on.close)
        off = SideRun(arguments.config, runs / "off", OFF)
        stack.callback(off.close)
        for run in (on, off):
            warmed_up = 0
            while (warmed_up := warmed_up + len(run.new_rows())) < WARM_UP_STEPS:
                time.sleep(0.5)
        if not arguments.control:
            on.beside = stack.enter_context(prometheus_beside(on.runs))
        pairs = alternate(on, off, arguments.minutes * 60, arguments.turn)
        off.stop()
        scrape = on.scrape_seconds()
        off.go_on()
    step, cpu = ratios(pairs)
    step_spread, cpu_spread = spread(pairs, size=max(1, round(60 / arguments.turn)))
    totals = [summed(turns) for turns in zip(*pairs, strict=True)]
    off_step = totals[1].seconds / totals[1].steps
    result = {
        "step_ratio_on_over_off": round(step, 4),
        "step_ratio_90": step_spread,
        "cpu_ratio_on_over_off": round(cpu, 4),
        "cpu_ratio_90": cpu_spread,
        "steps": [total.steps for total in totals],
        "tokens_per_step": [round(total.tokens / total.steps, 1) for total in totals],
        "step_seconds": round(off_step, 4),
        "publish_share": round(publishing() / off_step, 5),
        "scrape_share": round(scrape / prometheus.SCRAPE_S, 5),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
