"""What being watched costs: the same run with everything on and with everything off, in turns, in one call.

On: vLLM's own metrics, the timeline, and a Prometheus that scrapes every process and evaluates the alerts. Off: none of
them. Of each run the median step after the first ten; of each pair their ratio. Two runs differ by several per cent
here whatever they do, so the parts are also timed by themselves: what the driver does for one step, and what a scrape
takes the processes of a run under way. Printed last, one JSON line:

    step_ratio_on_over_off   median over the pairs;  pairs: each of them
    publish_share            seconds to publish one step and to write out one scrape, over the median step
    scrape_share             seconds in which all processes serve one scrape, over the time between two

    .venv/bin/python tests/bench/metrics.py [--rounds 3] [--steps 60] [--config configs/tiny_moe.yaml]
"""

from __future__ import annotations

import sys
from pathlib import Path

# Not this folder: here, "import queue" of any library would find the bench of that name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import json
import statistics
import tempfile
import time
import urllib.request

from bench.runs import ROOT, start, train
from prometheus_client import generate_latest
from step_records import step_record

from async_rl.metrics import publish
from async_rl.metrics.exporter import Metrics
from async_rl.observe import prometheus

OFF = {"metrics.engine": "false", "metrics.timeline_bytes": 0, "metrics.samples_per_step": 0}
RULES = ROOT / "dashboards" / "prometheus" / "rules.yml"
WARM_UP_STEPS = 10
SCRAPES = 20


def median_step(config: Path, runs: Path, name: str, steps: int, *, on: bool) -> float:
    """Seconds."""
    settings = {"trainer.steps": steps, "eval.n": 1, "eval.every": 0} | ({} if on else OFF)
    watched = prometheus.running(runs / f"data-{name}", runs=runs, rules=RULES) if on else contextlib.nullcontext()
    with watched:
        folder = train(config, runs, name, settings)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["step_seconds"] for row in rows[WARM_UP_STEPS:])


def scraping(config: Path, runs: Path) -> float:
    """Seconds in which the processes of a run under way, all together, serve one scrape each; waiting for their turn
    is among it."""
    settings = {"trainer.steps": 100_000, "eval.n": 1, "eval.every": 0}
    rows = runs / "scraped" / "metrics.jsonl"
    process = start(config, runs, "scraped", settings)
    try:
        while not rows.exists() or len(rows.read_bytes().splitlines()) < WARM_UP_STEPS:
            assert process.poll() is None, "the run ended early"
            time.sleep(0.5)
        targets = [
            json.loads(path.read_text())[0]["targets"][0] for path in (runs / ".prometheus").glob("*@scraped.json")
        ]
        took = []
        for _ in range(SCRAPES):
            time.sleep(0.5)
            began = time.perf_counter()
            for target in targets:
                urllib.request.urlopen(f"http://{target}/metrics").read()
            took.append(time.perf_counter() - began)
    finally:
        process.terminate()
        process.wait()
    return statistics.median(took)


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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny_moe.yaml")
    arguments = parser.parse_args()
    pairs, steps = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            seconds = {}
            # Each comes first in turn.
            for on in (True, False) if number % 2 == 0 else (False, True):
                name = f"{'on' if on else 'off'}-{number}"
                seconds[on] = median_step(arguments.config, Path(folder), name, arguments.steps, on=on)
                print(f"{name:8s} {seconds[on]:.4f} s a step", flush=True)
            pairs.append(seconds[True] / seconds[False])
            steps.append(seconds[False])
        scrape = scraping(arguments.config, Path(folder))
    result = {
        "step_ratio_on_over_off": round(statistics.median(pairs), 4),
        "pairs": [round(pair, 4) for pair in pairs],
        "publish_share": round(publishing() / statistics.median(steps), 5),
        "scrape_share": round(scrape / prometheus.SCRAPE_S, 5),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
