"""The effect of the two staleness settings, over a fleet in virtual time around the real broker.

    python -m tests.bench.staleness [--figure docs/figures/staleness.svg]

16 replicas of 6 groups each, 32 groups per training step of about one second. A group takes a second in the median and
five in the 95th percentile (log-normal), like long-tailed responses. No machine is measured: these are consequences of
the budget alone. The last line of stdout is one JSON object: by staleness_threshold, the share of the
time in which the trainer works, and of the trained groups the mean and the largest staleness of the oldest token.
"""

import argparse
import json
from pathlib import Path

from tests.support.simulation import Fleet

THRESHOLDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
TRIGGERS = (1, 4)
STEPS = 400


def measure(threshold: float, trigger: int, max_staleness: int, on_stale: str) -> dict[str, float]:
    fleet = Fleet(
        replicas=16,
        capacity=6,
        required=32,
        trigger=trigger,
        threshold=threshold,
        max_staleness=max_staleness,
        on_stale=on_stale,
        rows=100_000,
    )
    fleet.run(STEPS)
    groups = sum(fleet.ages.values())
    counts = fleet.broker.counts()
    return {
        "trainer_busy": round(fleet.busy / fleet.now, 3),
        "staleness_mean": round(sum(age * n for age, n in fleet.ages.items()) / groups, 2),
        "staleness_max": max(fleet.ages),
        "dropped": round(counts.dropped / counts.issued, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path)
    figure = parser.parse_args().figure
    by_trigger = {t: {str(x): measure(x, t, 100, "mask") for x in THRESHOLDS} for t in TRIGGERS}
    by_bound = {bound: measure(2.0, 1, bound, "drop") for bound in (0, 1, 2, 3, 4, 6)}
    if figure is not None:
        draw(figure, by_trigger, by_bound)
    print(json.dumps({"by_threshold": by_trigger, "by_max_staleness_with_drop_at_threshold_2": by_bound}))


def draw(path: Path, by_trigger, by_bound) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "staleness"
    import matplotlib.pyplot as plt

    _, (busy, age, bound) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for trigger, by_threshold in by_trigger.items():
        xs = [float(x) for x in by_threshold]
        label = f"a push every {trigger} steps" if trigger > 1 else "a push every step"
        busy.plot(xs, [m["trainer_busy"] for m in by_threshold.values()], marker="o", label=label)
        marker = "o" if trigger == 1 else "x"
        age.plot(xs, [m["staleness_mean"] for m in by_threshold.values()], marker=marker, ls="", label=label)
    age.plot(xs, xs, color="grey", lw=0.8, label="staleness = threshold")
    busy.set(xlabel="staleness_threshold", ylabel="share of the time", title="the trainer works", ylim=(0, 1))
    age.set(xlabel="staleness_threshold", ylabel="versions", title="mean staleness of the oldest token")
    bounds = list(by_bound)
    bound.plot(bounds, [m["dropped"] for m in by_bound.values()], marker="o", color="tab:red", label="groups dropped")
    bound.plot(
        bounds, [m["trainer_busy"] for m in by_bound.values()], marker="o", color="tab:blue", label="trainer works"
    )
    bound.set(
        xlabel="max_staleness (drop, threshold 2)", ylabel="share", title="a bound that is too tight", ylim=(0, 1)
    )
    for axes in (busy, age, bound):
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
