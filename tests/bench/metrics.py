"""The cost of observability, measured on pairs of equal runs, one with everything on and one with everything off.

The two runs of a pair work in turns of a quarter of a second: one is stopped (SIGSTOP) while the other works. On means
vLLM's own metrics, the timeline, and a Prometheus that scrapes every process and evaluates the alerts; off means none
of them. Nothing is learned, all prompts have one length and no response ends before its limit, so that all steps cost
the same. A step is timed on its run's own clock, which stops with the run.

A shared machine changes its speed from moment to moment by more than the difference to be measured; short turns give
both runs the same share of that. Chance remains in each run as a whole: the memory layout of its processes and the seed
of Python's hashes differ from run to run, and can make one run a per cent faster than another for its whole life
(Mytkowicz et al., "Producing wrong data without doing anything obviously wrong", ASPLOS 2009). So the benchmark takes
many pairs rather than long ones, and reports their spread.

The parts are also timed alone: the driver's work for a step, and a scrape of all processes of a run. Printed last is
one JSON line:

    step_ratio_on_over_off     seconds per step, on over off: geometric mean of the pairs
    step_ratio_error           its standard error, by the spread of the pairs;  step_ratios: of each pair
    cpu_ratio_on_over_off      the same of the processor's seconds, into which no waiting enters;  cpu_ratio_error
    cpu_us_per_token           the processor's microseconds per trained token of each process, on and off
    steps, tokens_per_step     of all runs, on and off
    publish_share              seconds to publish one step and to write out one scrape, over a step
    scrape_share               seconds in which all processes serve one scrape, over the time between two

    .venv/bin/python -m tests.bench.metrics [--pairs 20] [--minutes 1.5] [--turn 0.25] [--config configs/tiny_moe.yaml]
                                            [--control]

--minutes: for each pair, in addition to the minute and a half that it takes to start and end one. --control: all runs
have everything off; the distance of the ratios from 1 is then the resolution of this method.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from prometheus_client import generate_latest

from async_rl.config import loading
from async_rl.driver.run import prepare
from async_rl.metrics import publish
from async_rl.metrics.exporter import Metrics
from async_rl.observe import prometheus
from tests.bench.runs import ROOT, start
from tests.support.step_records import step_record

SETTINGS = {
    "trainer.steps": 10_000_000,
    "trainer.optimizer.lr": 1e-9,
    "rollout.max_response_tokens": 40,  # as many as a response of the demo has on average
    "eval.n": 1,
    "eval.every": 0,
}
OFF = {"metrics.engine": "false", "metrics.timeline_bytes": 0, "metrics.samples_per_step": 0}
RULES = ROOT / "async_rl" / "observe" / "assets" / "prometheus" / "rules.yml"
WARM_UP_STEPS = 10
SCRAPES = 20


@dataclass(frozen=True)
class Cost:
    """The cost of a number of steps of one run."""

    steps: int
    tokens: float
    seconds: float
    """On the run's own clock."""
    cpu: dict[str, float]
    """Seconds of the processor by process."""

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps

    @property
    def cpu_per_token(self) -> float:
        return sum(self.cpu.values()) / self.tokens


@dataclass(frozen=True)
class Pair:
    """The costs of two runs that took turns."""

    on: Cost
    off: Cost
    scrape_s: float
    """Seconds in which all processes of the run with everything on serve one scrape."""


class SideRun:
    """A real run that can be stopped and continued, with all of its processes and those in ``attached``."""

    def __init__(self, config: Path, runs: Path, settings: dict[str, object]) -> None:
        self.runs = runs
        self.attached: list[psutil.Process] = []
        # On its own clock, in seconds: the end of each step, and of each turn with the processor time used by then.
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
        """Read the steps that were written since the last call."""
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
        """Continue the run for ``seconds``."""
        self.resume()
        time.sleep(seconds)
        self.stop()
        self.turns.append((self._own_time(self._stopped_at), _cpu_seconds(self._stopped)))
        self.read_steps()

    def stop(self) -> None:
        self._stopped = self._processes()
        _signal(self._stopped, signal.SIGSTOP)
        self._stopped_at = time.time()

    def resume(self) -> None:
        if self._stopped:
            self._pauses.append((self._stopped_at, time.time()))
        _signal(self._stopped, signal.SIGCONT)
        self._stopped = []

    def _own_time(self, moment: float) -> float:
        return moment - sum(min(end, moment) - begin for begin, end in self._pauses if begin < moment)

    def cost(self) -> Cost:
        """Return the cost from the first step's end after the first turn to the last one within the last turn."""
        ends = [end for end, _ in self.turns]
        first, last = np.searchsorted(self.steps, [ends[0], ends[-1]]) - [0, 1]
        if last <= first:
            sys.exit("not two steps in so short a time: raise --minutes")
        began, ended = self.steps[first], self.steps[last]
        cpu = {}
        for name in {name for _, used in self.turns for name in used}:
            before, after = np.interp([began, ended], ends, [used[name] for _, used in self.turns])
            cpu[name] = float(after - before)
        steps = int(last - first)
        return Cost(steps, steps * self.tokens / len(self.steps), ended - began, cpu)

    def scrape_seconds(self) -> float:
        """Return the seconds in which its processes, one after the other, serve one scrape each, waiting included."""
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
        self.resume()
        self._process.terminate()
        self._process.wait()

    def _processes(self) -> list[psutil.Process]:
        top = psutil.Process(self._process.pid)
        return [top, *top.children(recursive=True), *self.attached]


def _cpu_seconds(processes: Iterable[psutil.Process]) -> collections.Counter[str]:
    """Return seconds of the processor by the purpose of the processes."""
    used: collections.Counter[str] = collections.Counter()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            # Ray and vLLM overwrite a process's command line with its purpose.
            title = process.cmdline()[0].split(".")[0].strip()
            name = title.removeprefix("ray::") if "::" in title else process.name()
            used[name] += times.user + times.system
    return used


def _signal(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def alternate(on: SideRun, off: SideRun, seconds: float, turn: float) -> None:
    """Give both runs turns for ``seconds``, each the first in every other pair of turns."""
    on.stop()
    off.stop()
    end = time.monotonic() + seconds
    first, second = on, off
    while time.monotonic() < end:
        first.turn(turn)
        second.turn(turn)
        first, second = second, first


def ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float | None, list[float]]:
    """Return on over off: the geometric mean of the pairs, its standard error, and the ratio of each pair."""
    each = [on / off for on, off in pairs]
    logs = np.log(each)
    mean = float(np.exp(logs.mean()))
    error = mean * float(logs.std(ddof=1)) / len(each) ** 0.5 if len(each) > 1 else None
    return round(mean, 4), error and round(error, 4), [round(one, 4) for one in each]


def per_process(costs: Sequence[Cost]) -> dict[str, float]:
    """Return microseconds of the processor per token by process."""
    used = sum((collections.Counter(cost.cpu) for cost in costs), collections.Counter[str]())
    tokens = sum(cost.tokens for cost in costs)
    return {name: round(seconds / tokens * 1e6, 2) for name, seconds in used.most_common()}


def even_inputs(config: Path, folder: Path) -> dict[str, object]:
    """Return settings that make all steps alike.

    They name copies of the config's model, without a token that ends a response, and of its prompts of mean length.
    """
    settings = loading.load(config)
    prepare(settings)
    model, prompts = folder / "model", folder / "train.jsonl"
    shutil.copytree(settings.model.path, model)
    for path in (model / "config.json", model / "generation_config.json"):
        if path.exists():
            path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}))
    lines = settings.data.train.read_text().splitlines(keepends=True)
    lengths = [len(json.loads(line)[settings.data.prompt_field]) for line in lines]
    mean = statistics.fmean(lengths)
    even = min(lengths, key=lambda length: abs(length - mean))
    prompts.write_text("".join(line for line, length in zip(lines, lengths, strict=True) if length == even))
    return {"model.path": model, "data.train": prompts}


@contextlib.contextmanager
def prometheus_beside(runs: Path) -> Iterator[list[psutil.Process]]:
    """Start a Prometheus on the runs in ``runs`` and yield its processes, to be stopped and continued with a run."""
    before = set(psutil.Process().children())
    # It is stopped half of the time: twice the interval on the clock is the usual one per second of the run's work.
    with prometheus.running(
        runs.parent / f"{runs.name}-data", runs=runs, rules=RULES, scrape_s=2 * prometheus.SCRAPE_S
    ):
        yield list(set(psutil.Process().children()) - before)


def publishing(rounds: int = 200) -> float:
    """Return the seconds that the driver takes to publish one step and to write out one scrape."""
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


def measure(arguments: argparse.Namespace, runs: Path, *, on_first: bool) -> Pair:
    """Start one pair of runs, alternate between them, end them, and return their costs."""
    even = even_inputs(arguments.config, runs)
    settings = {"on": even | (OFF if arguments.control else {}), "off": even | OFF}
    with contextlib.ExitStack() as stack:
        pair: dict[str, SideRun] = {}
        for name in ("on", "off") if on_first else ("off", "on"):
            pair[name] = SideRun(arguments.config, runs / name, settings[name])
            stack.callback(pair[name].close)
        on, off = pair["on"], pair["off"]
        for run in (on, off):
            while len(run.steps) < WARM_UP_STEPS:
                time.sleep(0.5)
                run.read_steps()
        if not arguments.control:
            on.attached = stack.enter_context(prometheus_beside(on.runs))
        alternate(on, off, arguments.minutes * 60, arguments.turn)
        on.resume()
        scrape = on.scrape_seconds()
        off.resume()
        return Pair(on.cost(), off.cost(), scrape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=1.5)
    parser.add_argument("--turn", type=float, default=0.25, help="seconds")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny_moe.yaml")
    parser.add_argument("--control", action="store_true")
    arguments = parser.parse_args()
    # When this process is terminated, so are its runs, also the one that is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    pairs = []
    for number in range(arguments.pairs):
        with tempfile.TemporaryDirectory() as folder:
            pairs.append(measure(arguments, Path(folder), on_first=number % 2 == 0))
        step = ratio([(pair.on.seconds_per_step, pair.off.seconds_per_step) for pair in pairs])
        print(f"pair {number + 1}: step_ratio_on_over_off {step[2][-1]}, so far {step[0]}", flush=True)
    cpu = ratio([(pair.on.cpu_per_token, pair.off.cpu_per_token) for pair in pairs])
    sides = [[pair.on for pair in pairs], [pair.off for pair in pairs]]
    step_seconds = sum(cost.seconds for cost in sides[1]) / sum(cost.steps for cost in sides[1])
    result = {
        "step_ratio_on_over_off": step[0],
        "step_ratio_error": step[1],
        "step_ratios": step[2],
        "cpu_ratio_on_over_off": cpu[0],
        "cpu_ratio_error": cpu[1],
        "cpu_us_per_token": [per_process(side) for side in sides],
        "steps": [sum(cost.steps for cost in side) for side in sides],
        "tokens_per_step": [round(sum(c.tokens for c in side) / sum(c.steps for c in side), 1) for side in sides],
        "step_seconds": round(step_seconds, 4),
        "publish_share": round(publishing() / step_seconds, 5),
        "scrape_share": round(statistics.median(pair.scrape_s for pair in pairs) / prometheus.SCRAPE_S, 5),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
