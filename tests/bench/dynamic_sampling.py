"""What dynamic sampling costs and gains: the demo with and without `rollout.filter.zero_variance`, the same seeds.

    .venv/bin/python -m tests.bench.dynamic_sampling [--goal 0.6] [--steps 150] [--seeds 0 1 2] [--runs FOLDER]
        [--reward async_rl.rollout.rewards.text:exact_match]

For each run: the training steps, seconds and generated tokens until an evaluation first reaches the goal, and the share
of its groups that was filtered. Tokens at that step are the run's, in proportion to time. Printed last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.runs import ROOT, train

EVAL_EVERY = 5
RUNS = {"without": False, "with": True}


def figures(folder: Path, goal: float) -> dict[str, Any]:
    """Return what one run needed to reach the goal; None where it did not."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    groups = summary["groups"]
    reached = next((row for row in rows if (row["eval_reward_mean"] or 0.0) >= goal), None)
    per_second = summary["tokens"]["generated"] / summary["wall_s"]
    return {
        "steps": reached and reached["step"],
        "seconds": reached and reached["elapsed_s"],
        "generated_tokens": reached and round(reached["elapsed_s"] * per_second),
        "filtered_share": groups["filtered"] / groups["issued"],
        "last_eval": summary["eval"]["last"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goal", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--reward", default="async_rl.rollout.rewards.text:partial_credit")
    parser.add_argument("--runs", type=Path, help="folder for the run folders, which stay; else they are removed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
        for seed in given.seeds:
            for name, filters in RUNS.items():
                settings = {
                    "seed": seed,
                    "trainer.steps": given.steps,
                    "eval.every": EVAL_EVERY,
                    "reward.function": given.reward,
                    "rollout.filter.zero_variance": filters,
                }
                folder = train(ROOT / "configs/tiny_moe.yaml", given.runs or Path(scratch), f"{name}-{seed}", settings)
                found[name].append(figures(folder, given.goal))
                print(f"seed {seed}, {name}: {found[name][-1]}")
    result = {
        name: {key: _median([run[key] for run in runs]) for key in runs[0]} | {"runs": len(runs)}
        for name, runs in found.items()
    }
    print(json.dumps({"goal": given.goal, **result}))


def _median(values: list[float | None]) -> float | None:
    """Return the median; None where a run has no value, as it did not reach the goal."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if len(known) == len(values) else None


if __name__ == "__main__":
    main()
