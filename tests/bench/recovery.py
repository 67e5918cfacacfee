"""How long training stalls after a process is killed, and how long generation pauses for a weight sync or a checkpoint.

    python -m tests.bench.recovery

Real runs of the tests' small recipe. A process of each kind is killed several times; the time is that from SIGKILL to
the first training step after the process is back, and nearly all of it is the start of the replacement. The standstill
of generation is the time that each replica counts from the pause to the resume of a weight sync, in runs that differ in
one setting. The last line of stdout is one JSON object:

    recovery_s            by kind: median of the kills
    standstill_s          per weight sync, mean over the replicas: "push"; "checkpoint" with a checkpoint at each push;
                          "rolling" one replica after the other, of two; "together" the same two at once
    checkpoint_over_push  standstill of a weight sync with a checkpoint over that of one without
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.support.real_run import Run, make_model, make_recipe

KILLS, PUSHES = 3, 40
SETTINGS = {"trainer__steps": 100_000, "trainer__optimizer__lr": 1e-6, "eval__n": 1, "recovery__backoff_s": 0}
BACK = {
    "worker": ("RolloutActor", "worker_restarted"),
    "engine": ("EngineCore", "worker_restarted"),
    "trainer": ("TrainerActor", "trainer_restarted"),
    "queue": ("QueueProcess", "queue_rebuilt"),
}


def lines(run: Run) -> int:
    return len(run.trained) if (run.folder / "trained.jsonl").exists() else 0


def logged(run: Run, event: str) -> int:
    return (run.folder / "logs" / "pipeline.jsonl").read_text().count(f'"event": "{event}"')


def until(condition, run: Run) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        if run.process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"the run ended early, or hangs:\n{run.output[-3000:]}")
        time.sleep(0.01)


def end(run: Run) -> None:
    run.process.terminate()
    run.wait()
    run.close()


def recovery(recipe: Path, folder: Path) -> dict[str, float]:
    settings = SETTINGS | {"checkpoint__every": 2, "recovery__max_restarts": 1000}
    run = Run(recipe, folder, **settings)
    seconds: dict[str, list[float]] = {}
    run.wait_for_step(4)
    for _ in range(KILLS):
        for kind, (process, event) in BACK.items():
            before = logged(run, event)
            began = time.monotonic()
            run.one(process).kill()
            until(lambda: logged(run, event) > before, run)  # noqa: B023 - called before the next turn
            steps = lines(run)
            until(lambda: lines(run) > steps, run)  # noqa: B023
            seconds.setdefault(kind, []).append(time.monotonic() - began)
            run.wait_for_step(lines(run) + 4)
    for _ in range(KILLS):
        before = logged(run, "work_restored")
        began = time.monotonic()
        os.kill(run.driver, 9)
        run.wait()
        run.close()
        run = Run(recipe, folder, resume=True, **settings)
        until(lambda: logged(run, "work_restored") > before, run)  # noqa: B023
        steps = lines(run)
        until(lambda: lines(run) > steps, run)  # noqa: B023
        seconds.setdefault("driver", []).append(time.monotonic() - began)
        run.wait_for_step(lines(run) + 4)
    end(run)
    return {kind: round(statistics.median(values), 2) for kind, values in seconds.items()}


def standstill(recipe: Path, folder: Path, replicas: int = 1, **settings) -> float:
    """Return the seconds per weight sync for which a replica generates nothing."""
    folder.mkdir()
    run = Run(recipe, folder, rollout__replicas=replicas, **SETTINGS | settings)
    run.wait_for_step(5)
    before, first = paused(run, replicas), lines(run)
    run.wait_for_step(first + PUSHES)
    time.sleep(1.5)  # the counters are read once a second
    after, last = paused(run, replicas), lines(run)
    end(run)
    return (after - before) / replicas / (last - first)


def paused(run: Run, replicas: int) -> float:
    total = 0.0
    for replica in range(replicas):
        text = run.metrics("rollout" if replica == 0 else f"rollout-{replica}")
        total += float(re.search(r"^async_rl_rollout_paused_seconds_total (\S+)", text, re.MULTILINE)[1])
    return total


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        for part in ("model", "recipe", "kills"):
            (top / part).mkdir()
        recipe = make_recipe(top / "recipe", make_model(top / "model"))
        still = {
            "push": standstill(recipe, top / "push"),
            "checkpoint": standstill(recipe, top / "checkpoint", checkpoint__every=1),
            "together": standstill(recipe, top / "together", replicas=2),
            "rolling": standstill(recipe, top / "rolling", replicas=2, sync__rolling=True),
        }
        result = {
            "recovery_s": recovery(recipe, top / "kills"),
            "standstill_s": {name: round(seconds, 3) for name, seconds in still.items()},
            "checkpoint_over_push": round(still["checkpoint"] / still["push"], 2),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
