"""The life of every group, as a pure state machine that decides who has what, what fits, and what is counted.

                 issue              put              lease              ack
    PromptSource ────► IN FLIGHT ────► QUEUED ────────► LEASED ────────► TRAINED
         ▲                 │             │  ◄─ release ─ │
         │                 ▼             ▼               ▼
         └──────────── RETURNED (prompt back in circulation)   or FAILED (prompt given up), each with a reason

A group in flight may also end as FILTERED, with a reason, because its rewards teach nothing (rollout.filter). Its
prompt is done for this epoch, as a trained one is, and its place in the window is free.

Invariant 5 holds between any two calls: issued = trained + outstanding + returned + failed + filtered, where
outstanding = in flight + queued + leased and the unit is one issue of one prompt. A *drop* is a return of a finished
group, one that was queued or leased: work was thrown away. A call that raises has changed nothing.

The queue's part of invariant 4: a group over the hard bound leaves the queue at once, when it is put, released, or
when the version rises, so no such group can be leased. A lease held across ``advance`` is not touched: the trainer
masks its tokens by the version that it trains under.

Invariant 6: queued and leased groups, whose payloads are kept alive, stay within ``max_groups``. Their bytes stay
within ``max_bytes`` or those of one training step's groups, whichever is more: a step that does not fit would never
be trained, and no room would come. The size of a group is bounded by the limits of prompts and responses. So where
these grow, the queue holds fewer groups ahead, down to one step, and the run goes on. Outstanding groups stay within
the window's limit. Nothing is remembered per finished prompt: ``put`` accepts only a group that is in flight, so a
duplicate is refused without a list of the past. A prompt in circulation again carries what became of its groups until
it is trained. The outcomes of the last few groups are kept for error messages only. Where the trainer keeps
checkpoints, the prompts trained since the oldest of them are remembered too: ``rewind`` returns those whose gradients
were lost with the trainer's process.

Every decision follows from the state and the arguments of the call. So the calls that were made, or ``state`` and the
calls since, rebuild a broker that was lost (``journal``).

Knows no Ray, no clock and no I/O, and of a group no more than its ``GroupMeta``. Its books are in ``broker_state``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Container, Iterable

from async_rl.errors import ConfigError, DuplicateGroup, QueueError, UnknownGroup
from async_rl.metrics.records import GroupCounts
from async_rl.queue.broker_state import (
    RULES,
    Attempts,
    BrokerSettings,
    BrokerState,
    Finished,
    Issue,
    PlainState,
    PromptSource,
    Trained,
)
from async_rl.queue.records import GroupMeta, QueueStats, Ticket
from async_rl.queue.staleness import is_stale, oldest_allowed_version
from async_rl.types import Prompt, source_of

STALE = "stale"
WORKER_LOST = "worker_lost"
TIMEOUT = "timeout"
REWOUND = "rewound"
PAYLOAD_LOST = "payload_lost"


class Broker:
    """The decisions about one run's groups. Not thread-safe: the queue's actor calls it from one thread."""

    def __init__(self, source: PromptSource, settings: BrokerSettings, *, version: int = 0) -> None:
        """Start with nothing outstanding. Raises ConfigError when the queue cannot hold a training step."""
        if settings.group_capacity < settings.required_groups:
            raise ConfigError(
                f"queue.max_groups is {settings.group_capacity}, less than the {settings.required_groups} groups of a "
                f"training step; set it to at least {settings.required_groups}"
            )
        self._source = source
        self._settings = settings
        self._state = BrokerState(version=version)
        # For messages: long enough to name the fate of any group that a worker may still believe to be in flight.
        self._outcomes: deque[tuple[str, str]] = deque(maxlen=2 * settings.window_limit)

    # Rollout side

    def issue(self, worker: str, limit: int) -> list[Ticket]:
        """Issue up to ``limit`` tickets, as many as the budget and the dataset have; [] when there are none now."""
        room = min(limit, self.free_slots)
        prompts: list[Prompt] = []
        try:
            while len(prompts) < room:
                prompt = self._source.next()
                if prompt is None:
                    self._state.exhausted = True
                    break
                if prompt.prompt_id in self._state.prompts:
                    raise QueueError(f"prompt {prompt.prompt_id}: the dataset issued it while it is outstanding")
                prompts.append(prompt)
                self._state.prompts.add(prompt.prompt_id)
        except Exception:
            for prompt in prompts:
                self._state.prompts.remove(prompt.prompt_id)
                self._source.give_back(prompt)
            raise
        return [self._start(prompt, worker) for prompt in prompts]

    def check_put(self, meta: GroupMeta) -> None:
        """Raise what ``put`` would raise for any reason but a lack of room, so that no caller waits in vain."""
        state = self._state
        if meta.group_id in state.queued or meta.group_id in state.leased:
            raise DuplicateGroup(f"group {meta.group_id}: was put before, and is in the queue")
        if meta.group_id not in state.in_flight:
            raise self._wrong_state(meta.group_id, "in flight")
        if meta.nbytes <= 0:
            raise QueueError(f"group {meta.group_id}: its message has {meta.nbytes} bytes")

    def full_for(self, nbytes: int) -> bool:
        """Return whether a group of that size has to wait. As many groups as a training step needs never wait."""
        state, settings = self._state, self._settings
        held = len(state.queued) + len(state.leased)
        if held < settings.required_groups:
            return False
        return held >= settings.group_capacity or state.held_bytes + nbytes > settings.max_bytes

    def put(self, meta: GroupMeta) -> bool:
        """Move a group from IN FLIGHT to QUEUED; return False if it was over the hard bound, and was RETURNED."""
        self.check_put(meta)
        if self.full_for(meta.nbytes):
            raise QueueError(f"group {meta.group_id}: the queue is full; wait while full_for({meta.nbytes})")
        group = Finished(self._state.in_flight.pop(meta.group_id), meta)
        self._state.held_bytes += meta.nbytes
        self._state.queued[meta.group_id] = group
        return not self._drop_stale([group])

    def worker_lost(self, worker: str, keep: Collection[str] = ()) -> list[str]:
        """Return the groups in flight on a lost worker, except those to ``keep``, whose progress was saved.

        Groups that it had finished belong to the queue, and stay.
        """
        lost = [i for i, issue in self._state.in_flight.items() if issue.worker == worker and i not in keep]
        for group_id in lost:
            self.return_group(group_id, WORKER_LOST)
        return lost

    def adopt(self, worker: str, group_ids: Iterable[str]) -> list[str]:
        """Give groups in flight to ``worker``, which resumes them; return the ids of those still in flight."""
        in_flight = self._state.in_flight
        adopted = [group_id for group_id in group_ids if group_id in in_flight]
        for group_id in adopted:
            in_flight[group_id].worker = worker
        return adopted

    # Training side

    def lease(self, n: int, consumer: str, at_least: int | None = None) -> list[GroupMeta] | None:
        """Lease the first n groups that finished; None while fewer than ``at_least`` (n by default) are queued."""
        if not self.can_lease(n, consumer, at_least):
            return None
        state = self._state
        leased = [state.queued.pop(group_id) for group_id in list(state.queued)[:n]]
        state.leased.update((group.meta.group_id, group) for group in leased)
        state.step_is_open = len(state.leased) < self._settings.required_groups
        return [group.meta for group in leased]

    def can_lease(self, n: int, consumer: str, at_least: int | None = None) -> bool:
        """Return whether ``lease`` would give groups. Raises QueueError for more than the queue could ever hold."""
        if not 0 < n <= self._settings.group_capacity:
            raise QueueError(
                f"{consumer} asks for {n} groups at once, queue.max_groups is {self._settings.group_capacity}"
            )
        return len(self._state.queued) >= (n if at_least is None else at_least)

    def ack(self, group_ids: Iterable[str], step: int = 0) -> None:
        """Move groups from LEASED to TRAINED: training step ``step`` took their gradients, their payloads can go."""
        state = self._state
        ids = self._all_leased(group_ids)
        state.step_is_open = False
        for group_id in ids:
            issue = self._end(group_id, "trained")
            state.trained += 1
            state.trained_in_window += 1
            if self._settings.can_rewind:
                state.history.append(Trained(step, issue.ticket.prompt, issue.attempts.issued))

    def release(self, group_ids: Iterable[str]) -> list[str]:
        """Move groups from LEASED to the front of the queue, in their order; return the ids dropped as stale."""
        state = self._state
        ids = set(self._all_leased(group_ids))
        released = {i: group for i, group in state.leased.items() if i in ids}
        for group_id in released:
            del state.leased[group_id]
        state.queued = released | state.queued
        state.step_is_open = state.step_is_open and bool(state.leased)
        return self._drop_stale(released.values())

    def advance(self, version: int) -> list[str]:
        """Open the window of a new version after a weight sync; drop groups now over the bound, return their ids."""
        state = self._state
        if version <= state.version:
            raise QueueError(f"version {version}: the queue is at {state.version}, and versions only rise")
        state.version = version
        state.trained_in_window = 0
        return self._drop_stale(state.queued.values())

    # A trainer that restarts from a checkpoint

    def checkpointed(self, oldest_step: int) -> None:
        """Forget what was trained up to ``oldest_step``, the oldest checkpoint that the trainer may rewind to."""
        history = self._state.history
        while history and history[0].step <= oldest_step:
            history.popleft()

    def rewind(self, step: int) -> list[str]:
        """Move all groups trained after ``step``, whose gradients are lost, to RETURNED; return their prompts' ids.

        Raises QueueError when trained groups are not remembered.
        """
        state = self._state
        if not self._settings.can_rewind:
            raise QueueError("trained groups are not remembered, so no step can be rewound; set checkpoint.every")
        lost = [trained for trained in state.history if trained.step > step]
        for trained in lost:
            state.attempts[trained.prompt.prompt_id] = Attempts(trained.attempt + 1)
            self._source.give_back(trained.prompt)
            state.returned[REWOUND] += 1
        state.trained -= len(lost)
        state.exhausted = state.exhausted and not lost
        state.history = deque(trained for trained in state.history if trained.step <= step)
        return [trained.prompt.prompt_id for trained in lost]

    # Both sides

    def return_group(self, group_id: str, reason: str) -> None:
        """Give the prompt back to the dataset; for a finished group that is counted as a drop.

        A prompt of which ``max_attempts`` groups timed out, or ``max_stale_drops`` went stale, fails instead. From its
        second stale drop on it comes again behind all others, so that a few such prompts do not fill the window.
        """
        state, settings = self._state, self._settings
        finished = group_id not in state.in_flight
        state.step_is_open = state.step_is_open or group_id in state.leased  # the step waits for another one
        earlier = self._outstanding(group_id).attempts
        attempts = earlier.and_one(timed_out=reason == TIMEOUT, stale=reason == STALE)
        timed_out, stale = attempts.timed_out, attempts.stale
        if state.rules == 1:
            timed_out, stale = attempts.issued, 0
        if (reason == TIMEOUT and timed_out >= settings.max_attempts) or (
            reason == STALE and stale >= settings.max_stale_drops
        ):
            self.fail(group_id, reason)
            return
        prompt = self._end(group_id, f"returned ({reason})").ticket.prompt
        state.attempts[prompt.prompt_id] = attempts
        self._source.give_back(prompt, defer=reason == STALE and stale > 1)
        state.exhausted = False
        state.returned[reason] += 1
        if finished:
            state.dropped[reason] += 1

    def fail(self, group_id: str, reason: str) -> None:
        """Give the prompt up, counted by reason."""
        self._end(group_id, f"failed ({reason})")
        self._state.failed[reason] += 1

    def filter_group(self, group_id: str, reason: str, rest_epochs: int = 0) -> None:
        """End a group in flight that would teach nothing, counted by reason. Its prompt does not come again.

        Its row does, after so many further epochs.
        """
        if group_id not in self._state.in_flight:
            raise self._wrong_state(group_id, "in flight")
        issue = self._end(group_id, f"filtered ({reason})")
        self._state.filtered[reason] += 1
        if rest_epochs:
            self._source.rest(issue.ticket.prompt, rest_epochs)

    # Reading and restoring the state

    def state(self) -> PlainState:
        """Return all that the next decision depends on, as plain data for ``restore``."""
        return self._state.to_plain(self._source)

    def restore(self, state: PlainState) -> None:
        """Replace the state by one that ``state`` returned; the settings stay this broker's own."""
        self._state = BrokerState.from_plain(state, self._source)

    def use_current_rules(self) -> bool:
        """Decide by the rules of this release from now on; return whether the state was under earlier ones."""
        earlier = self._state.rules != RULES
        self._state.rules = RULES
        return earlier

    def counts(self) -> GroupCounts:
        """Return the terms of invariant 5."""
        return self._state.counts()

    def stats(self) -> QueueStats:
        """Return the figures of this moment, for metrics and the watchdog."""
        return self._state.stats(self._settings)

    def refusal(self) -> str | None:
        """Return why no ticket can be issued now; None if one can."""
        return self._state.refusal(self._settings)

    @property
    def version(self) -> int:
        """The policy version whose window is open."""
        return self._state.version

    @property
    def free_slots(self) -> int:
        """The number of groups that the budget admits now."""
        return self._state.free_slots(self._settings)

    def ticket(self, group_id: str) -> Ticket | None:
        """Return the ticket of a group in flight; None for any other."""
        issue = self._state.in_flight.get(group_id)
        return None if issue is None else issue.ticket

    def leased_meta(self, group_id: str) -> GroupMeta | None:
        """Return the meta of a leased group; None for any other."""
        group = self._state.leased.get(group_id)
        return None if group is None else group.meta

    @property
    def finished(self) -> bool:
        """Whether the dataset is exhausted and nothing is outstanding whose prompt could come back."""
        return self._state.exhausted and not self._state.prompts

    def starved(self, n: int) -> bool:
        """Return whether the dataset is exhausted and n groups can no longer be leased."""
        return self._state.starved(n)

    def _start(self, prompt: Prompt, worker: str) -> Ticket:
        state = self._state
        attempts = state.attempts.pop(prompt.prompt_id, Attempts())
        ticket = Ticket(f"{prompt.prompt_id}.{attempts.issued}", prompt, state.version)
        state.in_flight[ticket.group_id] = Issue(ticket, attempts, worker)
        state.issued += 1
        if source := source_of(prompt.prompt_id):
            state.issued_by_source[source] += 1
        return ticket

    def _drop_stale(self, groups: Iterable[Finished]) -> list[str]:
        dropped = []
        oldest_allowed = oldest_allowed_version(self._state.version, self._settings.max_staleness)
        for group in list(groups):
            meta = group.meta
            if is_stale(meta.oldest_version, meta.newest_version, oldest_allowed, self._settings.on_stale):
                self.return_group(meta.group_id, STALE)
                dropped.append(meta.group_id)
        return dropped

    def _end(self, group_id: str, outcome: str) -> Issue:
        """Take an outstanding group off the books."""
        state, issue = self._state, self._outstanding(group_id)
        state.in_flight.pop(group_id, None)
        if group := state.queued.pop(group_id, None) or state.leased.pop(group_id, None):
            state.held_bytes -= group.meta.nbytes
        state.prompts.remove(issue.ticket.prompt.prompt_id)
        self._outcomes.append((group_id, outcome))
        return issue

    def _outstanding(self, group_id: str) -> Issue:
        state = self._state
        if group := state.queued.get(group_id) or state.leased.get(group_id):
            return group.issue
        if group_id not in state.in_flight:
            raise self._wrong_state(group_id, "outstanding")
        return state.in_flight[group_id]

    def _all_leased(self, group_ids: Iterable[str]) -> list[str]:
        ids = list(group_ids)
        for group_id in ids:
            if group_id not in self._state.leased:
                raise self._wrong_state(group_id, "leased")
        if len(set(ids)) < len(ids):
            raise UnknownGroup(f"duplicate group id in one call: {', '.join(ids)}")
        return ids

    def _wrong_state(self, group_id: str, wanted: str) -> QueueError:
        """Return the error for a group that is not in the ``wanted`` state, naming the state or outcome it has."""
        for past, outcome in self._outcomes:
            if past == group_id:
                kind = DuplicateGroup if outcome == "trained" and wanted == "in flight" else UnknownGroup
                return kind(f"group {group_id}: is not {wanted}, it was {outcome}")
        states: dict[str, Container[str]] = {
            "in flight": self._state.in_flight,
            "queued": self._state.queued,
            "leased": self._state.leased,
        }
        state = next((name for name, ids in states.items() if group_id in ids), "unknown, or finished long ago")
        return UnknownGroup(f"group {group_id}: is not {wanted}, it is {state}")
