"""The warm-up that makes the demo's checkpoint: random weights, and supervised steps through the run's own trainer.

    python -m async_rl.demo.warmup

writes the folder that the package ships; it takes minutes, and a run never calls it. Make the checkpoint again after a
change of the model, the tokenizer, the task or the constants below: a test fails until then. Knows ``config``, the
trainer, and the other modules of this room but ``prepare``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections import deque
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import structlog

from async_rl.config.inputs import DataSection, ModelSection
from async_rl.config.operation import ResourcesSection
from async_rl.config.rollouts import RolloutSection
from async_rl.config.schema import RunConfig
from async_rl.config.training import OptimizerSection, TrainerSection
from async_rl.demo import checkpoint
from async_rl.demo.model import SIZES, save_random_model
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


def settings() -> dict[str, Any]:
    """Return what decides the weights that the warm-up makes, rounding aside."""
    # The first thousand stand for the stream: seeds, lengths and answers are all in them.
    seen = blake2b(repr(list(islice(demonstrations(), 1000))).encode(), digest_size=8)
    return {
        "model": dict(SIZES),
        "model_seed": MODEL_SEED,
        "tokens": list(TOKENS),
        "demonstrations": seen.hexdigest(),
        "target_loss": TARGET_LOSS,
        "max_steps": MAX_STEPS,
        "window": WINDOW,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "learning_rate_steps": LEARNING_RATE_STEPS,
    }


def sequence(problem: Problem) -> Sequence:
    """Return the token ids of prompt, answer and end [N], and which of them to learn: answer and end, bool[N]."""
    index = {token: i for i, token in enumerate(TOKENS)}
    ids = [*(index[character] for character in problem.prompt + problem.answer), EOS_ID]
    return np.array(ids, dtype=np.int32), np.arange(len(ids)) >= len(problem.prompt)


def demonstrations() -> Iterator[Problem]:
    """Yield short warm-up problems; two of three have an answer that does not end where it should, but runs backwards.

    So the policy that comes out knows how to sort, but mostly says too much. Nothing in the demonstrations tells that
    this is wrong. Only the reward does: what reinforcement learning adds is visible within a few dozen steps, whatever
    the seed, and responses grow shorter as it learns.
    """
    short = (problem for problem in warmup_problems() if len(problem.answer) <= MAX_LETTERS)
    for index, problem in enumerate(short):
        yield problem if index % 3 == 0 else Problem(problem.prompt, problem.answer + problem.answer[::-1])


def batches() -> Iterator[list[Sequence]]:
    """Yield batches of demonstrations, without end."""
    stream = demonstrations()
    while True:
        yield [sequence(next(stream)) for _ in range(BATCH)]


def build(folder: Path, *, max_steps: int = MAX_STEPS) -> int:
    """Write the warmed-up model in float32 to ``folder``, which exists and is empty. Returns the steps it took."""
    random_model = folder / "random"
    random_model.mkdir()
    save_tokenizer(random_model)
    save_random_model(random_model, MODEL_SEED)
    steps = supervise(random_model, folder, batches(), target_loss=TARGET_LOSS, max_steps=max_steps)
    shutil.rmtree(random_model)
    return steps


def supervise(
    model: Path, folder: Path, stream: Iterator[list[Sequence]], *, target_loss: float, max_steps: int
) -> int:
    """Train a model on a stream of batches until the mean loss of ``WINDOW`` steps is ``target_loss``, and write it.

    model: the Hugging Face folder to begin with. folder: where the trained model goes, in float32; it exists. Returns
    the steps it took, at most ``max_steps``. Megatron's state is global: call it in a process of its own.
    """
    import torch

    from async_rl.trainer.trainer import Trainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    trainer = Trainer(_config(model))
    try:
        steps = _train(trainer, stream, target_loss, max_steps)
        trainer.save_hf(folder)
    finally:
        trainer.close()
    return steps


def _train(trainer: Trainer, stream: Iterator[list[Sequence]], target_loss: float, max_steps: int) -> int:
    recent: deque[float] = deque(maxlen=WINDOW)
    for step, batch in enumerate(stream, start=1):
        recent.append(trainer.supervised_step(batch))
        loss = sum(recent) / len(recent)
        done = step == max_steps or (step >= WINDOW and loss <= target_loss)
        if done or step % LOG_EVERY == 0:
            log.info("warmup_step", step=step, loss=round(loss, 3), target=target_loss)
        if done:
            return step
    raise AssertionError("the stream came to an end")


def _config(model: Path) -> RunConfig:
    """Return the trainer's settings for the warm-up: on the CPU, which every machine has."""
    optimizer = OptimizerSection(lr=LEARNING_RATE, warmup_steps=LEARNING_RATE_STEPS)
    return RunConfig(
        model=ModelSection(path=model, dtype="float32"),
        data=DataSection(train=Path("none"), max_prompt_tokens=MAX_PROMPT_TOKENS),
        rollout=RolloutSection(max_response_tokens=MAX_RESPONSE_TOKENS),
        trainer=TrainerSection(router_replay="off", optimizer=optimizer),
        resources=ResourcesSection(device="cpu"),
    )


def main() -> None:
    # Megatron warns about optional packages that the warm-up has no use for.
    warnings.filterwarnings("ignore", module="megatron")
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary)
        steps = build(model)
        checkpoint.pack(model, checkpoint.FOLDER, {"steps": steps, "settings": settings()})
    log.info("checkpoint_written", folder=str(checkpoint.FOLDER), steps=steps)


if __name__ == "__main__":
    main()
