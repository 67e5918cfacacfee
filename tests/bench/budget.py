"""The cost of one decision of the budget and the broker with 1,000 replicas, with and without the journal.

    python -m tests.bench.budget

Every replica has its groups in flight, the window is full or nearly so, and the queue holds a training step. Timed are
whole rounds of issue, put, lease, ack and advance, each call on its own; the two brokers take turns within a round. The
ratio is to the cheapest possible replacement: adding an entry to a dictionary and deleting it.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from async_rl.queue.actor import QueueActor
from async_rl.queue.broker import Broker
from async_rl.queue.broker_state import BrokerSettings
from async_rl.queue.records import GroupMeta
from tests.support.queue_parts import begin_journal
from tests.support.simulation import cursor

REPLICAS, PER_REPLICA, REQUIRED, ROUNDS = 1000, 8, 4000, 12


class Subject:
    """A broker behind the queue actor's method that decides, with or without a journal."""

    def __init__(self, path: Path | None) -> None:
        settings = BrokerSettings(
            required_groups=REQUIRED,
            window_limit=REPLICAS * PER_REPLICA + REQUIRED,
            max_staleness=4,
            on_stale="mask",
            max_bytes=10**12,
            can_rewind=True,
        )
        self.broker = Broker(cursor(100_000), settings)
        self.actor = QueueActor(self.broker, None if path is None else begin_journal(path, self.broker))
        self.calls = 0
        self.microseconds: dict[str, list[float]] = defaultdict(list)
        self.running: list[str] = []
        self.version = 0

    def decide(self, method: str, *arguments, groups: int = 1):
        self.calls += 1
        began = time.perf_counter()
        answer = self.actor._decide(str(self.calls), getattr(self.broker, method), *arguments)
        self.microseconds[method].append((time.perf_counter() - began) * 1e6 / groups)
        return answer

    def round(self) -> None:
        for replica in range(REPLICAS):
            self.running += self.decide("issue", f"rollout-{replica}", 4)
        for group_id in self.running[:REQUIRED]:
            meta = GroupMeta(group_id, 100, 1000, self.version, self.version, 8, 0, (100,) * 8)
            self.decide("put", meta)
        del self.running[:REQUIRED]
        for _ in range(REQUIRED // 16):  # as a step that streams does
            leased = self.decide("lease", 16, "trainer", 1, groups=16)
            self.decide("ack", leased, self.version, groups=16)
        self.version += 1
        self.decide("advance", self.version)
        self.decide("checkpointed", self.version - 2)


def one_entry() -> float:
    """Return the microseconds to add an entry to a dictionary of as many groups and delete it."""
    entries = {f"0-{i}.0": i for i in range(REPLICAS * PER_REPLICA)}
    began = time.perf_counter()
    for i in range(10_000):
        entries["new"] = i
        del entries["new"]
    return (time.perf_counter() - began) * 100


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bare, journaled = Subject(None), Subject(Path(folder) / "journal")
        entry = []
        for _ in range(ROUNDS):
            for subject in (bare, journaled):
                subject.round()
            entry.append(one_entry())
    per_group = ("issue", "put", "lease", "ack")
    cost = {method: statistics.median(bare.microseconds[method]) for method in per_group}
    # Up to four tickets at once; a full window gives fewer.
    journal = {method: statistics.median(journaled.microseconds[method]) for method in per_group}
    base = statistics.median(entry)
    result = {
        "replicas": REPLICAS,
        "decision_us_max": round(max(cost.values()), 2),
        "decision_us": {method: round(value, 2) for method, value in cost.items()},
        "decision_us_with_journal": {method: round(value, 2) for method, value in journal.items()},
        "decision_over_dictionary_entry": round(max(cost.values()) / base, 1),
        "push_us": round(statistics.median(bare.microseconds["advance"]), 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
