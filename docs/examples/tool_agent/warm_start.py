"""Shows the demo's model what a call of the tool looks like: half of the demonstrations answer at once, half call it.

A call has the problem's first letter, its first two, and so on up to all, each as often, and what the tool answers is
then given as the answer. Whether to call, and with how many letters, only the reward says.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from string import ascii_lowercase

import numpy as np
from agent import CALL, add

from async_rl.config.schema import RunConfig
from async_rl.demo import checkpoint, made, task, warmup
from async_rl.demo.task import Problem
from async_rl.demo.tokenizer import EOS_ID, TOKENS

MIN_LETTERS, MAX_LETTERS = 3, 5
STEPS, BATCH = 400, 64
SEED = 20_240


def prepare(config: RunConfig) -> None:
    """Make the model and the data of the config where they are missing: a minute or two on two cores, once."""
    recipe = made.recipe_of(Path(__file__).parent.glob("*.py"))
    made.make_inputs(config, recipe, model=_train_model, sets=_train_and_eval, write=task.write_jsonl)


def problems() -> Iterator[Problem]:
    """Yield problems without end, none of them twice: letters and ">", whose answer is their sum."""
    rng, seen = random.Random(SEED), set()
    while True:
        letters = "".join(rng.choices(ascii_lowercase, k=rng.randint(MIN_LETTERS, MAX_LETTERS)))
        if letters not in seen:
            seen.add(letters)
            yield Problem(letters + ">", add(letters))


def demonstrated(problem: Problem, rng: random.Random) -> list[str]:
    """Return what the policy and the tool say in turn: an answer alone, or a call, the tool's sum and the answer."""
    if rng.random() < 0.5:
        return [problem.answer]
    letters = problem.prompt[: rng.randrange(1, len(problem.prompt))]
    return [letters + CALL, add(letters) + ">", add(letters)]


def sequence(problem: Problem, turns: list[str]) -> warmup.Sequence:
    """Return the token ids of a problem and its turns, and which of them to learn: the policy's, not the tool's."""
    index = {token: i for i, token in enumerate(TOKENS)}
    ids, learned = [index[c] for c in problem.prompt], [False] * len(problem.prompt)
    for by_policy, text in zip(cycle((True, False)), turns, strict=False):
        said = [*(index[c] for c in text), *([EOS_ID] if by_policy else [])]
        ids += said
        learned += [by_policy] * len(said)
    return np.array(ids, dtype=np.int32), np.array(learned)


def batches() -> Iterator[list[warmup.Sequence]]:
    """Yield batches of demonstrations, without end, of problems that are in neither set."""
    rng = random.Random(SEED)
    stream = islice(problems(), task.EVAL_ROWS + task.TRAIN_ROWS, None)
    while True:
        yield [sequence(problem, demonstrated(problem, rng)) for problem in islice(stream, BATCH)]


def _train_and_eval() -> tuple[list[Problem], list[Problem]]:
    stream = problems()
    evaluation = list(islice(stream, task.EVAL_ROWS))
    return list(islice(stream, task.TRAIN_ROWS)), evaluation


def _train_model(folder: Path) -> None:
    folder.mkdir()
    subprocess.run([sys.executable, __file__, folder], check=True)  # a process of its own: Megatron's state is global


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as shipped:
        checkpoint.unpack(Path(shipped))
        warmup.supervise(Path(shipped), Path(sys.argv[1]), batches(), target_loss=0.0, max_steps=STEPS)
