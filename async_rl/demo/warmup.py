"""Builds the demo's model folder: tokenizer, random weights, and supervised steps through the run's own trainer.

    python -m async_rl.demo.warmup FOLDER

A process of its own, because Megatron's state is global. It ends when its standard input does. Knows ``config``, the
trainer, and the other modules of ``tiny`` but ``prepare``.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import structlog

from async_rl.config.schema import (
    DataSection,
    ModelSection,
    OptimizerSection,
    ResourcesSection,
    RolloutSection,
    RunConfig,
    TrainerSection,
)
from async_rl.demo.model import save_random_model
from async_rl.demo.task import MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS, Problem, warmup_problems
from async_rl.demo.tokenizer import EOS_ID, TOKENS, save_tokenizer
from async_rl.types import Int32Array

if TYPE_CHECKING:
    from async_rl.trainer.trainer import Trainer

log = structlog.get_logger(__name__)

MODEL_SEED = 20_240
# Where the warm-up stops, in nats per token: most letters are right by then, few responses are, so that groups have
# good and bad ones to learn from. A loss, not a number of steps, because learning to sort sets in suddenly.
TARGET_LOSS = 0.36
MAX_STEPS = 800
# Over how many steps the loss is averaged before it is compared; one step's is noisy by a tenth.
WINDOW = 10
# Short problems only: a token of them teaches as much as one of a long problem, and attention costs less.
MAX_LETTERS = 40
BATCH = 24
# Constant to the end: a decay would settle the weights in a sharp minimum, which the first noisy steps of reinforcement
# learning then leave again; the evaluation would fall before it rises.
LEARNING_RATE = 1e-3
LEARNING_RATE_STEPS = 20
LOG_EVERY = 50

Sequence = tuple[Int32Array, npt.NDArray[np.bool_]]


def sequence(problem: Problem) -> Sequence:
    """Token ids of prompt, answer and end [N], and which of them to learn: answer and end, bool[N]."""
    index = {token: i for i, token in enumerate(TOKENS)}
    ids = [*(index[character] for character in problem.prompt + problem.answer), EOS_ID]
    return np.array(ids, dtype=np.int32), np.arange(len(ids)) >= len(problem.prompt)


def demonstrations() -> Iterator[Problem]:
    """Short warm-up problems, two of three with an answer that does not end where it should, but goes all the way back.

    So the policy that comes out knows how to sort, but mostly says too much. Nothing in the demonstrations tells that
    this is wrong. Only the reward does: what reinforcement learning adds is there to see within a few dozen steps,
    whatever the seed, and responses grow shorter as it learns.
    """
    short = (problem for problem in warmup_problems() if len(problem.answer) <= MAX_LETTERS)
    for index, problem in enumerate(short):
        yield problem if index % 3 == 0 else Problem(problem.prompt, problem.answer + problem.answer[::-1])


def batches() -> Iterator[list[Sequence]]:
    """Batches of demonstrations, without end."""
    stream = demonstrations()
    while True:
        yield [sequence(next(stream)) for _ in range(BATCH)]


def build(folder: Path, *, max_steps: int = MAX_STEPS) -> int:
    """Write the warmed-up model to ``folder``, which exists and is empty. Returns the steps it took."""
    import torch

    from async_rl.trainer.trainer import Trainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    # Inside the folder, so that whoever cleans up after an interrupted build removes both at once.
    random_model = folder / "random"
    random_model.mkdir()
    save_tokenizer(random_model)
    save_random_model(random_model, MODEL_SEED)
    trainer = Trainer(_settings(random_model))
    try:
        steps = _warm_up(trainer, max_steps)
        trainer.save_hf(folder)
    finally:
        trainer.close()
    shutil.rmtree(random_model)
    return steps


def _warm_up(trainer: Trainer, max_steps: int) -> int:
    recent: deque[float] = deque(maxlen=WINDOW)
    for step, batch in enumerate(batches(), start=1):
        recent.append(trainer.supervised_step(batch))
        loss = sum(recent) / len(recent)
        done = step == max_steps or (step >= WINDOW and loss <= TARGET_LOSS)
        if done or step % LOG_EVERY == 0:
            log.info("warm-up", step=step, loss=round(loss, 3), target=TARGET_LOSS)
        if done:
            return step
    raise AssertionError("batches() has no end")


def _settings(model: Path) -> RunConfig:
    """The trainer as the warm-up needs it: on the CPU, which every machine has."""
    optimizer = OptimizerSection(lr=LEARNING_RATE, warmup_steps=LEARNING_RATE_STEPS)
    return RunConfig(
        model=ModelSection(path=model, dtype="float32"),
        data=DataSection(train=Path("none"), max_prompt_tokens=MAX_PROMPT_TOKENS),
        rollout=RolloutSection(max_response_tokens=MAX_RESPONSE_TOKENS),
        trainer=TrainerSection(router_replay="off", optimizer=optimizer),
        resources=ResourcesSection(device="cpu"),
    )


def _end_with_parent() -> None:
    """Nobody writes to standard input; it ends when the process that holds its other end does."""

    def wait() -> None:
        # Not sys.stdin: a thread that waits inside it holds its lock, and Python then aborts at exit.
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()


def main() -> None:
    _end_with_parent()
    # What Megatron says about optional packages is of no use to somebody who waits for the demo to start.
    warnings.filterwarnings("ignore", module="megatron")
    build(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
