"""reasoning-gym's word_sorting with words of one letter, which are what the demo's model can read and write.

PYTHONPATH=. .venv-environments/bin/python docs/examples/word_sorting/words.py .cache/word_sorting/train.jsonl
"""

from __future__ import annotations

import json
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from async_rl.rollout.environments.reasoning_gym import FIELD, ReasoningGym, problem, rows

# One problem in forty has letters alone, in ascending order; the others have digits, or ask for the other order.
CONFIG = {"min_words": 4, "max_words": 10, "min_word_length": 1, "max_word_length": 1, "transformation": "lowercase"}
SEED, PROBLEMS = 1, 60_000


class Letters(ReasoningGym):
    """Takes the letters of the response for the list of words that the problem asks for."""

    def answer(self, text: str) -> str | None:
        """Return the letters with commas; more of them than the problem has words are no answer."""
        letters = text.strip()
        return ", ".join(letters) if len(letters) <= self.entry["metadata"]["num_words"] else None


def train_rows() -> Iterator[dict[str, Any]]:
    """Yield the rows whose prompts have characters of the demo's alphabet alone."""
    for row in rows("word_sorting", {**CONFIG, "seed": SEED, "size": PROBLEMS}):
        _, entry = problem(row[FIELD])
        words = entry["metadata"]["transformed_words"]
        if entry["metadata"]["direction"] == "ascending" and set(words) <= set(string.ascii_lowercase):
            yield {**row, "prompt": "".join(words) + ">"}


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in train_rows()), encoding="utf-8")
