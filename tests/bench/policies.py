"""One training run of each routing policy, partial-rollout mode and replay mode, the same seed: `ppo_kl` over steps.

Mode ``resume`` is run with each policy; in ``in_flight`` and ``drain`` no call is resumed, so the policies coincide; R2
and no replay are run with ``replace``. The engine computes in bfloat16, the trainer in float32: in float32 on both
sides R3, R2 and off are the same. Printed last, one JSON line: per run, means over its steps.

    .venv/bin/python -m tests.bench.policies [--steps 40] [--seed 0] [--figure FILE] [--runs FOLDER]

With --runs the run folders stay there, and those that have finished are not run again: only the figure is drawn.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.runs import ROOT, train

PARTIAL, REPLAY = "async_training.partial_rollout", "trainer.router_replay"
RUNS = {
    "replace": {f"{PARTIAL}.routing": "replace"},
    "preserve": {f"{PARTIAL}.routing": "preserve"},
    "exact": {f"{PARTIAL}.routing": "exact"},
    "in_flight": {f"{PARTIAL}.mode": "in_flight"},
    "drain": {f"{PARTIAL}.mode": "drain"},
    "replace, R2": {REPLAY: "R2"},
    "replace, off": {REPLAY: "off"},
}
WINDOW = 8  # steps of the running means that are drawn

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")


def run(config: Path, name: str, settings: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Return the rows of the run's metrics.jsonl; it is run unless it has finished before."""
    path = folder / name.replace(", ", "-")
    summary = path / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["exit_reason"] != "finished":
        train(config, folder, path.name, settings)
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def mean(pairs: list[tuple[float | None, int]]) -> float | None:
    """Return the weighted mean of the values that are not None, or None without any."""
    known = [(value, weight) for value, weight in pairs if value is not None and weight]
    return sum(value * weight for value, weight in known) / sum(weight for _, weight in known) if known else None


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    positions = ("uninterrupted", "before", "first", "after")
    return {
        "reward_last": mean([(row["reward_mean"], row["trajectories"]) for row in rows[-10:]]),
        "partial": sum(row["partial_rollouts"] for row in rows) / sum(row["trajectories"] for row in rows),
        "ppo_kl": mean([(row["ppo_kl"], row["trained_tokens"]) for row in rows]),
        "ppo_kl_k3": mean([(row["ppo_kl_k3"], row["trained_tokens"]) for row in rows]),
        "on_policy_abs_mean": mean(
            [(row["on_policy_logprob_abs_diff_mean"], row["token_staleness"].get("0", 0)) for row in rows]
        ),
        "abs_mean_by_resume_position": {
            p: mean(
                [
                    (
                        row["rollout_logprob_abs_diff_mean_by_resume_position"].get(p),
                        row["trained_tokens_by_resume_position"].get(p, 0),
                    )
                    for row in rows
                ]
            )
            for p in positions
        },
    }


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "async_rl"  # the same figure is the same file
    from matplotlib import pyplot

    panels = (("ppo_kl", "linear"), ("ppo_kl_k3", "log"), ("reward_mean", "linear"))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(8, 9), sharex=True, layout="constrained")
    for axis, (key, scale) in zip(axes, panels, strict=True):
        for (name, rows), colour in zip(results.items(), COLOURS, strict=True):
            # A step has 64 responses: single steps are mostly noise.
            values = [mean([(row[key], 1) for row in rows[max(0, i - WINDOW + 1) : i + 1]]) for i in range(len(rows))]
            style = "-" if name in ("replace", "preserve", "exact") else "--"
            axis.plot([row["step"] for row in rows], values, style, label=name, color=colour, linewidth=1.3)
        axis.set_ylabel(f"{key}, mean of {WINDOW} steps")
        axis.set_yscale(scale)
        axis.grid(alpha=0.3)
    axes[0].legend(ncols=4, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, 1.2))
    axes[-1].set_xlabel("training step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "figures" / "policies.svg")
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny_moe.yaml")
    arguments = parser.parse_args()

    common = {"rollout.dtype": "bfloat16", "trainer.steps": arguments.steps, "seed": arguments.seed, "eval.n": 1}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.runs or Path(temporary)
        results = {}
        for name, settings in RUNS.items():
            results[name] = run(arguments.config, name, common | settings, folder)
            print(f"{name:14s} {json.dumps(figures(results[name]))}", flush=True)
    draw(results, arguments.figure)
    print(json.dumps({name: figures(rows) for name, rows in results.items()}))


if __name__ == "__main__":
    main()
