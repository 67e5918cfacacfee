"""What the broker knows: its settings, its state, the state as plain data, and the figures read from it.

``BrokerState`` owns the books of one run's groups and how they are saved and restored. It decides nothing: that is
``Broker``. Knows ``records`` and the budget's arithmetic in ``staleness``.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any, NotRequired, Protocol, TypedDict, cast

from async_rl.metrics.records import GroupCounts
from async_rl.queue.records import GroupMeta, QueueStats, Ticket
from async_rl.queue.staleness import OnStale, free_slots
from async_rl.types import Prompt

ROW = "row"
"""Why a group failed whose dataset row can no longer be used."""

RULES = 2
"""Version of the rules by which the broker decides. A journal must be replayed by those under which it was written.

1, that of release 0.1: a prompt that times out is given up by the number of its issues, whatever became of them, and
one whose groups go stale comes again at once, without end."""


class PromptSource(Protocol):
    """The dataset cursor, which yields each prompt id once, and again only after it was given back."""

    def next(self) -> Prompt | None:
        """Return the next prompt, those given back first; None when there is none left."""
        ...

    def give_back(self, prompt: Prompt, *, defer: bool = False) -> None:
        """Put a prompt back into circulation; with ``defer`` behind all new ones of the epoch."""
        ...

    def rest(self, prompt: Prompt, epochs: int) -> None:
        """Pass over the row of a prompt in so many epochs after its own."""
        ...

    def prompt(self, prompt_id: str) -> Prompt:
        """Return the prompt that was issued under this id."""
        ...

    def usable(self, prompt_id: str) -> bool:
        """Return whether this prompt can be issued; false if the settings of the dataset have changed since it was."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the position in the dataset as plain data."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the position that ``state`` returned."""
        ...


@dataclass(frozen=True, slots=True)
class BrokerSettings:
    """The settings of a run that the broker decides by."""

    required_groups: int
    """Groups that a training step consumes."""
    window_limit: int
    """Groups admitted per version window (``staleness.window_limit``)."""
    max_staleness: int
    """Hard bound: versions that a token may be older than the version that trains it."""
    on_stale: OnStale
    """Drop a group once one of its tokens is over the bound ("drop"), or once all are ("mask")."""
    max_bytes: int
    """Encoded bytes of queued and leased groups, where that is more than a training step's groups have."""
    max_groups: int | None = None
    """Queued and leased groups; None for window_limit, which by itself never makes a worker wait."""
    max_attempts: int = 1
    """Groups of a prompt that time out before the prompt is given up."""
    max_stale_drops: int = 8
    """Finished groups of a prompt that are dropped as stale before the prompt is given up.

    With ``on_stale`` "drop", a response that always outlives the bound would be sampled again and again. Where chance
    alone drops a third of all groups, one prompt in 6,000 loses as many."""
    can_rewind: bool = False
    """Remember which prompts were trained since the oldest checkpoint, for ``Broker.rewind``."""

    @property
    def group_capacity(self) -> int:
        """Groups that may be queued and leased at once."""
        return self.window_limit if self.max_groups is None else self.max_groups


@dataclass(frozen=True, slots=True)
class Attempts:
    """What became of a prompt's earlier groups, none of which was trained."""

    issued: int = 0
    """Number of them; part of the id of the next."""
    timed_out: int = 0
    stale: int = 0
    """Number of them that were dropped as stale when they were finished."""

    def and_one(self, *, timed_out: bool, stale: bool) -> Attempts:
        """Return the attempts including one more group that was not trained."""
        return Attempts(self.issued + 1, self.timed_out + timed_out, self.stale + stale)

    @classmethod
    def from_plain(cls, plain: int | list[int]) -> Attempts:
        """Build the record from its fields' values; release 0.1 has the first field alone."""
        return cls(plain) if isinstance(plain, int) else cls(*plain)


@dataclass(slots=True)
class Issue:
    """One issue of one prompt, from ``issue`` until its group is trained, returned, failed or filtered."""

    ticket: Ticket
    attempts: Attempts
    """What became of the prompt before this issue."""
    worker: str
    """The worker that generates the group, or generated it."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished group, queued or leased."""

    issue: Issue
    meta: GroupMeta


@dataclass(frozen=True, slots=True)
class Trained:
    """What ``rewind`` needs of a trained group."""

    step: int
    """The training step that took its gradient."""
    prompt: Prompt
    attempt: int


IssueFields = list[Any]
"""[group id, prompt id, version, the values of Attempts' fields, worker]"""
FinishedFields = list[Any]
"""[IssueFields, the values of GroupMeta's fields in order]"""


class PlainState(TypedDict):
    """A ``BrokerState`` in msgpack's types. Journals and checkpoints hold it, so its keys stay as they are."""

    rules: NotRequired[int]
    """``RULES`` of the broker that had this state; missing in those of release 0.1."""
    version: int
    running: list[IssueFields]
    """Groups in flight. The key dates from when they were called running."""
    queued: list[FinishedFields]
    leased: list[FinishedFields]
    attempts: dict[str, Any]
    """{prompt id: the values of Attempts' fields}."""
    exhausted: bool
    step_is_open: bool
    issued: int
    issued_by_source: NotRequired[dict[str, int]]
    trained: int
    trained_in_window: int
    returned: dict[str, int]
    dropped: dict[str, int]
    failed: dict[str, int]
    filtered: NotRequired[dict[str, int]]
    """Missing in states of release 0.1, which filtered nothing."""
    history: list[list[Any]]
    """[step, prompt id, attempt] of each trained group that ``rewind`` may return."""
    source: dict[str, Any]
    """The dataset cursor's state."""


@dataclass(slots=True)
class BrokerState:
    """All that the next decision depends on, apart from the settings and the dataset cursor."""

    rules: int = RULES
    version: int = 0
    """The policy version whose window is open."""
    in_flight: dict[str, Issue] = field(default_factory=dict)
    """{group id: issue} of the groups that workers generate."""
    queued: dict[str, Finished] = field(default_factory=dict)
    """{group id: group}, in the order of completion."""
    leased: dict[str, Finished] = field(default_factory=dict)
    """{group id: group} of the groups that the trainer has."""
    prompts: set[str] = field(default_factory=set)
    """Ids of all outstanding prompts: in flight, queued and leased."""
    held_bytes: int = 0
    """Encoded bytes of queued and leased groups."""
    attempts: dict[str, Attempts] = field(default_factory=dict)
    """{prompt id: what became of it} of the prompts that were returned and not issued since."""
    exhausted: bool = False
    """Whether the dataset had no prompt left when last asked."""
    step_is_open: bool = False
    """Whether a training step that leases groups one by one has some and waits for more."""
    issued: int = 0
    issued_by_source: Counter[str] = field(default_factory=Counter)
    """{source: groups} of data.sources; empty without them, and in states of release 0.2."""
    trained: int = 0
    trained_in_window: int = 0
    returned: Counter[str] = field(default_factory=Counter)
    """{reason: groups}, as ``dropped``, ``failed`` and ``filtered``."""
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)
    history: deque[Trained] = field(default_factory=deque)
    """Groups trained since the oldest checkpoint, in order; empty unless the broker can rewind."""

    def to_plain(self, source: PromptSource) -> PlainState:
        """Return the state with the dataset cursor's, for ``from_plain``."""

        def fields(issue: Issue) -> IssueFields:
            ticket = issue.ticket
            attempts = list(astuple(issue.attempts))
            return [ticket.group_id, ticket.prompt.prompt_id, ticket.version, attempts, issue.worker]

        def finished(groups: Iterable[Finished]) -> list[FinishedFields]:
            return [[fields(group.issue), group.meta.to_fields()] for group in groups]

        plain: PlainState = {
            "rules": self.rules,
            "version": self.version,
            "running": [fields(issue) for issue in self.in_flight.values()],
            "queued": finished(self.queued.values()),
            "leased": finished(self.leased.values()),
            "attempts": {prompt_id: list(astuple(attempts)) for prompt_id, attempts in self.attempts.items()},
            "exhausted": self.exhausted,
            "step_is_open": self.step_is_open,
            "issued": self.issued,
            "trained": self.trained,
            "trained_in_window": self.trained_in_window,
            "returned": dict(self.returned),
            "dropped": dict(self.dropped),
            "failed": dict(self.failed),
            "filtered": dict(self.filtered),
            "history": [[trained.step, trained.prompt.prompt_id, trained.attempt] for trained in self.history],
            "source": source.state(),
        }
        if self.issued_by_source:
            plain["issued_by_source"] = dict(self.issued_by_source)
        return plain

    @classmethod
    def from_plain(cls, plain: PlainState, source: PromptSource) -> BrokerState:
        """Rebuild the state that ``to_plain`` wrote, and restore ``source`` to the position saved with it.

        Outstanding prompts that are not usable any more are given up.
        """
        source.restore(plain["source"])
        plain, given_up = _usable(plain, source)

        def issue(fields: IssueFields) -> Issue:
            group_id, prompt_id, version, attempts, worker = fields
            return Issue(Ticket(group_id, source.prompt(prompt_id), version), Attempts.from_plain(attempts), worker)

        def finished(groups: list[FinishedFields]) -> dict[str, Finished]:
            found = [Finished(issue(fields), GroupMeta.from_fields(meta)) for fields, meta in groups]
            return {group.meta.group_id: group for group in found}

        in_flight = {found.ticket.group_id: found for found in map(issue, plain["running"])}
        queued, leased = finished(plain["queued"]), finished(plain["leased"])
        held = [*queued.values(), *leased.values()]
        return cls(
            rules=plain.get("rules", 1),
            version=plain["version"],
            in_flight=in_flight,
            queued=queued,
            leased=leased,
            prompts={i.ticket.prompt.prompt_id for i in [*in_flight.values(), *(group.issue for group in held)]},
            held_bytes=sum(group.meta.nbytes for group in held),
            attempts={prompt_id: Attempts.from_plain(plain) for prompt_id, plain in plain["attempts"].items()},
            exhausted=plain["exhausted"],
            step_is_open=plain["step_is_open"],
            issued=plain["issued"],
            issued_by_source=Counter(plain.get("issued_by_source", {})),
            trained=plain["trained"],
            trained_in_window=plain["trained_in_window"],
            returned=Counter(plain["returned"]),
            dropped=Counter(plain["dropped"]),
            failed=Counter(plain["failed"]) + Counter({ROW: given_up}),
            filtered=Counter(plain.get("filtered", {})),
            history=deque(Trained(step, source.prompt(p), attempt) for step, p, attempt in plain["history"]),
        )

    @property
    def window_groups(self) -> int:
        """How much of the window is taken: outstanding groups, and those trained since it opened."""
        return len(self.prompts) + self.trained_in_window

    def free_slots(self, settings: BrokerSettings) -> int:
        """Return the number of groups that the budget admits now."""
        return free_slots(settings.window_limit, len(self.prompts), self.trained_in_window)

    def in_flight_by_worker(self) -> dict[str, int]:
        """Return {worker: groups in flight}."""
        return dict(Counter(issue.worker for issue in self.in_flight.values()))

    def counts(self) -> GroupCounts:
        """Return the terms of invariant 5."""
        return GroupCounts(
            issued=self.issued,
            trained=self.trained,
            outstanding=len(self.in_flight) + len(self.queued) + len(self.leased),
            returned=self.returned.total(),
            failed=self.failed.total(),
            dropped=self.dropped.total(),
            filtered=self.filtered.total(),
        )

    def stats(self, settings: BrokerSettings) -> QueueStats:
        """Return the figures of this moment, for metrics and the watchdog."""
        versions = [issue.ticket.version for issue in self.in_flight.values()]
        versions += [group.meta.oldest_version for group in self.queued.values()]
        return QueueStats(
            version=self.version,
            window_limit=settings.window_limit,
            window_groups=self.window_groups,
            counts=self.counts(),
            queued_groups=len(self.queued),
            queued_bytes=sum(group.meta.nbytes for group in self.queued.values()),
            leased_groups=len(self.leased),
            held_bytes=self.held_bytes,
            max_groups=settings.group_capacity,
            max_bytes=settings.max_bytes,
            in_flight=self.in_flight_by_worker(),
            oldest_version=min(versions, default=None),
            returned=dict(self.returned),
            dropped=dict(self.dropped),
            failed=dict(self.failed),
            filtered=dict(self.filtered),
            issued_by_source=dict(self.issued_by_source),
            refusal=self.refusal(settings),
            exhausted=self.exhausted,
        )

    def starved(self, n: int) -> bool:
        """Return whether the dataset is exhausted and n groups can no longer be leased.

        Groups leased by a step that waits for more will not come back; other leased groups may.
        """
        leased = 0 if self.step_is_open else len(self.leased)
        return self.exhausted and len(self.in_flight) + len(self.queued) + leased < n

    def refusal(self, settings: BrokerSettings) -> str | None:
        """Return why no ticket can be issued now, naming the holders of the window's groups; None if one can."""
        if self.free_slots(settings) > 0:
            return "the dataset is exhausted" if self.exhausted else None
        parts = [f"{n} in flight on worker {worker}" for worker, n in sorted(self.in_flight_by_worker().items())]
        for n, where in (
            (len(self.queued), "queued"),
            (len(self.leased), "leased"),
            (self.trained_in_window, "trained in it"),
        ):
            if n:
                parts.append(f"{n} {where}")
        return (
            f"budget full: {self.window_groups} of {settings.window_limit} groups of window {self.version}; "
            f"{', '.join(parts)}"
        )


def _usable(plain: PlainState, source: PromptSource) -> tuple[PlainState, int]:
    """Return ``plain`` without the groups whose prompts ``source`` cannot issue, and how many were outstanding."""

    def finished(groups: list[FinishedFields]) -> list[FinishedFields]:
        return [group for group in groups if source.usable(group[0][1])]

    running = [fields for fields in plain["running"] if source.usable(fields[1])]
    queued, leased = finished(plain["queued"]), finished(plain["leased"])
    before = len(plain["running"]) + len(plain["queued"]) + len(plain["leased"])
    # Trained groups stay so. Only a rewind to before the checkpoint that this is would want to issue them again.
    history = [trained for trained in plain["history"] if source.usable(trained[1])]
    changed = {"running": running, "queued": queued, "leased": leased, "history": history}
    return cast(PlainState, plain | changed), before - len(running) - len(queued) - len(leased)


def unusable_prompts(plain: PlainState, source: PromptSource) -> list[str]:
    """Return the prompts of a state, outstanding or waiting to come again, that ``source`` cannot issue any more."""
    ids = [fields[1] for fields in plain["running"]]
    ids += [fields[1] for fields, _ in [*plain["queued"], *plain["leased"]]]
    ids += [*plain["source"].get("returned", ()), *plain["source"].get("deferred", ())]
    return [prompt_id for prompt_id in ids if not source.usable(prompt_id)]
