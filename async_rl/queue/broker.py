"""The life of every group, as a pure state machine. Owns who has what, what fits, and what is counted.

                 issue             put              lease              ack
    PromptSource ────► RUNNING ────► QUEUED ────────► LEASED ────────► TRAINED
         ▲                │             │  ◄─ release ─ │
         │                ▼             ▼               ▼
         └─────────── RETURNED (prompt back in circulation)   or FAILED (prompt given up), each with a reason

Invariant 5 holds between any two calls: issued = trained + outstanding + returned + failed, where outstanding
= running + queued + leased and the unit is one issue of one prompt. A *drop* is a return of a finished group,
one that was queued or leased: work was thrown away. A call that raises has changed nothing.

Invariant 4, as far as it is the queue's: a group over the hard bound leaves the queue at once, when it is
put, released, or when the version rises, so no such group can be leased. A lease held across ``advance`` is
not touched: whoever trains it masks by the version it trains under.

Invariant 6: queued and leased groups, whose payloads are kept alive, stay within ``max_groups`` and
``max_bytes``; what is outstanding stays within the window's limit. Nothing is remembered per finished prompt:
a put is accepted only of a group that is running, so a duplicate is refused without a list of the past. A
prompt in circulation again carries its attempt number until it is issued; the outcomes of the last few groups
are kept for error messages only. Where the trainer keeps checkpoints, the prompts trained since the oldest of them
are remembered too: ``rewind`` takes back what a trainer that goes on from a checkpoint has lost.

Every decision follows from the state and the arguments of the call. So the calls that were made, or ``state`` and the
calls since, rebuild a broker that was lost (``journal``).

Knows no Ray, no clock and no I/O, and of a group no more than its ``GroupMeta``.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any, Protocol

from async_rl.errors import ConfigError, DuplicateGroup, QueueError, UnknownGroup
from async_rl.metrics.records import GroupCounts
from async_rl.queue.records import GroupMeta, QueueStats, Ticket
from async_rl.queue.staleness import OnStale, free_slots, is_stale, oldest_allowed_version
from async_rl.types import Prompt

STALE = "stale"
WORKER_LOST = "worker_lost"
TIMEOUT = "timeout"
REWOUND = "rewound"
PAYLOAD_LOST = "payload_lost"


class PromptSource(Protocol):
    """The dataset cursor. Yields each prompt id once, and again only after it was given back."""

    def next(self) -> Prompt | None:
        """The next prompt, those given back first; None when there is none left."""
        ...

    def give_back(self, prompt: Prompt) -> None: ...

    def prompt(self, prompt_id: str) -> Prompt:
        """A prompt that was handed out."""
        ...

    def state(self) -> dict[str, Any]:
        """Where it stands, as plain data."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state``."""
        ...


@dataclass(slots=True)
class _Running:
    ticket: Ticket
    attempt: int
    worker: str


@dataclass(frozen=True, slots=True)
class _Held:
    """A finished group, queued or leased."""

    run: _Running
    meta: GroupMeta


@dataclass(frozen=True, slots=True)
class _Trained:
    """What ``rewind`` needs of a group that was trained."""

    step: int
    prompt: Prompt
    attempt: int


class Broker:
    """See the module's docstring. One instance per run; not thread-safe, and needs not be."""

    def __init__(
        self,
        source: PromptSource,
        *,
        required_groups: int,
        window_limit: int,
        max_staleness: int,
        on_stale: OnStale,
        max_bytes: int,
        max_groups: int | None = None,
        version: int = 0,
        max_attempts: int = 1,
        can_rewind: bool = False,
    ) -> None:
        """max_groups: by default window_limit, so that by itself it never makes a worker wait. max_attempts: issues of
        a prompt whose groups time out, before it is given up. can_rewind: remember what was trained, for ``rewind``.
        """
        self._source = source
        self._required = required_groups
        self._limit = window_limit
        self._max_staleness = max_staleness
        self._on_stale: OnStale = on_stale
        self._max_groups = window_limit if max_groups is None else max_groups
        self._max_bytes = max_bytes
        if self._max_groups < required_groups:
            raise ConfigError(
                f"queue.max_groups: {self._max_groups} is less than the {required_groups} of a training step"
            )
        self._version = version
        self._max_attempts = max_attempts
        self._can_rewind = can_rewind
        self._history: deque[_Trained] = deque()
        self._running: dict[str, _Running] = {}
        self._queued: dict[str, _Held] = {}  # in the order of completion
        self._leased: dict[str, _Held] = {}
        self._prompts: set[str] = set()  # of everything outstanding
        self._attempts: dict[str, int] = {}  # next attempt of prompts that are in circulation again
        self._exhausted = False
        self._held_bytes = 0
        self._step_is_open = False  # a step that leases its groups as they come has some, and waits for more
        self._issued = 0
        self._trained = 0
        self._trained_in_window = 0
        self._returned: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        # For messages: long enough to name the fate of whatever a worker may still believe to be running.
        self._outcomes: deque[tuple[str, str]] = deque(maxlen=2 * window_limit)

    # Rollout side

    def issue(self, worker: str, limit: int) -> list[Ticket]:
        """Up to ``limit`` tickets, as many as the budget and the dataset have; [] when there are none now."""
        room = min(limit, self.free_slots)
        prompts: list[Prompt] = []
        try:
            while len(prompts) < room:
                prompt = self._source.next()
                if prompt is None:
                    self._exhausted = True
                    break
                if prompt.prompt_id in self._prompts:
                    raise QueueError(f"prompt {prompt.prompt_id}: the dataset issued it while it is outstanding")
                prompts.append(prompt)
                self._prompts.add(prompt.prompt_id)
        except Exception:
            for prompt in prompts:
                self._prompts.remove(prompt.prompt_id)
                self._source.give_back(prompt)
            raise
        return [self._start(prompt, worker) for prompt in prompts]

    def check_put(self, meta: GroupMeta) -> None:
        """Raise what ``put`` would raise but for a lack of room, before anybody waits for room."""
        if meta.group_id in self._queued or meta.group_id in self._leased:
            raise DuplicateGroup(f"group {meta.group_id}: was put before, and is in the queue")
        if meta.group_id not in self._running:
            raise self._no_such(meta.group_id, "running")
        if not 0 < meta.nbytes <= self._max_bytes:
            raise QueueError(
                f"group {meta.group_id}: {meta.nbytes} bytes, and queue.max_bytes is {self._max_bytes}; "
                f"for a training step of {self._required} such groups set it to "
                f"{self._required * meta.nbytes} at least"
            )

    def full_for(self, nbytes: int) -> bool:
        """Whether a group of that size has to wait.

        Raises QueueError where waiting is in vain: fewer groups than a training step needs use up the bytes,
        so none will be leased, or not all that a step under way waits for, none acknowledged, and no room will appear.
        """
        held = len(self._queued) + len(self._leased)
        if self._held_bytes + nbytes <= self._max_bytes:
            return held >= self._max_groups
        if (self._step_is_open or not self._leased) and held < self._required:
            needed = math.ceil((self._held_bytes + nbytes) / (held + 1) * self._required)
            raise QueueError(
                f"queue.max_bytes: {self._max_bytes} is too small for the {self._required} groups of a "
                f"training step: {held} use {self._held_bytes} bytes, the next has {nbytes}; "
                f"set it to {needed} at least"
            )
        return True

    def put(self, meta: GroupMeta) -> bool:
        """RUNNING to QUEUED; straight to RETURNED, and False, where the group is over the hard bound already."""
        self.check_put(meta)
        if self.full_for(meta.nbytes):
            raise QueueError(f"group {meta.group_id}: the queue is full; wait while full_for({meta.nbytes})")
        held = _Held(self._running.pop(meta.group_id), meta)
        self._held_bytes += meta.nbytes
        self._queued[meta.group_id] = held
        return not self._drop_stale([held])

    def worker_lost(self, worker: str, keep: Collection[str] = ()) -> list[str]:
        """Return what ran on a worker that is gone, but for the groups to ``keep``, which somebody has as they stood.

        What it had finished is the queue's, and stays.
        """
        lost = [i for i, run in self._running.items() if run.worker == worker and i not in keep]
        for group_id in lost:
            self.return_group(group_id, WORKER_LOST)
        return lost

    def adopt(self, worker: str, group_ids: Iterable[str]) -> list[str]:
        """Groups in flight that ``worker`` goes on with; those of them that are still running, and are its own now."""
        adopted = [group_id for group_id in group_ids if group_id in self._running]
        for group_id in adopted:
            self._running[group_id].worker = worker
        return adopted

    # Training side

    def lease(self, n: int, consumer: str, at_least: int | None = None) -> list[GroupMeta] | None:
        """The n groups that were finished first; or so many as there are, but ``at_least`` (n by default); None while
        there are fewer."""
        if not self.can_lease(n, consumer, at_least):
            return None
        leased = [self._queued.pop(group_id) for group_id in list(self._queued)[:n]]
        self._leased.update((held.meta.group_id, held) for held in leased)
        self._step_is_open = len(self._leased) < self._required
        return [held.meta for held in leased]

    def can_lease(self, n: int, consumer: str, at_least: int | None = None) -> bool:
        """Whether ``lease`` would give something. Raises QueueError for more than the queue could ever hold."""
        if not 0 < n <= self._max_groups:
            raise QueueError(f"{consumer} asks for {n} groups at once, queue.max_groups is {self._max_groups}")
        return len(self._queued) >= (n if at_least is None else at_least)

    def ack(self, group_ids: Iterable[str], step: int = 0) -> None:
        """LEASED to TRAINED: training step ``step`` took a gradient, the payload can go."""
        ids = self._all_leased(group_ids)
        self._step_is_open = False
        for group_id in ids:
            run = self._end(group_id, "trained")
            self._trained += 1
            self._trained_in_window += 1
            if self._can_rewind:
                self._history.append(_Trained(step, run.ticket.prompt, run.attempt))

    def release(self, group_ids: Iterable[str]) -> list[str]:
        """LEASED back to the front of the queue, in the order they had; those of them that were dropped as stale."""
        ids = set(self._all_leased(group_ids))
        released = {i: held for i, held in self._leased.items() if i in ids}
        for group_id in released:
            del self._leased[group_id]
        self._queued = released | self._queued
        self._step_is_open = self._step_is_open and bool(self._leased)
        return self._drop_stale(released.values())

    def advance(self, version: int) -> list[str]:
        """A push is done: open the window of the new version, and drop what is over the hard bound now: those ids."""
        if version <= self._version:
            raise QueueError(f"version {version}: the queue is at {self._version}, and versions only rise")
        self._version = version
        self._trained_in_window = 0
        return self._drop_stale(self._queued.values())

    # A trainer that goes on from a checkpoint

    def checkpointed(self, oldest_step: int) -> None:
        """Nobody will go back beyond the checkpoint of ``oldest_step``: forget what was trained before."""
        while self._history and self._history[0].step <= oldest_step:
            self._history.popleft()

    def rewind(self, step: int) -> list[str]:
        """TRAINED to RETURNED for all that was trained after ``step``, whose gradients are lost; those prompts' ids.

        Raises QueueError for a step whose successors are not remembered.
        """
        if not self._can_rewind:
            raise QueueError("what was trained is not remembered, so nothing can be taken back; set checkpoint.every")
        lost = [trained for trained in self._history if trained.step > step]
        for trained in lost:
            self._attempts[trained.prompt.prompt_id] = trained.attempt + 1
            self._source.give_back(trained.prompt)
            self._returned[REWOUND] += 1
        self._trained -= len(lost)
        self._exhausted = self._exhausted and not lost
        self._history = deque(trained for trained in self._history if trained.step <= step)
        return [trained.prompt.prompt_id for trained in lost]

    # Both sides

    def return_group(self, group_id: str, reason: str) -> None:
        """Give the prompt back to the dataset; for a finished group that is a drop, and counted as one.

        A prompt that has timed out ``max_attempts`` times has failed.
        """
        running = self._running.get(group_id)
        if reason == TIMEOUT and running is not None and running.attempt + 1 >= self._max_attempts:
            self.fail(group_id, reason)
            return
        run = self._end(group_id, f"returned ({reason})")
        self._attempts[run.ticket.prompt.prompt_id] = run.attempt + 1
        self._source.give_back(run.ticket.prompt)
        self._exhausted = False
        self._returned[reason] += 1
        if running is None:
            self._dropped[reason] += 1

    def fail(self, group_id: str, reason: str) -> None:
        """Give the prompt up, counted by reason."""
        self._end(group_id, f"failed ({reason})")
        self._failed[reason] += 1

    # As plain data

    def state(self) -> dict[str, Any]:
        """All that the next decision depends on, in msgpack's types; for ``restore``."""

        def runs(running: Iterable[_Running]) -> list[Any]:
            return [
                [r.ticket.group_id, r.ticket.prompt.prompt_id, r.ticket.version, r.attempt, r.worker] for r in running
            ]

        def held(groups: Iterable[_Held]) -> list[Any]:
            return [[*runs([group.run]), list(astuple(group.meta))] for group in groups]

        return {
            "version": self._version,
            "running": runs(self._running.values()),
            "queued": held(self._queued.values()),
            "leased": held(self._leased.values()),
            "attempts": self._attempts,
            "exhausted": self._exhausted,
            "step_is_open": self._step_is_open,
            "issued": self._issued,
            "trained": self._trained,
            "trained_in_window": self._trained_in_window,
            "returned": dict(self._returned),
            "dropped": dict(self._dropped),
            "failed": dict(self._failed),
            "history": [[trained.step, trained.prompt.prompt_id, trained.attempt] for trained in self._history],
            "source": self._source.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become the broker whose ``state`` it was; settings are this one's own."""
        self._source.restore(state["source"])

        def run(fields: list[Any]) -> _Running:
            group_id, prompt_id, version, attempt, worker = fields
            return _Running(Ticket(group_id, self._source.prompt(prompt_id), version), attempt, worker)

        def held(groups: list[Any]) -> dict[str, _Held]:
            found = [_Held(run(fields), GroupMeta.from_fields(meta)) for fields, meta in groups]
            return {group.meta.group_id: group for group in found}

        self._version = state["version"]
        self._running = {running.ticket.group_id: running for running in map(run, state["running"])}
        self._queued, self._leased = held(state["queued"]), held(state["leased"])
        every = [*self._running.values(), *(group.run for group in [*self._queued.values(), *self._leased.values()])]
        self._prompts = {running.ticket.prompt.prompt_id for running in every}
        self._held_bytes = sum(group.meta.nbytes for group in [*self._queued.values(), *self._leased.values()])
        self._attempts = dict(state["attempts"])
        self._exhausted, self._step_is_open = state["exhausted"], state["step_is_open"]
        self._issued, self._trained = state["issued"], state["trained"]
        self._trained_in_window = state["trained_in_window"]
        self._returned, self._dropped = Counter(state["returned"]), Counter(state["dropped"])
        self._failed = Counter(state["failed"])
        history = (_Trained(step, self._source.prompt(p), attempt) for step, p, attempt in state["history"])
        self._history = deque(history)

    # Looking at it

    @property
    def version(self) -> int:
        """The policy version whose window is open."""
        return self._version

    def ticket(self, group_id: str) -> Ticket | None:
        """Of a group that is running; None of one that is not."""
        running = self._running.get(group_id)
        return None if running is None else running.ticket

    def leased_meta(self, group_id: str) -> GroupMeta | None:
        """Of a group that is leased; None of one that is not."""
        held = self._leased.get(group_id)
        return None if held is None else held.meta

    @property
    def free_slots(self) -> int:
        """Groups that the budget admits now."""
        return free_slots(self._limit, len(self._prompts), self._trained_in_window)

    @property
    def finished(self) -> bool:
        """The dataset is exhausted and nothing is outstanding whose prompt could come back."""
        return self._exhausted and not self._prompts

    def starved(self, n: int) -> bool:
        """The dataset is exhausted and n groups can no longer be leased. Those of a step that waits for more will not
        come back; others that are leased may."""
        leased = 0 if self._step_is_open else len(self._leased)
        return self._exhausted and len(self._running) + len(self._queued) + leased < n

    def counts(self) -> GroupCounts:
        return GroupCounts(
            issued=self._issued,
            trained=self._trained,
            outstanding=len(self._running) + len(self._queued) + len(self._leased),
            returned=self._returned.total(),
            failed=self._failed.total(),
            dropped=self._dropped.total(),
        )

    def stats(self) -> QueueStats:
        versions = [run.ticket.version for run in self._running.values()]
        versions += [held.meta.oldest_version for held in self._queued.values()]
        return QueueStats(
            version=self._version,
            window_limit=self._limit,
            window_groups=len(self._prompts) + self._trained_in_window,
            counts=self.counts(),
            queued_groups=len(self._queued),
            queued_bytes=sum(held.meta.nbytes for held in self._queued.values()),
            leased_groups=len(self._leased),
            held_bytes=self._held_bytes,
            max_groups=self._max_groups,
            max_bytes=self._max_bytes,
            running=self._running_by_worker(),
            oldest_version=min(versions, default=None),
            returned=dict(self._returned),
            dropped=dict(self._dropped),
            failed=dict(self._failed),
            refusal=self.refusal(),
            exhausted=self._exhausted,
        )

    def refusal(self) -> str | None:
        """Why no ticket can be issued now: who has the groups that fill the window."""
        if self.free_slots > 0:
            return "the dataset is exhausted" if self._exhausted else None
        parts = [f"{n} running on worker {worker}" for worker, n in sorted(self._running_by_worker().items())]
        for n, state in (
            (len(self._queued), "queued"),
            (len(self._leased), "leased"),
            (self._trained_in_window, "trained in it"),
        ):
            if n:
                parts.append(f"{n} {state}")
        count = len(self._prompts) + self._trained_in_window
        return f"budget full: {count} of {self._limit} groups of window {self._version}; {', '.join(parts)}"

    def _running_by_worker(self) -> dict[str, int]:
        return dict(Counter(run.worker for run in self._running.values()))

    def _start(self, prompt: Prompt, worker: str) -> Ticket:
        attempt = self._attempts.pop(prompt.prompt_id, 0)
        ticket = Ticket(f"{prompt.prompt_id}.{attempt}", prompt, self._version)
        self._running[ticket.group_id] = _Running(ticket, attempt, worker)
        self._issued += 1
        return ticket

    def _drop_stale(self, groups: Iterable[_Held]) -> list[str]:
        dropped = []
        oldest_allowed = oldest_allowed_version(self._version, self._max_staleness)
        for held in list(groups):
            meta = held.meta
            if is_stale(meta.oldest_version, meta.newest_version, oldest_allowed, self._on_stale):
                self.return_group(meta.group_id, STALE)
                dropped.append(meta.group_id)
        return dropped

    def _end(self, group_id: str, outcome: str) -> _Running:
        """Take an outstanding group off the books."""
        held = self._queued.pop(group_id, None) or self._leased.pop(group_id, None)
        run = held.run if held else self._running.pop(group_id, None)
        if run is None:
            raise self._no_such(group_id, "outstanding")
        if held:
            self._held_bytes -= held.meta.nbytes
        self._prompts.remove(run.ticket.prompt.prompt_id)
        self._outcomes.append((group_id, outcome))
        return run

    def _all_leased(self, group_ids: Iterable[str]) -> list[str]:
        ids = list(group_ids)
        for group_id in ids:
            if group_id not in self._leased:
                raise self._no_such(group_id, "leased")
        if len(set(ids)) < len(ids):
            raise UnknownGroup(f"groups {', '.join(ids)}: one is named twice")
        return ids

    def _no_such(self, group_id: str, wanted: str) -> QueueError:
        for past, outcome in self._outcomes:
            if past == group_id:
                kind = DuplicateGroup if outcome == "trained" and wanted == "running" else UnknownGroup
                return kind(f"group {group_id}: is not {wanted}, it was {outcome}")
        states: dict[str, Container[str]]
        states = {"running": self._running, "queued": self._queued, "leased": self._leased}
        state = next((name for name, ids in states.items() if group_id in ids), "unknown, or finished long ago")
        return UnknownGroup(f"group {group_id}: is not {wanted}, it is {state}")
