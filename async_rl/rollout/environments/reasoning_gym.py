"""An environment of one or a few turns around reasoning-gym, whose ``score_answer`` says what an answer is worth.

    agent: {environment: async_rl.rollout.environments.reasoning_gym:ReasoningGym, arguments: {tag: answer}}

A row names its problem in the field ``reasoning_gym``: {"dataset", "config", "index"}, or with the entry itself
{"dataset", "config", "entry"}. Where reasoning-gym is installed, this writes rows:

    python -m async_rl.rollout.environments.reasoning_gym word_sorting --size 1000 --seed 1 --out rows.jsonl

Needs the package reasoning-gym in the interpreter that runs environments, and the standard library alone beside it.
See docs/how-to/reasoning-gym.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import enum
import functools
import importlib.metadata
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from async_rl.rollout.environments.instance import Failed
from async_rl.rollout.environments.interface import Context, Message, Step, Task

try:
    from reasoning_gym.factory import DATASETS, create_dataset
    from reasoning_gym.utils import extract_answer
except ImportError as error:
    raise Failed(
        f"problems of reasoning-gym need the package reasoning-gym: {error}; run {sys.executable} -m pip install "
        "reasoning-gym"
    ) from None

FIELD = "reasoning_gym"
"""The field of a row that names its problem."""

VERSION = importlib.metadata.version("reasoning-gym")

# Datasets that a host keeps, by name and config: some read a list of words when they are made.
_KEPT = 64


class ReasoningGym:
    """Asks the row's prompt, and again while the answer is not right and turns are left; the last score counts."""

    def __init__(self, turns: int = 1, again: str = "That is not right. Try again.", tag: str | None = None) -> None:
        """Take the arguments of ``rollout.agent.arguments``.

        turns: turns of the policy at most.
        again: what the policy gets after an answer that is not right.
        tag: the answer is what stands last between <tag> and </tag>; None for the whole turn.
        """
        self._turns, self._again, self._tag = turns, again, tag
        self._tried = 0
        self._score = 0.0

    def answer(self, text: str) -> str | None:
        """Return the answer that a turn gives, or None if it gives none; for subclasses to replace."""
        found: str | None = text.strip() if self._tag is None else extract_answer(text, self._tag)
        return found

    def setup(self, task: Task, context: Context) -> None:
        """Find the row's problem. Raises Failed, which says what is wrong with the row."""
        del context
        self.dataset, self.entry = problem(task.fields.get(FIELD))

    def step(self, message: Message) -> Step:
        """Score the answer; one that ``score_answer`` cannot read is worth nothing, and counted in ``unscored``."""
        self._tried += 1
        unscored = False
        try:
            self._score = float(self.dataset.score_answer(self.answer(str(message.get("content") or "")), self.entry))
        except Exception:  # noqa: BLE001 - some datasets fail at what no problem of theirs has as an answer
            self._score, unscored = 0.0, True
        done = self._score >= 1.0 or self._tried >= self._turns
        metrics = {"turns": self._tried, "solved": self._score >= 1.0, "unscored": unscored}
        return Step(
            "" if done else self._again, done=done, metrics={name: float(each) for name, each in metrics.items()}
        )

    def reward(self) -> float:
        """Return the score of the last answer; 0 without any."""
        return self._score


def problem(row: Any) -> tuple[Any, dict[str, Any]]:
    """Return the dataset and the entry that the field ``reasoning_gym`` of a row names. Raises Failed."""
    if not isinstance(row, Mapping) or "dataset" not in row or not ({"index", "entry"} & row.keys()):
        raise Failed(f"the row's field {FIELD} is {row!r:.80}; expected dataset, config, and index or entry")
    dataset = _made(str(row["dataset"]), json.dumps(row.get("config") or {}, sort_keys=True))
    if "entry" in row:
        return dataset, dict(row["entry"])
    if row.get("version", VERSION) != VERSION:
        raise Failed(
            f"the row was made with reasoning-gym {row['version']}, and {VERSION} may make another problem of it; make "
            f"the rows again, or install reasoning-gym=={row['version']}"
        )
    index = row["index"]
    if not isinstance(index, int) or not 0 <= index < len(dataset):
        raise Failed(f"the row's problem {index!r:.40} is none of the {len(dataset)} of its dataset {row['dataset']}")
    return dataset, dict(dataset[index])


def rows(dataset: str, config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for each problem of a dataset, with the question as ``prompt``; ``config`` has its seed and size.

    Raises Failed for a dataset or a config that reasoning-gym does not have.
    """
    if "seed" not in config:
        raise Failed("the config has no seed, without which the problems are others each time")
    made = _made(dataset, json.dumps(config, sort_keys=True))
    for index in range(len(made)):
        entry = made[index]
        named: dict[str, Any] = {"dataset": dataset, "config": dict(config)}
        if made[index]["question"] == entry["question"]:
            named |= {"index": index, "version": VERSION}
        else:  # A dataset that its seed does not decide, as list_functions.
            named["entry"] = entry
        yield {"prompt": entry["question"], "answer": entry["answer"], FIELD: named}


@functools.lru_cache(maxsize=_KEPT)
def _made(name: str, config: str) -> Any:
    """Return a dataset by its name and its config as JSON. Raises Failed."""
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.5)
        raise Failed(f"reasoning-gym has no dataset {name!r}" + (f"; near it are {', '.join(near)}" if near else ""))
    named = json.loads(config)
    for field in dataclasses.fields(DATASETS[name][1]):
        # What JSON has as text.
        if isinstance(field.default, enum.Enum) and isinstance(named.get(field.name), str):
            kind = type(field.default)
            try:
                named[field.name] = kind(named[field.name])
            except ValueError:
                known = ", ".join(str(each.value) for each in kind)
                raise Failed(
                    f"the config of {name} has {field.name} {named[field.name]!r}; known are {known}"
                ) from None
    try:
        return create_dataset(name, **named)
    except Exception as error:  # noqa: BLE001 - they check their fields in many ways
        raise Failed(f"the config of {name} is {config:.200}, which it refuses: {error!r:.200}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the rows of a dataset of reasoning-gym as JSONL.")
    parser.add_argument("dataset", help="its name, for example word_sorting")
    parser.add_argument("--size", type=int, default=1000, help="how many rows (1000)")
    parser.add_argument("--seed", type=int, default=1, help="which rows (1)")
    parser.add_argument("--config", type=json.loads, default={}, help="further fields of its config, as a JSON object")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    asked = parser.parse_args()
    try:
        made = [
            json.dumps(row) for row in rows(asked.dataset, {**asked.config, "size": asked.size, "seed": asked.seed})
        ]
    except Failed as failed:
        sys.exit(str(failed))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text("".join(f"{line}\n" for line in made), encoding="utf-8")


if __name__ == "__main__":
    main()
