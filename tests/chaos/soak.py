"""A long run with pushes all the time and a kill every minute: does memory grow, does anything break?

    python -m tests.chaos.soak [--minutes 30] [--samples FILE]

Resident memory of every process is read every two seconds, as a whole and without what it shares: the pages of the
object store, of which a process keeps what it ever touched, up to the store's own bound. Of each life of a process that
lasted six minutes at least, the first three are warm-up (a trainer's heap is as large as it gets when the largest
batches have come); growth is the mean of the last quarter of the rest over that of its first quarter. The driver lives
all along. Of the others each kind is spared for a third of the time, so that it has a life to be judged by.

At the end the run is stopped, and the invariants are checked as after every chaos test. The last line of stdout is one
JSON object.

    --samples FILE   also write every reading there, as CSV
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

from tests.support.invariants import check
from tests.support.real_run import Run, make_model, make_recipe

SETTINGS = {
    "trainer__steps": 10_000_000,
    "trainer__optimizer__lr": 1e-6,
    "checkpoint__every": 50,
    "eval__n": 8,
    "recovery__max_restarts": 1000,
    "recovery__backoff_s": 0.1,
    "recovery__period_s": 1.0,
}
ROLES = {
    "worker": "RolloutActor",
    "engine": "EngineCore",
    "queue": "QueueProcess",
    "trainer": "TrainerActor",
    "raylet": "raylet/raylet",
    "gcs": "gcs_server",
}
# Whom to kill in each third of the time. An engine ends with its worker, and the other way round.
KILLED = (("worker", "queue", "engine"), ("trainer", "queue"), ("worker", "trainer", "engine"))
KILL_S, LOOK_S, WARM_UP_S, SHORTEST_S, SETTLE_S = 60.0, 2.0, 180.0, 360.0, 180.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--samples", type=Path)
    arguments = parser.parse_args()
    minutes = arguments.minutes
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        for part in ("model", "recipe", "run", "journal"):
            (top / part).mkdir()
        run = Run(make_recipe(top / "recipe", make_model(top / "model")), top / "run", **SETTINGS)
        run.wait_for_step(5)
        memory, kills = watch(run, minutes * 60)
        if arguments.samples:
            lines = [(role, pid, *sample) for (role, pid), samples in memory.items() for sample in samples]
            arguments.samples.write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
        run.process.terminate()
        code = run.wait()
        run.assert_nothing_left()
        run.close()
        if code != 130:
            sys.exit(f"exit code {code}\n{run.output[-5000:]}")
        check(run, top / "journal")
        rows = run.rows
        print(json.dumps(report(memory, kills, rows, run.summary, minutes)))


def watch(run: Run, seconds: float):
    """{(role, pid): [(time, resident bytes, those that are its own)]}, and how many were killed."""
    memory = defaultdict(list)
    kills = 0
    victims = [itertools.cycle(third) for third in KILLED]
    began = last_kill = time.monotonic()
    driver = psutil.Process(run.driver)
    while (now := time.monotonic()) - began < seconds:
        if run.process.poll() is not None:
            sys.exit(f"the run ended early:\n{run.output[-5000:]}")
        for role, process in [("driver", driver), *((r, p) for r, n in ROLES.items() for p in run.descendants(n))]:
            try:
                info = process.memory_info()
                memory[role, process.pid].append((now - began, info.rss, info.rss - info.shared))
            except psutil.NoSuchProcess:
                continue
        # The last minutes are for memory to settle.
        if now - last_kill > KILL_S and seconds - (now - began) > SETTLE_S:
            victim = next(victims[int((now - began) / seconds * len(victims))])
            run.one(ROLES[victim]).kill()
            kills, last_kill = kills + 1, now
            print(f"{now - began:6.0f} s: killed {victim} after {len(run.trained)} steps", flush=True)
        time.sleep(LOOK_S)
    return memory, kills


def growth(samples, column: int) -> float | None:
    """Last quarter over first quarter after warm-up; None for too short a life."""
    if samples[-1][0] - samples[0][0] < SHORTEST_S:
        return None
    settled = [sample[column] for sample in samples if sample[0] - samples[0][0] > WARM_UP_S]
    quarter = max(1, len(settled) // 4)
    return statistics.mean(settled[-quarter:]) / statistics.mean(settled[:quarter])


def report(memory, kills, rows, summary, minutes) -> dict:
    grown, own, lives, size = defaultdict(list), defaultdict(list), defaultdict(int), defaultdict(list)
    for (role, _), samples in memory.items():
        lives[role] += 1
        size[role].append(statistics.mean(sample[1] for sample in samples[len(samples) // 2 :]))
        if growth(samples, 1) is not None:
            grown[role].append(growth(samples, 1))
            own[role].append(growth(samples, 2))
    return {
        "minutes": minutes,
        "kills": kills,
        "steps": len(rows),
        "pushes_per_s": round(summary["sync"]["count"] / (minutes * 60), 2),
        "groups": summary["groups"],
        "max_token_staleness": summary["token_staleness"]["max"],
        "rss_growth_max": {role: round(max(ratios), 3) for role, ratios in sorted(grown.items())},
        "own_growth_max": {role: round(max(ratios), 3) for role, ratios in sorted(own.items())},
        "rss_mib": {role: round(statistics.mean(sizes) / 2**20) for role, sizes in sorted(size.items())},
        "lives": dict(lives),
        "invariant_violations": 0,  # one would have ended this with an error
    }


if __name__ == "__main__":
    main()
