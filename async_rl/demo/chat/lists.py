"""The chat demo's task, an instruction that can be checked: name so many things of a kind, on one line, with commas.

``{"prompt": [{"role": "user", "content": "Name three fruits, separated by commas, ..."}], "count": 3}``. Owns the
questions, their two sets, and the reward. The evaluation has kinds of things that no training prompt has.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from async_rl.types import Prompt

_COUNTS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
_QUESTIONS = (
    "Name {count} {kind}, separated by commas, on one line. Write nothing else.",
    "List {count} {kind} on one line, with commas between them, and nothing else.",
    "Give me {count} {kind} in one line, separated by commas.",
)
_KINDS = """
    fruits animals colors countries vegetables sports birds planets trees flowers languages metals desserts tools
    insects games shapes months herbs spices clouds fabrics dances hobbies holidays oceans islands deserts bridges
    museums composers painters scientists inventions furniture toys weapons emotions seasons gems
"""
_EVAL_KINDS = "cities rivers instruments drinks jobs fish mountains vehicles"
_SEED = 20_250
# Longer than that, and an item is a sentence.
_MOST_WORDS = 3

Row = dict[str, Any]


def train_and_eval() -> tuple[list[Row], list[Row]]:
    """Return the rows of the two sets, in an order that mixes kinds and counts."""
    rng = random.Random(_SEED)
    train, evaluation = ([_row(*each) for each in _every(kinds)] for kinds in (_KINDS, _EVAL_KINDS))
    rng.shuffle(train)
    rng.shuffle(evaluation)
    return train, evaluation


def _every(kinds: str) -> list[tuple[str, int, str]]:
    return [(question, count, kind) for question in _QUESTIONS for count in _COUNTS for kind in kinds.split()]


def _row(question: str, count: int, kind: str) -> Row:
    content = question.format(count=_COUNTS[count], kind=kind)
    return {"prompt": [{"role": "user", "content": content}], "count": count}


def write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    """Write one JSON object per row and line to ``path``."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def score(prompt: Prompt, response: str) -> float:
    """Return how well a response follows the instruction, from 0 to 1.

    That is how near the number of items is to the one asked for, times the share of good items: of a few words, each
    only once, and none that says a word of the question again.
    """
    count: int = prompt.fields["count"]
    question: str = prompt.fields["prompt"][-1]["content"]
    line = response.strip()
    if not line or "\n" in line:
        return 0.0
    asked = set(_words(question))
    items = [_words(item) for item in line.split(",")]
    good = {tuple(item) for item in items if 0 < len(item) <= _MOST_WORDS and not asked & set(item)}
    return max(0.0, 1 - abs(len(items) - count) / count) * len(good) / len(items)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())
