"""What a session is at one moment, from which another one continues: references to what never changes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from async_rl.rollout.branches import Branch, SavedTurn, Turn
from async_rl.rollout.conversation import Canonical
from async_rl.rollout.partial import PartialRollout


@dataclass(frozen=True, slots=True)
class SavedBranch:
    """A branch; its fields are those of ``branches.Branch``."""

    partial: PartialRollout
    tools: str
    root_tokens: int
    history: tuple[Canonical, ...]
    turns: tuple[SavedTurn, ...]
    open: SavedTurn | None

    @classmethod
    def of(cls, branch: Branch) -> SavedBranch:
        """Return what is saved of a branch."""
        return cls(
            branch.partial,
            branch.tools,
            branch.root_tokens,
            branch.history,
            tuple(turn.saved() for turn in branch.turns),
            None if branch.open is None else branch.open.saved(),
        )

    def restored(self) -> Branch:
        """Return the branch with its turns."""
        branch = Branch(self.partial, self.tools, self.root_tokens, self.history)
        branch.turns = [_restored(turn, branch) for turn in self.turns]
        branch.open = None if self.open is None else _restored(self.open, branch)
        return branch


def _restored(saved: SavedTurn, branch: Branch) -> Turn:
    turn = Turn(branch, saved.how, None, None, saved.start, saved.stop, saved.messages, index=saved.index)
    turn.state = "open" if saved.index < 0 else "ended"
    return turn


@dataclass(frozen=True, slots=True)
class SavedSession:
    """The branches of a session, and what else it has counted."""

    branches: tuple[SavedBranch, ...] = ()
    made: int = 0
    calls: int = 0
    truncated: bool = False

    @property
    def turns(self) -> int:
        """Turns that have ended."""
        return sum(len(branch.turns) for branch in self.branches)

    @property
    def num_tokens(self) -> int:
        """Response tokens of all branches."""
        return sum(len(branch.partial.response_ids) for branch in self.branches)

    @property
    def under_way(self) -> Sequence[str]:
        """The trajectory ids of the branches in which a turn is being sampled."""
        return [branch.partial.trajectory_id for branch in self.branches if branch.open is not None]

    def with_partial(self, partial: PartialRollout) -> SavedSession:
        """Return the session after an engine call, which made ``partial`` of the branch of that id."""
        branches = (
            replace(branch, partial=partial) if branch.partial.trajectory_id == partial.trajectory_id else branch
            for branch in self.branches
        )
        return replace(self, branches=tuple(branches))
