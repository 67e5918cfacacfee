"""Which rollouts of agents may begin, so that engines are full and what open rollouts have cached stays cached. Pure.

    places     calls that the engine computes at one time; a rollout that waits for a tool makes none
    limit      rollouts in the making: those that make calls, and those that wait for a tool

A group is taken where there is a place that no call wants, and room for what its rollouts will cache. They then begin
one by one, each where there is a place that no call wants, so that rollouts which have turns go first. That is soon:
room in the cache takes whole rollouts to come, and what a rollout has sampled ages while it waits for others of its
group.

An engine takes the cached prefix of a rollout that waits for a tool for free, and gives its memory to whichever call
comes; the rollout's next turn then computes all of it again. So what open rollouts have in their contexts is counted
here, and of one that has little as much as others had in the mean of their calls: some grow while others end. Before
the first has ended nothing is known of that.

Time is given by the caller. Knows what an engine reports; neither engine nor queue.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from async_rl.rollout.engine.interface import EngineLoad

# For so long a rollout that has made no call yet is taken to be about to, and has a place. Agents ask within
# milliseconds; one that sets up a sandbox first leaves its place to others until it asks.
FIRST_CALL_S = 5.0

# Above the bound of KV use no group is taken before the use is below this share of the bound: what an engine reports
# goes up and down with every call.
_OPEN_BELOW = 0.9

# Weight of a rollout that ends in the size that is expected of the others.
_WEIGHT = 1 / 8


@dataclass(slots=True)
class _Rollout:
    """A rollout in the making."""

    group: str
    calls: set[str] = field(default_factory=set)
    """Trajectories whose next token is wanted of the engine."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens by trajectory, without those that it shares with another one."""
    size: int = 0
    """Their sum."""
    sizes: int = 0
    """The sum of what that was after each call."""
    ended_calls: int = 0


class Admission:
    """The rollouts that one replica has in the making, and how many more may begin."""

    def __init__(self, places: int, limit: int, n: int, max_kv_use: float | None) -> None:
        """Take the limits, the rollouts of a group, and the share of the KV cache that may be used; None for any."""
        self._places, self._limit, self._n, self._max_kv_use = places, limit, n, max_kv_use
        self._coming: dict[str, int] = {}  # by group, its rollouts that have not begun
        self._open: dict[str, _Rollout] = {}
        self._silent: dict[str, float] = {}  # those without a call since they began, longest ago first
        self._cached = 0.0  # tokens that open rollouts have, or are expected to
        self._prompts: dict[str, int] = {}  # by group, tokens that its rollouts begin with, and share
        self._calls = 0
        self._load: EngineLoad | None = None
        self._expected = 0.0  # size of a rollout, in the mean of its calls
        self._above = False  # the bound of KV use

    # -- what happens -------------------------------------------------------------------------------------------

    def report(self, load: EngineLoad) -> None:
        """Take what the engine reports of itself."""
        self._load = load

    def begin_group(self, group_id: str) -> None:
        """Count a group that was taken, whose rollouts are to begin."""
        self._coming[group_id] = self._n

    def end_group(self, group_id: str) -> None:
        """Count a group no longer; its rollouts that have not begun will not."""
        self._coming.pop(group_id, None)

    def is_made(self, group_id: str) -> None:
        """Count a rollout of a group that has ended already, in another worker."""
        self._coming[group_id] -= 1

    def begin(self, rollout_id: str, group_id: str, now: float) -> None:
        """Count a rollout that begins."""
        self._coming[group_id] -= 1
        self._open[rollout_id] = _Rollout(group_id)
        self._silent[rollout_id] = now
        self._cached += self._expected

    # Agents may leave calls running: those of a rollout that has ended count for nothing.

    def call(self, rollout_id: str, trajectory_id: str) -> None:
        """Count a trajectory that wants the engine, and keeps its place there while interruptions cut its turn."""
        if (rollout := self._open.get(rollout_id)) is not None:
            self._silent.pop(rollout_id, None)
            self._calls += trajectory_id not in rollout.calls
            rollout.calls.add(trajectory_id)

    def answered(self, rollout_id: str, trajectory_id: str) -> None:
        """Count a trajectory whose turn has ended, or has failed."""
        if (rollout := self._open.get(rollout_id)) is not None:
            self._calls -= trajectory_id in rollout.calls
            rollout.calls.discard(trajectory_id)

    def holds(self, rollout_id: str, trajectory_id: str, tokens: int) -> None:
        """Note how many tokens a trajectory has, without those that another one has as well."""
        if (rollout := self._open.get(rollout_id)) is not None:
            before = max(rollout.size, self._expected)
            rollout.size += tokens - rollout.tokens.get(trajectory_id, 0)
            rollout.tokens[trajectory_id] = tokens
            rollout.sizes += rollout.size
            rollout.ended_calls += 1
            self._cached += max(rollout.size, self._expected) - before

    def shares(self, rollout_id: str, prompt: int) -> None:
        """Note how many tokens a rollout begins with, which are cached once for all of its group."""
        if (rollout := self._open.get(rollout_id)) is not None:
            self._prompts[rollout.group] = max(prompt, self._prompts.get(rollout.group, 0))

    def end(self, rollout_id: str) -> None:
        """Count a rollout no longer."""
        rollout = self._open.pop(rollout_id)
        self._silent.pop(rollout_id, None)
        self._calls -= len(rollout.calls)
        if not any(other.group == rollout.group for other in self._open.values()):
            self._prompts.pop(rollout.group, None)
        if rollout.ended_calls:
            mean = rollout.sizes / rollout.ended_calls
            self._expected += (mean - self._expected) * (_WEIGHT if self._expected else 1.0)
        self._cached = sum(max(other.size, self._expected) for other in self._open.values())

    # -- what may happen ----------------------------------------------------------------------------------------

    @property
    def open(self) -> int:
        """Rollouts in the making."""
        return len(self._open)

    def all_begun(self, group_id: str) -> bool:
        """Return whether all rollouts of a group have begun."""
        return not self._coming.get(group_id)

    @property
    def kv_use(self) -> float:
        """Share of the KV cache that open rollouts have, or are expected to; of its calls, where that is more.

        It may be above 1. 0 where the engine does not report.
        """
        if self._load is None:
            return 0.0
        of_calls = self._load.kv_use if self._calls else 0.0  # else it is of calls that have ended
        return max(of_calls, self._committed / self._load.kv_tokens if self._load.kv_tokens else 0.0)

    @property
    def _committed(self) -> float:
        """Tokens that rollouts in the making and those to come have cached, or are expected to have."""
        return self._cached + sum(self._coming.values()) * self._expected + sum(self._prompts.values())

    def room(self, now: float) -> int:
        """Return how many rollouts of groups that were taken may begin now.

        At least one where none is open, whatever the engine reports.
        """
        while self._silent and now - next(iter(self._silent.values())) >= FIRST_CALL_S:
            del self._silent[next(iter(self._silent))]
        free = max(0, min(self._limit - len(self._open), self._places - self._calls - len(self._silent)))
        waits = self._calls > 0 and self._load is not None and self._load.waiting > 0
        return 0 if waits else free

    def groups(self, now: float) -> int:
        """Return how many groups may be taken now, counting one whose rollouts cannot all begin at once.

        At least one where there is no other, whatever the engine reports.
        """
        if any(self._coming.values()):
            return 0
        wanted = -(-self.room(now) // self._n)
        return wanted if not wanted else max(0 if self._open else 1, min(wanted, self._cached_groups()))

    def _cached_groups(self) -> int:
        """Return for how many groups there is room in the KV cache."""
        if self._max_kv_use is None or self._load is None:
            return self._limit
        use = self.kv_use
        self._above = use >= self._max_kv_use * (_OPEN_BELOW if self._above else 1.0)
        if self._above:
            return 0
        each = self._n * self._expected / self._load.kv_tokens if self._load.kv_tokens else 0.0
        return int((self._max_kv_use - use) / each) if each else self._limit
