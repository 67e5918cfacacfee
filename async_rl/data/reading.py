"""The datasets of a run, as its settings describe them.

Knows the settings, and ties the other files of this room together; what it returns needs no settings.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from async_rl.config.schema import HELD_OUT, RunConfig
from async_rl.data.chat import CheckpointEncoder
from async_rl.data.dataset import Dataset, OnBadRow, read_dataset
from async_rl.data.files import Files, open_files
from async_rl.data.messages import checked_tools
from async_rl.data.prompts import Encoder, RowReader
from async_rl.data.tokenizer import load_tokenizer
from async_rl.errors import DatasetError, RowFault
from async_rl.types import Prompt

CACHE = ".data"
"""Folder below runs/ for the rows of long Parquet files, unpacked."""

_SETS = "eval.sets."
_DECISIVE = ("format", "prompt_field", "max_prompt_tokens", "system_prompt", "template_kwargs")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model")


def encoder(config: RunConfig, on_removed: Callable[[str], None] | None = None) -> CheckpointEncoder:
    """Return the encoder of the checkpoint's tokenizer, see ``CheckpointEncoder``. Raises DatasetError."""
    return CheckpointEncoder(functools.partial(load_tokenizer, config), _template(config), on_removed)


def read(
    config: RunConfig, key: str, encode: Encoder, *, on_bad_row: OnBadRow | None = None, in_memory: int | None = None
) -> Dataset:
    """Read the dataset of ``key``, one of ``keys``; see ``read_dataset``. Raises DatasetError.

    on_bad_row, in_memory: in place of data.on_bad_row and data.rows_in_memory.
    """
    data = config.data
    found = files(config, key)
    try:
        return read_dataset(
            found,
            row_reader(config, encode),
            on_bad_row=on_bad_row or data.on_bad_row,
            in_memory=data.rows_in_memory if in_memory is None else in_memory,
            settings=_settings(config),
        )
    except DatasetError as error:
        # Of several files for one purpose, a message must say whose it is.
        raise (DatasetError(f"{key}: {error}") if key.startswith(_SETS) else error) from None


def keys(config: RunConfig) -> list[str]:
    """Return the settings that name datasets: data.train, data.eval, and the path of each evaluation set."""
    return ["data.train", "data.eval", *(f"{_SETS}{name}.path" for name in config.eval.sets)]


def eval_key(name: str) -> str:
    """Return the setting with the files of an evaluation set."""
    return "data.eval" if name == HELD_OUT else f"{_SETS}{name}.path"


def eval_prompts(config: RunConfig, name: str, dataset: Dataset) -> tuple[Prompt, ...]:
    """Return the problems of an evaluation set. Raises DatasetError when there are fewer than its limit."""
    limit = config.eval_sets[name].limit
    if name == HELD_OUT:
        return dataset.first(limit, label="eval", key="eval.n")
    return dataset.first(limit, label=f"eval-{name}", key=f"{_SETS}{name}.limit")


def files(config: RunConfig, key: str) -> Files:
    """Open the files of ``key``, one of ``keys``. Raises DatasetError."""
    paths = paths_of(config, key)
    return open_files(paths, key=key, cache=config.runs / CACHE, in_memory=config.data.rows_in_memory)


def paths_of(config: RunConfig, key: str) -> Sequence[Path]:
    """Return what ``key``, one of ``keys``, names: files and patterns, none for null."""
    if key.startswith(_SETS):
        value: Path | list[Path] | None = config.eval.sets[key.removeprefix(_SETS).removesuffix(".path")].path
    else:
        value = config.data.train if key == "data.train" else config.data.eval
    return [] if value is None else [value] if isinstance(value, Path) else value


def row_reader(config: RunConfig, encode: Encoder) -> RowReader:
    """Return what makes prompts of rows. Raises DatasetError for tools that cannot be read."""
    data = config.data
    return RowReader(
        encode,
        prompt_field=data.prompt_field,
        max_prompt_tokens=data.max_prompt_tokens,
        format=data.format,
        system_prompt=data.system_prompt,
        tools=_tools(data.tools),
        template_kwargs=data.template_kwargs,
    )


def _tools(path: Path | None) -> list[dict[str, Any]] | None:
    try:
        return None if path is None else checked_tools(_text("data.tools", path), str(path))
    except RowFault as fault:
        raise DatasetError(f"data.tools: {fault}") from None


def _template(config: RunConfig) -> str | None:
    path = config.data.chat_template
    return None if path is None else _text("data.chat_template", path)


def _text(key: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{key}: {path} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise DatasetError(f"{key}: {path}: {error.strerror}") from None


def _settings(config: RunConfig) -> str:
    """Return a hash of what decides which prompt a row becomes: settings, template, tools and tokenizer."""
    data = config.data
    digest = blake2b(digest_size=16)
    digest.update(json.dumps([getattr(data, name) for name in _DECISIVE], sort_keys=True, default=str).encode())
    for path in (data.chat_template, data.tools, *(config.model.path / name for name in _TOKENIZER_FILES)):
        digest.update(path.read_bytes() if path is not None and path.is_file() else b"\0")
    return digest.hexdigest()
