"""A game with state: what the policy has sorted is kept, and it is asked for the rest."""

from __future__ import annotations

from typing import Any

from async_rl.rollout.environments.interface import Context, Step, Task

MAX_TURNS = 3


class SortInParts:
    """Letters are sorted in turns: those in place from the front are kept, the others asked for again."""

    def setup(self, task: Task, context: Context) -> None:
        """Begin with all letters; the policy is asked by the row's prompt."""
        del context  # it has the rollout's id, and a seed of its own
        self.left = task.text.removesuffix(">")
        self.total = len(self.left)
        self.turns = 0

    def step(self, message: dict[str, Any]) -> Step:
        """Keep what is in place, which is worth its share of the letters, less a tenth for each further turn."""
        said, wanted = message["content"].strip(), sorted(self.left)
        right = next((i for i, letter in enumerate(wanted) if said[i : i + 1] != letter), len(wanted))
        for letter in wanted[:right]:
            self.left = self.left.replace(letter, "", 1)
        self.turns += 1
        done = not self.left or self.turns == MAX_TURNS
        cost = 0.1 * (self.turns > 1)
        return Step(f",{self.left}>", reward=right / self.total - cost, done=done, metrics={"turns": self.turns})
