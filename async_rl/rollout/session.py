"""The session of one rollout: every turn of the policy, in the branch to which it belongs. Pure.

An agent sends its whole history with each request. What the policy has sampled of it is never turned into text and
back: a request is matched with the branches there are, and only what the agent has added becomes tokens. Then it

    extends a branch    what was said is its whole history
    forks               what was said is a part of one, or its end cannot be extended (``branches.How``)
    is a root           nothing of it was said here

Invariant 12: the tokens sent in a call are a prefix of the branch's tokens at its end, and each sampled token belongs
to one trajectory. So a request is first matched (``find``), then what it adds is rendered by the caller, and last, when
nothing can be refused any more, the session changes (``begin``). A turn that fails leaves no trace (``undo``).

Knows ``branches`` and ``conversation``; neither the engine nor how messages become tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from async_rl.data.messages import Message
from async_rl.errors import InvalidTrajectory, RefusalCode, RequestRefused
from async_rl.rollout.branches import Branch, How, Turn, joined, limited
from async_rl.rollout.conversation import Canonical, as_key, canonical
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.saved_session import SavedBranch, SavedSession
from async_rl.types import Int32Array, Trajectory

Start = Callable[[str, Int32Array, int], PartialRollout]
"""(trajectory id, prompt int32[P], most response tokens) -> a partial rollout that begins."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a rollout may use; None for no limit."""

    context_tokens: int
    """Tokens of one branch, prompt included: those that the engine has room for."""
    response_tokens: int
    """Tokens of one branch behind the prompt with which its conversation began."""
    sampled_tokens: int | None = None
    """Tokens that the policy samples in the whole rollout. Turns sampled at one time may exceed it."""
    turns: int | None = None
    """Turns of the policy in the whole rollout."""
    branches: int = 64
    """Branches. An agent that does not send back what was said makes one with each request."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a request belongs, before anything is changed for it."""

    how: How
    after: Turn | None
    """The turn that it follows; None for a root."""
    added: list[Message]
    """The messages whose tokens are missing: all for a root, else those behind the turn."""
    sent: tuple[Canonical, ...]
    """All messages of the request; empty where it has tokens."""
    tools: str
    asked: str | None
    """See ``Turn.asked``."""
    raw: bool = False
    """Whether the missing tokens follow as they stand; else they are what a template writes from a stop token on."""


class Session:
    """The branches of one attempt at a task."""

    def __init__(self, rollout_id: str, start: Start, limits: Limits) -> None:
        self.rollout_id = rollout_id
        self._start = start
        self._limits = limits
        self.branches: list[Branch] = []
        self.ways: Counter[How] = Counter()
        """How many turns came to their place how; without those that failed."""
        self.joined = 0
        """Requests that repeated one which was being answered, or had been answered last."""
        self.truncated = False
        """Whether a request was refused because a limit was reached."""
        self._closed = False
        self._made = 0  # branches ever made, those undone included: an id is never used again
        self._calls = 0
        self._ended = 0  # turns
        self._sampled = 0  # their tokens
        self._last: Turn | None = None  # of these

    @classmethod
    def restored(cls, rollout_id: str, start: Start, limits: Limits, saved: SavedSession) -> Session:
        """Return the session as it was when it was saved; a turn under way then is ``under_way``."""
        session = cls(rollout_id, start, limits)
        session.branches = [branch.restored() for branch in saved.branches]
        session.truncated, session._made, session._calls = saved.truncated, saved.made, saved.calls
        ended = [turn for branch in session.branches for turn in branch.turns]
        session._ended, session._sampled = len(ended), sum(turn.stop - turn.start for turn in ended)
        session._last = max(ended, key=lambda turn: turn.index, default=None)
        # The turns that have ended were counted where they did.
        session.ways.update(branch.open.how for branch in session.branches if branch.open is not None)
        return session

    def saved(self) -> SavedSession:
        """Return what ``restored`` makes the session of again."""
        branches = tuple(map(SavedBranch.of, self.branches))
        return SavedSession(branches, self._made, self._calls, self.truncated)

    def restart(self) -> None:
        """Undo all turns: the rollout begins again. Turns and branches are counted from 0, and calls continue."""
        for turn in [branch.open for branch in self.branches if branch.open is not None]:
            self.undo(turn)
        self.branches, self._last, self.truncated = [], None, False
        self._made = self._ended = self._sampled = 0

    # -- requests -----------------------------------------------------------------------------------------------

    def repeated(self, messages: Sequence[Message], tools: Any = None, more: Any = None) -> Turn | None:
        """Return the turn that an earlier request of the same content began, if its branch has none after it.

        For a request that its sender says, or a lost connection shows, to be a repetition: another one is a second
        sample. ``more`` is what else the request says.
        """
        sent, named, asked = tuple(map(canonical, messages)), _named(tools), _asked("messages", more)
        return self._repeated(asked, lambda turn: turn.branch.tools == named and _sent(turn) == sent)

    def repeated_tokens(self, token_ids: Int32Array, more: Any = None) -> Turn | None:
        """Return what ``repeated`` does for a request of tokens."""
        asked = _asked("tokens", more)
        return self._repeated(asked, lambda turn: np.array_equal(turn.branch.tokens[: turn.start], token_ids))

    def _repeated(self, asked: str, is_same: Callable[[Turn], bool]) -> Turn | None:
        last = [branch.open or branch.turns[-1] for branch in self.branches]
        found = next((turn for turn in reversed(last) if turn.asked == asked and is_same(turn)), None)
        self.joined += found is not None
        return found

    def find(self, messages: Sequence[Message], tools: Any = None, more: Any = None) -> Place:
        """Return where a request belongs; ``tools`` are the JSON schemas that it names. Changes nothing.

        Raises RequestRefused if there is nothing to answer.
        """
        sent, named, asked = tuple(map(canonical, messages)), _named(tools), _asked("messages", more)
        if not sent or sent[-1].role == "assistant":
            raise RequestRefused("invalid_request", "messages must end with one that the policy is to answer")
        matches = [turn for branch in self.branches if (turn := branch.matched(sent)) is not None]
        same_tools = [turn for turn in matches if turn.branch.tools == named]
        if not same_tools:
            how: How = "tools" if matches else "root" if self.branches else "first"
            return Place(how, None, list(messages), sent, named, asked)
        turn = max(same_tools, key=lambda turn: (turn.messages, _how(turn) == "extended"))
        return Place(_how(turn), turn, list(messages[turn.messages :]), sent, named, asked)

    def find_tokens(self, token_ids: Int32Array, more: Any = None) -> tuple[Place, Int32Array]:
        """Return where a request of tokens belongs, and those of them that are missing there. Changes nothing.

        ``more`` is what else the request says.
        """
        asked = _asked("tokens", more)
        matches = [turn for branch in self.branches if (turn := branch.matched_tokens(token_ids)) is not None]
        if not matches:
            return Place("root" if self.branches else "first", None, [], (), "", asked, raw=True), token_ids
        turn = max(matches, key=lambda turn: (turn.stop, _how(turn) == "extended"))
        return Place(_how(turn), turn, [], (), turn.branch.tools, asked, raw=True), token_ids[turn.stop :]

    def find_after(self, turn: Turn) -> Place:
        """Return where tokens belong that follow a turn as they stand. Changes nothing."""
        return Place(_how(turn), turn, [], (), turn.branch.tools, None, raw=True)

    def begin(self, place: Place, missing: Int32Array, max_tokens: int | None = None) -> Turn | None:
        """Begin a turn at ``place``, whose ``missing`` tokens have been made; it may have ``max_tokens``.

        Returns None where the place has been taken meanwhile, and is to be found again. Raises RequestRefused where a
        limit leaves no room; nothing has changed then.
        """
        how, after = place.how, place.after
        if max_tokens is not None and max_tokens < 1:
            raise RequestRefused("invalid_request", f"max_tokens is {max_tokens}; it must be at least 1")
        if after is None:
            prompt, root = missing, len(missing)
        else:
            if how == "extended" and _how(after) != "extended":
                return None
            before, root = after.branch.tokens[: after.stop], after.branch.root_tokens
            kept = before
            if not place.raw:
                kept, missing = joined(before, missing, after.branch.partial.stop_token_ids)
            if how == "extended" and not (len(missing) and len(kept) == len(before)):
                how = "stop_mismatch" if len(kept) < len(before) else "cut"
            prompt = np.concatenate([kept, missing])
        room = self._room(len(prompt), root, makes_branch=how != "extended")
        room = room if max_tokens is None else min(room, max_tokens)
        if how == "extended":
            assert after is not None
            branch = after.branch
            before_it = (branch.partial, branch.history)
            branch.partial = limited(branch.partial, len(missing) + room).append_turn(missing)
        else:
            name = self.rollout_id if self._made == 0 else f"{self.rollout_id}.{self._made}"
            branch, before_it = Branch(self._start(name, prompt.astype(np.int32), room), place.tools, root), None
            self._made += 1
            self.branches.append(branch)
        turn = Turn(branch, how, place.asked, before_it, start=len(prompt))
        branch.open = turn
        if not place.raw:
            branch.history = place.sent
        self.ways[how] += 1
        return turn

    def keep(self, turn: Turn, partial: PartialRollout) -> None:
        """Keep the state of a turn after an engine call; that of one which has failed meanwhile is nothing."""
        if turn.state == "open":
            turn.branch.partial = partial

    def end(self, turn: Turn, message: Message | None = None) -> None:
        """End a turn that is complete; ``message`` is what the agent gets of it, where it has sent messages."""
        branch = turn.branch
        if branch.open is not turn or not branch.partial.finished:
            raise InvalidTrajectory(f"trajectory {branch.partial.trajectory_id}: a turn ends that is not complete")
        if message is not None:
            branch.history = (*branch.history, canonical(message))
            turn.messages = len(branch.history)
        turn.stop, turn.message, turn.state, branch.open = len(branch), message, "ended", None
        turn.before = None  # it has a copy of all tokens and routed experts up to here
        branch.turns.append(turn)
        turn.index, self._ended = self._ended, self._ended + 1
        self._sampled += turn.stop - turn.start
        self._last = turn

    def undo(self, turn: Turn) -> None:
        """Undo a turn that has failed or was given up: its branch is as before, or gone if the turn had made it."""
        if turn.state != "open":
            return
        turn.state = "failed"
        self.ways[turn.how] -= 1
        if turn.before is None:
            self.branches.remove(turn.branch)
        else:
            turn.branch.partial, turn.branch.history = turn.before
            turn.branch.open = None

    def next_call(self, turn: Turn) -> str:
        """Return the id of the next engine call for a turn; no two of a session are equal."""
        self._calls += 1
        return f"{turn.branch.partial.trajectory_id}/{self._calls - 1}"

    # -- the end ------------------------------------------------------------------------------------------------

    @property
    def under_way(self) -> Turn | None:
        """The turn that is being sampled; of several the first."""
        return next((branch.open for branch in self.branches if branch.open is not None), None)

    @property
    def last(self) -> Turn | None:
        """The turn that ended last."""
        return self._last

    @property
    def turns(self) -> int:
        """Turns of the policy that have begun and not failed."""
        return sum(len(branch.turns) + (branch.open is not None) for branch in self.branches)

    @property
    def ended_turns(self) -> tuple[tuple[int, ...], ...]:
        """The indices of the turns that have ended, for each branch."""
        return tuple(tuple(turn.index for turn in branch.turns) for branch in self.branches)

    @property
    def sampled_tokens(self) -> int:
        """Tokens that the policy has sampled, those of turns under way included."""
        return self._sampled + sum(len(b) - b.open.start for b in self.branches if b.open is not None)

    @property
    def cut_off(self) -> bool:
        """Whether the turn that ended last was cut off by its limit."""
        return self._last is not None and self._last.finish_reason == "length"

    def close(self) -> None:
        """Undo the turns under way, and refuse further requests."""
        self._closed = True
        for turn in [branch.open for branch in self.branches if branch.open is not None]:
            self.undo(turn)

    def trajectories(self) -> tuple[Trajectory, ...]:
        """Close the session and return the trajectory of each branch. Raises InvalidTrajectory."""
        self.close()
        made = tuple(branch.trajectory() for branch in self.branches)
        if (found := sum(int(t.sampled.sum()) for t in made)) != self._sampled:
            raise InvalidTrajectory(
                f"rollout {self.rollout_id}: its turns have {self._sampled} sampled tokens, its trajectories {found} "
                "(invariant 12)"
            )
        return made

    def _room(self, context: int, root: int, *, makes_branch: bool) -> int:
        """Return how many tokens a turn may have behind ``context`` others. Raises RequestRefused for none."""
        limits = self._limits
        if self._closed:
            raise RequestRefused("rollout_budget_exceeded", "the rollout has ended")
        if makes_branch and len(self.branches) >= limits.branches:
            self._refuse(
                "rollout_budget_exceeded",
                f"the rollout has {limits.branches} branches; an agent has to send back what was said as it was said",
            )
        if limits.turns is not None and self.turns >= limits.turns:
            self._refuse("rollout_budget_exceeded", f"the rollout has had its {limits.turns} turns")
        left = min(limits.context_tokens - context, limits.response_tokens - (context - root))
        if left < 1:
            self._refuse(
                "context_length_exceeded",
                f"{context} tokens leave no room for another: a context may have {limits.context_tokens}, and a "
                f"response {limits.response_tokens}",
            )
        if limits.sampled_tokens is None:
            return left
        if (spare := limits.sampled_tokens - self.sampled_tokens) < 1:
            self._refuse("rollout_budget_exceeded", f"the rollout has sampled its {limits.sampled_tokens} tokens")
        return min(left, spare)

    def _refuse(self, code: RefusalCode, why: str) -> NoReturn:
        self.truncated = True
        raise RequestRefused(code, why)


def _sent(last: Turn) -> tuple[Canonical, ...]:
    """Return the messages of the request for the last turn of a branch."""
    history = last.branch.history
    return history[:-1] if last.state == "ended" else history


def _named(tools: Any) -> str:
    return as_key(tools) if tools else ""


def _asked(kind: str, more: Any) -> str:
    return f"{kind} {as_key(more)}"


def _how(after: Turn) -> How:
    return after.branch.why_fork(after) or "extended"
