"""Shows the demo's model what a call of the tool looks like: half of the demonstrations answer at once, half call it.

They call it with any letter: how far the tool had better sort, and whether it is worth its price, only the reward says.
"""

from __future__ import annotations

import random
import string
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from agent import CALL, tool

from async_rl.config.schema import RunConfig
from async_rl.demo import checkpoint, made, task, warmup
from async_rl.demo.task import Problem
from async_rl.demo.tokenizer import EOS_ID, TOKENS

MAX_LETTERS = 39
STEPS = 100
SEED = 20_240


def prepare(config: RunConfig) -> None:
    """Make the model and the data of the config where they are missing: half a minute on two cores, once."""
    recipe = made.recipe_of(Path(__file__).parent.glob("*.py"))
    made.make_inputs(config, recipe, model=_train_model, sets=_short, write=task.write_jsonl)


def called(problem: Problem, last: str) -> warmup.Sequence:
    """Return token ids of a problem that is solved after a call, and which of them to learn: what the policy says."""
    index = {token: i for i, token in enumerate(TOKENS)}
    ids, learned = [index[c] for c in problem.prompt], [False] * len(problem.prompt)
    for said, answer in ((last + CALL, tool(problem.prompt, last)), (problem.answer, "")):
        ids += [*(index[c] for c in said), EOS_ID, *(index[c] for c in answer)]
        learned += [True] * (len(said) + 1) + [False] * len(answer)
    return np.array(ids, dtype=np.int32), np.array(learned)


def batches() -> Iterator[list[warmup.Sequence]]:
    """Yield batches of demonstrations, without end."""
    stream = warmup.demonstrations()  # of which most say too much after the answer
    rng = random.Random(SEED)
    while True:
        problems = list(islice(stream, warmup.BATCH))
        letters = rng.choices(string.ascii_lowercase, k=len(problems))
        pairs = enumerate(zip(problems, letters, strict=True))
        yield [called(problem, last) if i % 2 else warmup.sequence(problem) for i, (problem, last) in pairs]


def _short() -> tuple[list[Problem], list[Problem]]:
    train, evaluation = ([p for p in rows if len(p.answer) <= MAX_LETTERS] for rows in task.train_and_eval())
    return train, evaluation


def _train_model(folder: Path) -> None:
    folder.mkdir()
    subprocess.run([sys.executable, __file__, folder], check=True)  # a process of its own: Megatron's state is global


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as shipped:
        checkpoint.unpack(Path(shipped))
        warmup.supervise(Path(shipped), Path(sys.argv[1]), batches(), target_loss=0.0, max_steps=STEPS)
