"""The hook that writes an environment's own dataset to data.train and data.eval; a config names it in ``prepare``.

Knows ``play``, which runs the class that has the rows where the settings say.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from async_rl.config.schema import RunConfig
from async_rl.errors import AgentFailure
from async_rl.rollout.environments.play import Environments

log = structlog.get_logger(__name__)


def prepare(config: RunConfig) -> None:
    """Write data.train and data.eval, where they name one JSONL file that is not there. Raises AgentFailure."""
    files = {"train": config.data.train, "eval": config.data.eval}
    missing = {split: path for split, path in files.items() if isinstance(path, Path) and not path.exists()}
    if not missing:
        return
    if config.rollout.agent.environment is None:
        raise AgentFailure("prepare: rollout.agent.environment names no environment whose rows could be written")
    for split, path in missing.items():
        if path.suffix != ".jsonl":
            raise AgentFailure(f"data.{split} is {path}, which is not there; name a file that ends with .jsonl")
    asyncio.run(_write(config, missing))


async def _write(config: RunConfig, missing: dict[str, Path]) -> None:
    environments = Environments(config)
    try:
        for split, path in missing.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            count = await environments.write_rows(split, path.absolute())
            log.info("environment_rows_written", path=str(path), rows=count)
    finally:
        await environments.close()
