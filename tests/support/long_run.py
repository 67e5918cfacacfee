"""A fleet in virtual time around all that a real driver and queue keep: the actor's answers, its journal, the records.

What it keeps is measured at each checkpoint, so that a test can say whether any of it grows with the steps.
"""

import functools
import gc
import itertools
import sys
from collections import Counter
from pathlib import Path

import msgpack
import numpy as np

from async_rl.driver.recorder import Recorder
from async_rl.driver.samples import Samples
from async_rl.driver.watchdog import RunSnapshot
from async_rl.metrics.records import SyncRecord
from async_rl.queue.actor import QueueActor, begin
from async_rl.queue.broker import Broker
from async_rl.queue.journal import FileJournal
from async_rl.queue.records import Excerpt, GroupMeta
from async_rl.rollout.stats import WorkerStats
from tests.support.simulation import Fleet, cursor
from tests.support.step_records import eval_results, step_report

DECISIONS = {
    *("issue", "put", "worker_lost", "lease", "ack", "release", "advance", "checkpointed", "rewind"),
    *("return_group", "fail"),
}


class JournaledBroker:
    """The broker inside the queue's actor: each decision has a call id, is remembered, and goes into the journal."""

    def __init__(self, broker: Broker, journal: Path) -> None:
        self.open_journal = functools.partial(FileJournal, journal)
        begin(FileJournal(journal, create=True), broker)
        self.calls = itertools.count()
        self.actor = QueueActor(broker, self.open_journal)
        self.largest_journal = 0

    def __getattr__(self, name):
        found = getattr(self.actor._broker, name)
        return functools.partial(self.decide, name) if name in DECISIONS else found

    def decide(self, name, *arguments):
        broker = self.actor._broker
        answer = self.actor._decide(f"client/{next(self.calls)}", getattr(broker, name), *arguments)
        self.largest_journal = max(self.largest_journal, self.actor._journal.size())
        if name == "issue":
            return [broker.ticket(group_id) for group_id in answer]
        return [broker.leased_meta(group_id) for group_id in answer] if name == "lease" else answer

    def restart(self, broker: Broker) -> None:
        """Rebuild the actor from its journal, as after the death of its process."""
        before = self.actor._broker.state()
        self.actor._journal.close()
        self.actor = QueueActor(broker, self.open_journal)
        assert self.actor._broker.state() == before


class LongRun(Fleet):
    """``Fleet`` with the records of a run; ``queue_deaths`` is the chance that a step ends with the queue's death."""

    def __init__(self, recorder: Recorder, *, queue_deaths=0.0, **fleet) -> None:
        super().__init__(**fleet)
        self.recorder = recorder
        self.queue_deaths = queue_deaths
        self.settings = self.broker._settings
        self.broker = JournaledBroker(self.broker, recorder.journal)
        self.saved = recorder.state()
        self.workers = [WorkerStats(replica) for replica in self.room]
        self.kept: list[Counter[str]] = []
        """Bytes, and answers, that were kept at each checkpoint."""
        recorder.training_begins()

    def meta(self, ticket, nbytes: int, began: int) -> GroupMeta:
        worker = self.chance.choice(self.workers)
        worker.generated_tokens += 400
        worker.sampled_tokens += 400
        worker.groups += 1
        worker.version = self.version
        return GroupMeta(
            *(ticket.group_id, 400, nbytes, began, self.version, 4, 0, (100,) * 4),
            rewards=(0.5,) * 4,
            response_tokens=(90,) * 4,
            segments=(1,) * 4,
            interruptions=(0,) * 4,
            finish_reasons=("stop",) * 4,
        )

    def train(self, leased) -> None:
        step, version, checkpoint = self.step, self.version, self.checkpoint
        super().train(leased)
        if self.step == step + 1:
            self.record(leased, version)
        if self.checkpoint > checkpoint:
            self.take()
        if self.chance.random() < self.queue_deaths:
            self.happened["queue died"] += 1
            self.broker.restart(Broker(cursor(self.rows), self.settings))

    def record(self, leased, version: int) -> None:
        recorder = self.recorder
        snapshot = RunSnapshot("groups", 0.0, 0, self.required, {}, None)
        recorder.update_counts(self.broker.stats(), self.workers, snapshot)
        recorder.record_step(self.step, version, [step_report(version=version)], leased, step_s=1.0)
        ids = np.zeros(90, dtype=np.int32)
        excerpts = [Excerpt(f"{meta.group_id}/0", "prompt", ids, ((0, 90, version),), 0.5, "stop") for meta in leased]
        recorder.samples.write(self.step, version, Samples(excerpts, {}))
        recorder.record_phase("update", 1.0, self.step)

    def take(self) -> None:
        """Take a checkpoint, and measure what is kept."""
        self.saved = self.recorder.state()
        self.recorder.evaluation(eval_results(0.5), self.version, self.step)
        self.recorder.checkpointed(self.step, 1.0)
        final = [prompt for prompt, step in self.trained.items() if step <= self.checkpoint]
        for prompt in final:
            del self.trained[prompt]
        self.forgotten += len(final)
        self.kept.append(
            Counter(
                queue_state=len(msgpack.packb(self.broker.state())),
                records=len(msgpack.packb(self.saved)),
                answers=len(self.broker.actor._answers),
                journal=self.broker.largest_journal,
            )
        )

    def rewind(self) -> None:
        self.recorder.rewind(self.checkpoint, self.saved)
        super().rewind()

    def sync_weights(self) -> None:
        super().sync_weights()
        self.recorder.sync(SyncRecord(policy_version=self.version, seconds=0.1, phases={"pause": 0.1}, canary=1e-6))


def container_bytes() -> int:
    """Return the bytes of all containers of this process: whatever is remembered is in one of them."""
    gc.collect()
    return sum(sys.getsizeof(found) for found in gc.get_objects())
