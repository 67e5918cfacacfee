"""Stand-ins for the dataset's cursor and finished groups in tests of the queue, and a small broker."""

import contextlib
import functools
from collections import deque

import numpy as np

from async_rl.queue.actor import begin
from async_rl.queue.broker import Broker
from async_rl.queue.broker_state import BrokerSettings
from async_rl.queue.journal import FileJournal
from async_rl.queue.records import GroupMeta
from async_rl.types import Prompt, RoutingSpec, Segment, Trajectory
from tests.support.groups import grouped


class Source:
    """A source of the prompts "0-1" to "0-<rows>", those given back first and the deferred ones last."""

    def __init__(self, rows=10**6):
        self.rows = rows
        self.row = 0
        self.circulating = deque()
        self.deferred = deque()

    def next(self):
        if self.circulating:
            return self.circulating.popleft()
        if self.row == self.rows:
            return self.deferred.popleft() if self.deferred else None
        self.row += 1
        return Prompt(f"0-{self.row}", self.row, "", np.array([1], dtype=np.int32))

    def give_back(self, prompt, *, defer=False):
        (self.deferred if defer else self.circulating).append(prompt)

    def prompt(self, prompt_id):
        row = int(prompt_id.partition("-")[2])
        return Prompt(prompt_id, row, "", np.array([1], dtype=np.int32))

    def usable(self, prompt_id):
        return True

    def state(self):
        circulating, deferred = ([p.prompt_id for p in prompts] for prompts in (self.circulating, self.deferred))
        return {"rows": self.rows, "row": self.row, "circulating": circulating, "deferred": deferred}

    def restore(self, state):
        self.rows, self.row = state["rows"], state["row"]
        self.circulating = deque(map(self.prompt, state["circulating"]))
        self.deferred = deque(map(self.prompt, state.get("deferred", ())))


def make_group(ticket, tokens=50, seed=0):
    """Return a group of one trajectory with routed experts, 384 bytes a token. The same seed gives the same content."""
    rng = np.random.default_rng(seed)
    spec = RoutingSpec(48, 8, 128)
    p = len(ticket.prompt.token_ids)
    trajectory = Trajectory(
        trajectory_id=f"{ticket.group_id}/0",
        prompt_ids=ticket.prompt.token_ids,
        response_ids=rng.integers(0, 100, tokens).astype(np.int32),
        logprobs=rng.normal(size=tokens).astype(np.float32),
        versions=np.full(tokens, ticket.version, dtype=np.int32),
        segments=(Segment(0, tokens, ticket.version),),
        finish_reason="stop",
        routed_experts=rng.integers(0, 128, (p + tokens - 1, 48, 8)).astype(np.uint8),
        routing_spec=spec,
    )
    return grouped(ticket.group_id, ticket.prompt, [trajectory])


def make_broker(source=None, version=0, **settings):
    defaults = {
        "required_groups": 2,
        "window_limit": 4,
        "max_staleness": 1,
        "on_stale": "mask",
        "max_bytes": 1000,
    }
    return Broker(source or Source(), BrokerSettings(**defaults | settings), version=version)


def begin_journal(path, broker, kind=FileJournal):
    """Begin the journal of a queue, as the driver does; return what opens it."""
    with contextlib.closing(FileJournal(path, create=True)) as journal:
        begin(journal, broker)
    return functools.partial(kind, path)


def meta(ticket, nbytes=10, oldest=None, newest=None):
    oldest = ticket.version if oldest is None else oldest
    newest = oldest if newest is None else newest
    return GroupMeta(ticket.group_id, 100, nbytes, oldest, newest, num_trajectories=8, num_partial=0)


def ids(leased):
    return [meta.group_id for meta in leased]
