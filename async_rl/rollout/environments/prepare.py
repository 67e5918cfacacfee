"""The hook that writes environments' own datasets to the files of the run; a config names it in ``prepare``.

Knows ``play``, which runs the class that has the rows where the settings say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from async_rl.config.inputs import HELD_OUT
from async_rl.config.schema import RunConfig
from async_rl.errors import AgentFailure
from async_rl.rollout.environments.play import Environments

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Missing:
    """A dataset that is not there."""

    key: str
    """The setting that names its file."""
    path: Path
    split: str
    """train or eval."""
    section: str
    """That of the agent which plays it."""


def prepare(config: RunConfig) -> None:
    """Write the datasets of sources, of evaluation sets, of data.train and of data.eval that are not there.

    Each must name one JSONL file, and an environment with rows must play it. Raises AgentFailure.
    """
    if missing := list(_missing(config)):
        asyncio.run(_write(config, missing))


def _missing(config: RunConfig) -> Iterator[_Missing]:
    data = config.data
    datasets: list[tuple[str, object, str, str | None]] = [
        (f"data.sources.{name}.path", each.path, "train", config.terms(name).agent)
        for name, each in data.sources.items()
    ] or [("data.train", data.train, "train", config.terms("").agent)]
    for name, each in config.eval_sets.items():
        key = "data.eval" if name == HELD_OUT else f"eval.sets.{name}.path"
        datasets.append((key, each.path, "eval", config.eval_terms(name).agent))
    for key, path, split, section in datasets:
        if not isinstance(path, Path) or path.exists():
            continue
        if path.suffix != ".jsonl":
            raise AgentFailure(f"{key} is {path}, which is not there; name a file that ends with .jsonl")
        if section is None or config.rollout.agent_sections[section].environment is None:
            raise AgentFailure(
                f"prepare: {key} is {path}, which is not there, and no environment plays its rollouts whose rows could "
                "be written; name a file that is there, or set the environment of rollout.agent or of rollout.agents"
            )
        yield _Missing(key, path, split, section)


async def _write(config: RunConfig, missing: list[_Missing]) -> None:
    for section in dict.fromkeys(each.section for each in missing):
        environments = Environments(config, section)
        try:
            for each in missing:
                if each.section != section:
                    continue
                each.path.parent.mkdir(parents=True, exist_ok=True)
                count = await environments.write_rows(each.split, each.path.absolute())
                log.info("environment_rows_written", setting=each.key, path=str(each.path), rows=count)
        finally:
            await environments.close()
