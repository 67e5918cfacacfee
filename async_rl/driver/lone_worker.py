"""One rollout worker with its engine in this process, without queue, trainer and Ray, for a person to look at.

Owns what ``async-rl rollout`` and ``async-rl chat`` need around it: which model it has, and a folder for logs that is
gone at the end. Knows ``eval_command``, which finds models likewise.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from async_rl.config.functions import load_function
from async_rl.config.schema import RunConfig
from async_rl.driver.eval_command import Source, alone, exported, find_source, with_model
from async_rl.errors import ConfigError, EngineError
from async_rl.models.config import check_not_quantized
from async_rl.queue.client import QueueClient
from async_rl.rollout.engine.loader import load_engine
from async_rl.rollout.environments.turns import load_environments
from async_rl.rollout.gate import Gate
from async_rl.rollout.responses import Responses
from async_rl.rollout.rewards.runner import RewardRunner
from async_rl.rollout.stats import worker_id
from async_rl.rollout.worker import RolloutWorker
from async_rl.runtime import logs
from async_rl.runtime.interrupt import Interrupted, until_interrupted
from async_rl.runtime.process import mark_semaphores


@contextlib.contextmanager
def prepared(config: RunConfig, role: str, checkpoint: Path | None, moved: Path | None) -> Iterator[RunConfig]:
    """Yield the config with which a worker is made, once the model is there and the logs of this process are set up.

    role: what the folder below runs/ is called after, which stays only if the engine fails. checkpoint: None for
    model.path. moved: as in ``eval_command.run``. Raises AsyncRLError.
    """
    if config.prepare is not None:
        load_function("prepare", config.prepare, ("config",), ConfigError)(config)
    source = Source(config.model.path, exported=True) if checkpoint is None else find_source(checkpoint)
    if source.exported:
        check_not_quantized(source.path)
    settled = alone(config, source)
    try:
        settled.runs.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{config.name}-{role}-", dir=settled.runs))
    except OSError as error:
        raise ConfigError(f"runs: cannot write to {settled.runs} ({error.strerror}); set --runs to a folder") from None
    kept = False
    try:
        logs.configure(folder, role, console=True)
        mark_semaphores(worker_id(0))
        with exported(source, folder, moved) as model:
            yield with_model(settled.model_copy(update={"name": folder.name}), model)
    except EngineError as error:
        kept = True
        raise EngineError(f"{error} (logs: {folder / 'logs'})") from error
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def with_worker(config: RunConfig, tokenizer: Any, work: Callable[[RolloutWorker], Awaitable[None]]) -> bool:
    """Start a worker's engine, do ``work`` with it, and end both. Returns whether it was not interrupted.

    Raises what ``work`` raises, and EngineError.
    """

    async def start_and_work() -> None:
        async with _worker(config, tokenizer) as worker:
            await work(worker)

    try:
        asyncio.run(until_interrupted(start_and_work()))
    except (Interrupted, KeyboardInterrupt):
        return False
    return True


@contextlib.asynccontextmanager
async def _worker(config: RunConfig, tokenizer: Any) -> AsyncIterator[RolloutWorker]:
    name = config.rollout.engine_of(0)
    engine = load_engine(name)(config, 0, cores=None)
    environments = load_environments(config, tokenizer)
    responses = Responses(config, engine, tokenizer, RewardRunner(config.reward), environments, name)
    # It takes no tickets and puts no groups: the queue is never called.
    worker = RolloutWorker(config, 0, QueueClient(None), engine, Gate(), responses, tokenizer=tokenizer)
    try:
        await engine.start()
        yield worker
    finally:
        await worker.close()
        await engine.shutdown()
