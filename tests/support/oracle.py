"""What the oracles share: checkpoints of several policy versions, the trainer's process, and how two sides differ."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from tests.support import trainer_process
from tests.support.engine_checkpoint import perturbed

# The bound that the oracles are about: float32 that adds in another order, and nothing else.
EXACT = 1e-5
# How far apart the weights of two versions are. A real update is a thousand times smaller, and reroutes fewer rows.
STEP = 0.02


def make_versions(first, count, make_folder):
    """Return the checkpoint folders of ``count`` policy versions, of which ``first`` is one, each unlike the others.

    ``make_folder(version)`` makes an empty one.
    """
    from safetensors.torch import load_file, save_file

    base = load_file(first / "model.safetensors")
    result = [first]
    for version in range(1, count):
        folder = make_folder(version)
        for name in ("config.json", "generation_config.json"):
            shutil.copy(first / name, folder / name)
        save_file(perturbed(base, STEP, seed=version), folder / "model.safetensors", metadata={"format": "pt"})
        result.append(folder)
    return result


def load_versions(folders):
    """Return the tensors of each version, by name."""
    from safetensors.torch import load_file

    return [load_file(folder / "model.safetensors") for folder in folders]


@contextlib.contextmanager
def trainer_calls():
    """``await call(function, ...)``: a function of trainer_process, in a process of its own.

    To be entered after an engine has started, whose set-up of this process's environment it inherits.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:

        def call(function, *arguments, **keywords):
            return asyncio.wrap_future(pool.submit(function, *arguments, **keywords))

        yield call


async def trainer_logprobs(trainer, folder, sequences, rows):
    await trainer(trainer_process.open_trainer, folder)
    return await trainer(trainer_process.ask, "logprobs", sequences, rows)


def say(policy, name, values):
    """Print how many of these differences are above EXACT, for ``pytest -s``."""
    print(
        f"\n  {policy:9s} {name:34s} {len(values):5d} tokens, {(values > EXACT).mean():6.1%} differ, "
        f"mean {values.mean():.1e}, max {values.max():.1e}"
    )


def apart(a, b):
    return max(float(np.abs(np.subtract(x, y)).max()) for x, y in zip(a, b, strict=True))
