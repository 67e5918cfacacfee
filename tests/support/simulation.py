"""A fleet in virtual time: replicas that die, leave and come, a trainer and weight syncs around the real broker and
dataset cursor.

No clock, no process: events on a heap. ``Fleet.run`` raises AssertionError when an invariant breaks, or when nothing
can happen any more before the last step (a deadlock).
"""

import heapq
import itertools
import random
from collections import Counter, deque

import numpy as np

from async_rl.data.cursor import DatasetCursor
from async_rl.data.dataset import Dataset
from async_rl.data.prompts import Row
from async_rl.queue.broker import Broker
from async_rl.queue.broker_state import BrokerSettings
from async_rl.queue.records import GroupMeta
from async_rl.queue.staleness import window_limit

TOKENS = np.zeros(1, dtype=np.int32)


def cursor(rows: int, seed: int = 0, *, shuffle: bool = True) -> DatasetCursor:
    lines = tuple(Row(line, "", TOKENS, {}) for line in range(1, rows + 1))
    return DatasetCursor(Dataset("simulated", lines, (), "digest"), shuffle=shuffle, seed=seed)


class Fleet:
    """``replicas`` of ``capacity`` groups each, a trainer of ``required`` groups, a sync every ``trigger`` steps."""

    def __init__(
        self,
        *,
        replicas,
        capacity,
        required,
        trigger=1,
        threshold=0.5,
        max_staleness=4,
        on_stale="mask",
        max_groups=None,
        max_bytes=10**12,
        checkpoint_every=0,
        rows=10_000,
        seed=0,
        deaths=0.0,
        departures=0.0,
        trainer_deaths=0.0,
        never_finish=0.0,
        filtered=0.0,
    ) -> None:
        self.chance = random.Random(seed)
        self.required, self.trigger, self.max_staleness, self.on_stale = required, trigger, max_staleness, on_stale
        self.capacity, self.never_finish, self.filtered = capacity, never_finish, filtered
        self.deaths, self.departures, self.trainer_deaths = deaths, departures, trainer_deaths
        self.checkpoint_every, self.rows = checkpoint_every, rows
        self.limit = window_limit(required, threshold, trigger)
        settings = BrokerSettings(
            required_groups=required,
            window_limit=self.limit,
            max_staleness=max_staleness,
            on_stale=on_stale,
            max_bytes=max_bytes,
            max_groups=max_groups,
            max_attempts=3,
            can_rewind=checkpoint_every > 0,
        )
        self.broker = Broker(cursor(rows), settings)
        self.now, self.version, self.step, self.events, self.order = 0.0, 0, 0, [], itertools.count()
        self.since_sync, self.checkpoint = 0, 0
        self.idle = deque(range(replicas))  # replicas with room, which ask for more as soon as there is some
        self.is_idle = set(self.idle)
        self.room = dict.fromkeys(range(replicas), capacity)
        self.lives = dict.fromkeys(range(replicas), 0)
        self.full = deque()  # finished groups that wait for room in the queue
        self.training, self.busy = False, 0.0
        self.trained = {}  # prompt id: step
        self.forgotten = 0  # trained prompts that are not in it any more
        self.ages = Counter()
        self.happened = Counter()

    def run(self, steps: int) -> None:
        while self.step < steps:
            self.settle()
            assert self.events, f"deadlock at step {self.step}: {self.broker.stats()}"
            self.now, _, event, arguments = heapq.heappop(self.events)
            self.happened[event.__name__] += 1
            event(*arguments)
        self.check()

    def at(self, delay: float, event, *arguments) -> None:
        heapq.heappush(self.events, (self.now + delay, next(self.order), event, arguments))

    # What replicas and trainer do as soon as they can

    def settle(self) -> None:
        while self.full and self.publish(*self.full[0]):
            self.full.popleft()
        while self.idle and self.broker.free_slots:
            replica = self.idle.popleft()
            self.is_idle.discard(replica)
            share = -(-self.broker.free_slots // (len(self.idle) + 1))
            tickets = self.broker.issue(str(replica), min(self.room[replica], share))
            self.room[replica] -= len(tickets)
            for ticket in tickets:
                self.generate(replica, ticket)
            self.ask_again(replica)
        if not self.training and self.broker.can_lease(self.required, "trainer"):
            self.training = True
            leased = self.broker.lease(self.required, "trainer")
            seconds = self.chance.uniform(0.8, 1.2)
            self.busy += seconds
            self.at(seconds, self.train, leased)

    def ask_again(self, replica: int) -> None:
        if self.room[replica] and replica not in self.is_idle:
            self.idle.append(replica)
            self.is_idle.add(replica)

    def generate(self, replica: int, ticket) -> None:
        life = self.lives[replica]
        if self.chance.random() < self.never_finish:
            self.at(50.0, self.time_out, replica, life, ticket)
            return
        # Long-tailed, as responses are.
        self.at(self.chance.lognormvariate(0.0, 1.0), self.finish, replica, life, ticket, self.version)
        if self.chance.random() < self.deaths:
            self.at(self.chance.uniform(0, 1), self.die, replica, life)
        if self.chance.random() < self.departures:
            self.at(self.chance.uniform(0, 1), self.leave, replica, life)

    # Events

    def finish(self, replica: int, life: int, ticket, began: int) -> None:
        if self.lives[replica] != life:
            return
        if self.chance.random() < self.filtered:
            self.broker.filter_group(ticket.group_id, "zero_variance")
            self.room[replica] += 1
            self.ask_again(replica)
            return
        nbytes = int(1000 * (1 + self.version / 10) * self.chance.uniform(0.1, 2))  # responses grow as the run goes on
        meta = self.meta(ticket, nbytes, began)
        if not self.publish(replica, life, meta):
            self.full.append((replica, life, meta))

    def meta(self, ticket, nbytes: int, began: int) -> GroupMeta:
        return GroupMeta(ticket.group_id, 100, nbytes, began, self.version, 8, 0)

    def publish(self, replica: int, life: int, meta) -> bool:
        if self.lives[replica] != life:
            return True  # the replica died before it published the group
        if self.broker.full_for(meta.nbytes):
            return False
        self.broker.put(meta)
        self.room[replica] += 1
        self.ask_again(replica)
        return True

    def time_out(self, replica: int, life: int, ticket) -> None:
        if self.lives[replica] == life:
            self.broker.return_group(ticket.group_id, "timeout")
            self.room[replica] += 1
            self.ask_again(replica)

    def die(self, replica: int, life: int) -> None:
        if self.lives[replica] != life:
            return
        self.lives[replica] += 1
        self.broker.worker_lost(str(replica))
        self.room[replica] = 0
        self.at(20.0, self.come_back, replica)

    def leave(self, replica: int, life: int) -> None:
        """Lose a replica with its host. Another comes in a minute or in an hour."""
        if self.lives[replica] == life:
            self.lives[replica] += 1
            self.broker.worker_lost(str(replica))
            self.room[replica] = 0
            self.at(self.chance.lognormvariate(3.0, 2.0), self.come_back, replica)

    def come_back(self, replica: int) -> None:
        self.room[replica] = self.capacity
        self.ask_again(replica)

    def train(self, leased) -> None:
        oldest_allowed = self.version - self.max_staleness
        if self.chance.random() < self.trainer_deaths:
            self.broker.release([meta.group_id for meta in leased])
            self.rewind()
            return
        self.step += 1
        self.broker.ack([meta.group_id for meta in leased], self.step)
        for meta in leased:
            prompt = meta.group_id.rpartition(".")[0]
            assert prompt not in self.trained, f"prompt {prompt} was trained twice"
            self.trained[prompt] = self.step
            # Invariant 4: at least one token of a leased group may be trained; with drop, all of them.
            version = meta.oldest_version if self.on_stale == "drop" else meta.newest_version
            assert version >= oldest_allowed
            self.ages[self.version - meta.oldest_version] += 1
        self.since_sync += 1
        if self.checkpoint_every and self.step % self.checkpoint_every == 0:
            self.checkpoint = self.step
            self.broker.checkpointed(self.step)
        if self.since_sync == self.trigger:
            self.sync_weights()
        self.training = False
        if self.step % 16 == 0:
            self.check()

    def rewind(self) -> None:
        """Restart the trainer from its checkpoint."""
        for prompt in self.broker.rewind(self.checkpoint):
            del self.trained[prompt]
        self.step = self.checkpoint
        self.sync_weights()
        self.training = False

    def sync_weights(self) -> None:
        self.version += 1
        self.since_sync = 0
        self.broker.advance(self.version)

    def check(self) -> None:
        """Invariants 5 and 6."""
        stats = self.broker.stats()
        counts = stats.counts
        assert counts.add_up
        assert counts.trained == len(self.trained) + self.forgotten
        assert counts.outstanding <= stats.window_groups <= self.limit
        held = stats.queued_groups + stats.leased_groups
        assert held <= stats.max_groups
        assert stats.held_bytes <= stats.max_bytes or held <= self.required
        state = self.broker.state()
        outstanding = [fields[1] for fields in state["running"]]
        outstanding += [fields[1] for fields, _ in state["queued"] + state["leased"]]
        source = state["source"]
        everywhere = [*self.trained, *outstanding, *source["returned"], *source["deferred"]]
        assert len(set(everywhere)) == len(everywhere), "a prompt is in two places"
        passed = source["epoch"] * self.rows + source["index"]
        assert passed == len(everywhere) + self.forgotten + counts.failed + counts.filtered, "a prompt is nowhere"
