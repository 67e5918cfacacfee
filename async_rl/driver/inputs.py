"""What a run begins with: its settings as resolved for this machine, its datasets, and what ``prepare`` makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import structlog

from async_rl import doctor
from async_rl.config.functions import load_function
from async_rl.config.schema import RunConfig
from async_rl.data.dataset import Dataset, read_jsonl
from async_rl.errors import ConfigError

log = structlog.get_logger(__name__)


def prepare(config: RunConfig) -> None:
    """Have what the run reads made by the function that ``prepare`` of its config names, if it names one, and looked at
    again."""
    if config.prepare is not None:
        load_function("prepare", config.prepare, ("config",), ConfigError)(config)
        doctor.require(config)


def read_data(config: RunConfig, tokenizer: Any) -> tuple[Dataset, Dataset | None]:
    """Rows for training and evaluation, tokenized. Bad ones are reported as data.on_bad_row says."""

    def read(path: Path) -> Dataset:
        dataset = read_jsonl(
            path,
            encode=tokenizer.encode,
            prompt_field=config.data.prompt_field,
            max_prompt_tokens=config.data.max_prompt_tokens,
            on_bad_row=config.data.on_bad_row,
        )
        if (report := dataset.bad_row_report()) is not None:
            log.warning("rows skipped", report=report)
        return dataset

    return read(config.data.train), None if config.data.eval is None else read(config.data.eval)


def resolved(config: RunConfig, *, resume: bool) -> RunConfig:
    """The config with what depends on this machine filled in: the device, and a free name (name, name-2, ...) unless
    the run of this name is gone on with."""
    device = "cuda" if doctor.uses_gpu(config) else "cpu"
    config = config.model_copy(update={"resources": config.resources.model_copy(update={"device": device})})
    if resume:
        return config
    number, candidate = 1, config
    while candidate.run_dir.exists() and any(candidate.run_dir.iterdir()):
        number += 1
        candidate = config.model_copy(update={"name": f"{config.name}-{number}"})
    return candidate


def prepare_store(config: RunConfig, *, resume: bool, anew: bool) -> None:
    """Look at the store of queue.backend redis before anything is started; ``anew``: nothing in it is gone on with.

    Raises ConfigError where it cannot be used, or holds a run of this name although ``resume`` is not asked for.
    """
    if config.queue.backend == "redis":
        from async_rl.queue import redis_store

        redis_store.check(config.queue.redis, config.name, resume=resume)
        if anew:
            redis_store.remove(config.queue.redis, config.name)
