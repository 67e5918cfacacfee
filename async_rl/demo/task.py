"""The demo's task, which is to sort letters. Owns what a problem is, how long it is, and the two JSONL files.

``{"prompt": "hdbca>", "answer": "abcdh"}``: the response is the prompt's letters in alphabetical order. Answers can be
checked, take a model of two million parameters a minute of warm-up to half-learn, and are as long as the problem.

    python -m async_rl.demo.task OUT        writes OUT/train.jsonl and OUT/eval.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import random
import string
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

# Letters of a problem are log-normal: half have at most 16, one in ten more than 50, one in a hundred more than 130,
# so that a weight push always catches some in flight, while the mean, and with it the cost of a step, stays near 25.
MEDIAN_LETTERS = 16
SIGMA = 0.9
MIN_LETTERS, MAX_LETTERS = 7, 199
# With ">" behind the prompt, and with the end of sequence behind the response.
MAX_PROMPT_TOKENS = MAX_RESPONSE_TOKENS = MAX_LETTERS + 1

# More than any demo run consumes, so that no problem comes twice.
TRAIN_ROWS = 8192
EVAL_ROWS = 512
# Fixed, whatever the seed of the run: evaluations of different runs are over the same problems.
DATA_SEED = 20_240
WARMUP_SEED = DATA_SEED + 1


class Problem(NamedTuple):
    """One row of the datasets: letters and ">", and the same letters in order."""

    prompt: str
    answer: str


def problems(seed: int) -> Iterator[Problem]:
    """Yield problems without end, none of them twice."""
    rng = random.Random(seed)
    seen = set()
    while True:
        count = round(rng.lognormvariate(math.log(MEDIAN_LETTERS), SIGMA))
        letters = "".join(rng.choices(string.ascii_lowercase, k=min(max(count, MIN_LETTERS), MAX_LETTERS)))
        if letters not in seen:
            seen.add(letters)
            yield Problem(letters + ">", "".join(sorted(letters)))


def train_and_eval() -> tuple[list[Problem], list[Problem]]:
    """Return the two sets, which are disjoint because they are two stretches of one stream."""
    stream = problems(DATA_SEED)
    evaluation = list(islice(stream, EVAL_ROWS))
    return list(islice(stream, TRAIN_ROWS)), evaluation


def warmup_problems() -> Iterator[Problem]:
    """Yield problems to warm up on, which are in neither set: no answer that was taught is evaluated or trained on."""
    train, evaluation = train_and_eval()
    known = {*train, *evaluation}
    return (problem for problem in problems(WARMUP_SEED) if problem not in known)


def write_jsonl(path: Path, rows: list[Problem]) -> None:
    """Write one JSON object per problem and line to ``path``."""
    path.write_text("".join(json.dumps(problem._asdict()) + "\n" for problem in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's train.jsonl and eval.jsonl.")
    parser.add_argument("out", type=Path, help="folder to write them to; made if missing")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    train, evaluation = train_and_eval()
    write_jsonl(out / "train.jsonl", train)
    write_jsonl(out / "eval.jsonl", evaluation)


if __name__ == "__main__":
    main()
