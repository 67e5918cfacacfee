"""The time that asynchrony saves: the same number of groups trained three ways, in turns, in one call.

    async       engine on one core, trainer on the other, at the same time
    sync        the same split, one after the other: staleness_threshold = 0 and mode drain
    colocated   synchronous too, with both cores for each phase

Each run is a real one in processes of its own. Printed last, one JSON line:
wall_ratio_sync_over_async; ideal_ratio, what perfect overlap of the synchronous run's own phases would give (their sum
over the longer one); wall_ratio_colocated_over_async; overlap_efficiency, busy time of the busier side over wall time;
sync_seconds, the median of each phase of a weight sync in the asynchronous runs.

    .venv/bin/python -m tests.bench.overlap [--steps 24] [--groups 16] [--rounds 2] [--config configs/tiny_moe.yaml]
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from tests.bench.runs import ROOT, train

SYNCHRONOUS = {"async_training.staleness_threshold": 0, "async_training.partial_rollout.mode": "drain"}
WAYS = {
    "async": {},
    "sync": SYNCHRONOUS,
    "colocated": SYNCHRONOUS
    | {"resources.pin_cores": "false", "resources.engine_threads": 2, "resources.trainer_threads": 2},
}


def run(config: Path, way: str, steps: int, groups: int, seed: int, runs: Path) -> tuple[dict, list[dict]]:
    """The summary of one run, and the seconds of each phase of its weight syncs."""
    name = f"{way}-{seed}"
    size = {"trainer.steps": steps, "trainer.groups_per_step": groups}
    folder = train(config, runs, name, {"seed": seed, "eval.n": 1} | size | WAYS[way])
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return json.loads((folder / "summary.json").read_text()), [
        row["sync_seconds"] for row in rows if row["sync_seconds"]
    ]


def medians(syncs: list[dict]) -> dict[str, float]:
    return {phase: round(statistics.median(sync[phase] for sync in syncs), 3) for phase in syncs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--groups", type=int, default=16, help="groups per training step")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny_moe.yaml")
    arguments = parser.parse_args()

    summaries: dict[str, list[dict]] = {way: [] for way in WAYS}
    syncs: dict[str, list[dict]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.rounds):
            for way in WAYS:
                summary, each = run(arguments.config, way, arguments.steps, arguments.groups, seed, Path(folder))
                summaries[way].append(summary)
                syncs[way] += each
                print(
                    f"{way:10s} wall {summary['wall_s']:6.1f} s   rollout {summary['busy']['rollout_s']:6.1f} s   "
                    f"trainer {summary['busy']['trainer_s']:6.1f} s   overlap {summary['overlap_efficiency']:.2f}   "
                    + "   ".join(f"{phase} {seconds:.3f} s" for phase, seconds in medians(each).items()),
                    flush=True,
                )

    def wall(way: str) -> float:
        return statistics.median(summary["wall_s"] for summary in summaries[way])

    phases = [summary["busy"] for summary in summaries["sync"]]
    ideal = [(p["rollout_s"] + p["trainer_s"]) / max(p["rollout_s"], p["trainer_s"]) for p in phases]
    result = {
        "wall_ratio_sync_over_async": wall("sync") / wall("async"),
        "ideal_ratio": statistics.median(ideal),
        "wall_ratio_colocated_over_async": wall("colocated") / wall("async"),
        "overlap_efficiency": {
            way: statistics.median(summary["overlap_efficiency"] for summary in summaries[way])
            for way in ("sync", "async")
        },
        "sync_seconds": medians(syncs["async"]),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
