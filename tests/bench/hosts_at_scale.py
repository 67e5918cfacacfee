"""What the driver and the queue do for a run on up to 64 hosts of 8 replicas: in virtual time, with their real code.

``tests.support.virtual_cluster`` says what is real. A table has, for each number of hosts, groups per training step and
tokens of a response:

    calls/s, kB/s, us/s         calls of actors by the driver each second, bytes of their arguments and results, and
                                microseconds of the processor: the monitor, which asks every replica, and the waiting
    calls, kB, us               the same for each training step, with its weight sync
    canary kB                   beside ``kB``: routed experts of the canary's probe
    queue us                    microseconds of the queue's process for each step
    journal kB, files kB        what a step adds to the queue's journal and to the files of all steps

Microseconds are those of this project's code; what asyncio and Ray take for a call is not in them. A scraper finds as
many lines at the driver whatever the size, and a target for each replica. Printed last, one JSON line:

    us_per_replica_s            microseconds of each second that a replica takes from the driver
    us_per_replica_sync         microseconds of each weight sync that a replica takes from the driver
    us_per_group                microseconds that a group takes from the driver, and
    queue_us_per_group          from the queue
    kb_per_group, kb_per_replica_sync, canary_kb_per_replica_sync
                                kB through the driver's process
    kb_long_over_short          kB of a step with the longest responses over that with the shortest
    ray_us_per_call             with --ray, microseconds of the processor that a call of an actor for its counters takes
                                of the driver's process, on a real cluster of this host

    .venv/bin/python -m tests.bench.hosts_at_scale [--hosts 1 8 64] [--groups 64 512 4096] [--tokens 256 32768] [--ray]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from pathlib import Path

from async_rl.rollout.stats import WorkerStats
from tests.support.virtual_actors import Size
from tests.support.virtual_cluster import Cost, measure

# Calls at once, as for 64 hosts, and how often.
POLLED, POLLS = 512, 10

COLUMNS = {
    "calls/s": Cost.calls_per_second,
    "kB/s": lambda cost: cost.bytes_per_second() / 1e3,
    "us/s": Cost.us_per_second,
    "calls": Cost.calls_per_step,
    "kB": lambda cost: cost.bytes_per_step() / 1e3,
    "canary kB": lambda cost: cost.canary_bytes_per_step() / 1e3,
    "us": Cost.us_per_step,
    "queue us": lambda cost: cost.us_per_step("queue"),
    "journal kB": lambda cost: cost.journal / 1e3,
    "files kB": lambda cost: cost.written / 1e3,
}


def slopes(found: dict[Size, Cost], hosts: list[int], groups: list[int], tokens: list[int]) -> dict[str, float]:
    """Return what one replica and one group more cost, between the smallest and the largest sizes."""
    least, most = Size(hosts[0], groups[0], tokens[0]), Size(hosts[-1], groups[0], tokens[0])
    larger, longer = Size(hosts[0], groups[-1], tokens[0]), Size(hosts[-1], groups[-1], tokens[-1])
    shorter = Size(hosts[-1], groups[-1], tokens[0])

    def per(more: Size, count: int, name: str, side: str = "driver") -> float:
        values = [getattr(found[size], name)(side) for size in (least, more)]
        return (values[1] - values[0]) / max(1, count)

    replicas, step = most.replicas - least.replicas, larger.groups - least.groups
    canary = found[most].canary_bytes_per_step() - found[least].canary_bytes_per_step()
    return {
        "us_per_replica_s": per(most, replicas, "us_per_second"),
        "us_per_replica_sync": per(most, replicas, "us_per_step"),
        "us_per_group": per(larger, step, "us_per_step"),
        "queue_us_per_group": per(larger, step, "us_per_step", "queue"),
        "kb_per_group": per(larger, step, "bytes_per_step") / 1e3,
        "kb_per_replica_sync": per(most, replicas, "bytes_per_step") / 1e3,
        "canary_kb_per_replica_sync": canary / max(1, replicas) / 1e3,
        "kb_long_over_short": found[longer].bytes_per_step() / found[shorter].bytes_per_step(),
    }


class Counters:
    """An actor that answers as a rollout worker's ``stats`` does."""

    def __init__(self, replica: int) -> None:
        self._stats = WorkerStats(replica)

    async def stats(self) -> WorkerStats:
        return self._stats


def ray_us_per_call() -> float:
    """Return what a call of an actor takes of this process with Ray, its threads included."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    workers = [ray.remote(num_cpus=0)(Counters).remote(replica) for replica in range(4)]

    async def poll(times: int) -> None:
        for _ in range(times):
            await asyncio.gather(*(workers[replica % len(workers)].stats.remote() for replica in range(POLLED)))

    async def measured() -> float:
        await poll(1)
        before = time.process_time()
        await poll(POLLS)
        return (time.process_time() - before) * 1e6 / (POLLS * POLLED)

    try:
        return asyncio.run(measured())
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--groups", type=int, nargs="+", default=[64, 512, 4096], help="per training step")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 32_768], help="of a response, on average")
    parser.add_argument("--ray", action="store_true", help="also measure what Ray takes for a call")
    options = parser.parse_args()
    print("   ".join([f"{'hosts':>5} {'groups':>6} {'tokens':>6}", *(f"{name:>10}" for name in COLUMNS)]))
    found: dict[Size, Cost] = {}
    for hosts, groups, tokens in itertools.product(options.hosts, options.groups, options.tokens):
        size = Size(hosts, groups, tokens)
        with tempfile.TemporaryDirectory() as name:
            cost = found[size] = measure(size, Path(name) / "run")
        values = (f"{column(cost):>10,.0f}" for column in COLUMNS.values())
        print("   ".join([f"{hosts:>5} {groups:>6} {tokens:>6}", *values]), flush=True)
    result = slopes(found, options.hosts, options.groups, options.tokens)
    if options.ray:
        result["ray_us_per_call"] = ray_us_per_call()
    print(json.dumps({key: float(f"{value:.3g}") for key, value in result.items()}))


if __name__ == "__main__":
    main()
