"""The datasets of a run, as its settings describe them.

Knows the settings, and ties the other files of this room together; what it returns needs no settings.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from async_rl.config.fields import DataFiles
from async_rl.config.inputs import HELD_OUT, DataSection, SourceSection
from async_rl.config.schema import RunConfig
from async_rl.data import hub
from async_rl.data.chat import CheckpointEncoder
from async_rl.data.chat_turns import ChatTurns
from async_rl.data.dataset import Dataset, OnBadRow, read_dataset
from async_rl.data.files import Files, open_files
from async_rl.data.messages import checked_tools
from async_rl.data.mixture import Mixture, TrainSet
from async_rl.data.prompts import Encoder, RowReader
from async_rl.data.tokenizer import load_tokenizer, stop_token_ids
from async_rl.errors import DatasetError, RowFault
from async_rl.types import Prompt

CACHE = ".data"
"""Folder below runs/ for the rows of long Parquet files, unpacked."""

_SOURCES, _SETS, _PATH = "data.sources.", "eval.sets.", ".path"
_OF_SOURCE = ("format", "prompt_field", "system_prompt", "order_by")
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
    data = _data(config, key)
    try:
        return read_dataset(
            files(config, key),
            row_reader(config, key, encode),
            on_bad_row=on_bad_row or data.on_bad_row,
            in_memory=data.rows_in_memory if in_memory is None else in_memory,
            settings=_settings(config, data),
        )
    except DatasetError as error:
        # Of several files for one purpose, a message must say whose it is.
        if not key.startswith((_SOURCES, _SETS)) or key in str(error):
            raise
        raise DatasetError(f"{key}: {error}") from None


def train_keys(config: RunConfig) -> dict[str, str]:
    """Return the settings that name what is trained on by source: data.train, whose source is "", or each source's."""
    if not config.data.sources:
        return {"": "data.train"}
    return {name: f"{_SOURCES}{name}{_PATH}" for name in config.data.sources}


def keys(config: RunConfig) -> list[str]:
    """Return the settings that name datasets: those of ``train_keys``, data.eval, the path of each evaluation set."""
    return [*train_keys(config).values(), "data.eval", *(f"{_SETS}{name}{_PATH}" for name in config.eval.sets)]


def read_train(config: RunConfig, read_key: Callable[[str], Dataset]) -> TrainSet:
    """Return what is trained on; ``read_key`` reads the dataset of one of ``train_keys``."""
    found = {name: read_key(key) for name, key in train_keys(config).items()}
    if not config.data.sources:
        return found[""]
    agents = {name: digest for name in found if (digest := _agent(config, name)) is not None}
    return Mixture(found, {name: source.weight for name, source in config.data.sources.items()}, agents)


def eval_key(name: str) -> str:
    """Return the setting with the files of an evaluation set."""
    return "data.eval" if name == HELD_OUT else f"{_SETS}{name}{_PATH}"


def eval_prompts(config: RunConfig, name: str, dataset: Dataset) -> tuple[Prompt, ...]:
    """Return the problems of an evaluation set. Raises DatasetError when there are fewer than its limit."""
    limit = config.eval_sets[name].limit
    if name == HELD_OUT:
        return dataset.first(limit, label="eval", key="eval.n")
    return dataset.first(limit, label=f"eval-{name}", key=f"{_SETS}{name}.limit")


def files(config: RunConfig, key: str) -> Files:
    """Open the files of ``key``, one of ``keys``. Raises DatasetError."""
    source = _source(config, key)
    return open_files(
        hub.resolved(list(paths_of(config, key)), key, allow_download=config.data.allow_download),
        key=key,
        cache=config.runs / CACHE,
        in_memory=config.data.rows_in_memory,
        limit=None if source is None else source.limit,
    )


def paths_of(config: RunConfig, key: str) -> Sequence[Path]:
    """Return what ``key``, one of ``keys``, names: files and patterns, none for null."""
    source = _source(config, key)
    value: DataFiles | None
    if source is not None:
        value = source.path
    elif key.startswith(_SETS):
        value = config.eval.sets[key.removeprefix(_SETS).removesuffix(_PATH)].path
    else:
        value = config.data.train if key == "data.train" else config.data.eval
    return [] if value is None else [value] if isinstance(value, Path) else value


def _source(config: RunConfig, key: str) -> SourceSection | None:
    """Return the source whose path ``key`` is; None for another dataset."""
    return config.data.sources.get(_source_name(key))


def _source_name(key: str) -> str:
    """Return the name of the source whose path ``key`` is; "" for another dataset."""
    return key.removeprefix(_SOURCES).removesuffix(_PATH) if key.startswith(_SOURCES) else ""


def _data(config: RunConfig, key: str) -> DataSection:
    """Return the settings of the dataset of ``key``: those of data, and of its source."""
    source = _source(config, key)
    own = {} if source is None else {name: getattr(source, name) for name in _OF_SOURCE}
    return config.data.model_copy(update={name: value for name, value in own.items() if value is not None})


def row_reader(config: RunConfig, key: str, encode: Encoder) -> RowReader:
    """Return what makes prompts of the rows of ``key``. Raises DatasetError for tools that cannot be read."""
    data, trained = _data(config, key), key in train_keys(config).values()
    return RowReader(
        encode,
        prompt_field=data.prompt_field,
        max_prompt_tokens=data.max_prompt_tokens,
        format=data.format,
        system_prompt=data.system_prompt,
        tools=_tools(data.tools),
        template_kwargs=data.template_kwargs,
        order_by=data.order_by if trained else None,
        sampling_field=data.sampling_field if trained else None,
        max_response_tokens=config.terms(_source_name(key)).max_response_tokens,
    )


def chat_turns(config: RunConfig) -> ChatTurns:
    """Return what renders messages after a turn of the policy, with a tokenizer of its own, loaded when needed.

    Raises DatasetError for tools or a template that cannot be read.
    """
    encode, lock = encoder(config), threading.Lock()

    def render(*arguments: Any) -> tuple[str, list[int]]:
        with lock:  # threads call it, and a tokenizer keeps state while it works
            return encode.chat(*arguments)

    def write(*arguments: Any, asks: bool) -> str:
        with lock:
            return encode.written(*arguments, asks=asks)

    stops = {*stop_token_ids(config.model.path), *config.rollout.stop_token_ids}
    return ChatTurns(render, stops, _tools(config.data.tools), config.data.template_kwargs, write)


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


def _agent(config: RunConfig, source: str) -> str | None:
    """Return a hash of the settings of the agent that plays a source's rollouts; None where there is none."""
    section = config.terms(source).agent
    if section is None:
        return None
    settings = config.rollout.agent_sections[section].model_dump_json(exclude_defaults=True)
    return blake2b(settings.encode(), digest_size=16).hexdigest()


def _settings(config: RunConfig, data: DataSection) -> str:
    """Return a hash of what decides which prompt a row becomes: settings, template, tools and tokenizer."""
    digest = blake2b(digest_size=16)
    digest.update(json.dumps([getattr(data, name) for name in _DECISIVE], sort_keys=True, default=str).encode())
    for path in (data.chat_template, data.tools, *(config.model.path / name for name in _TOKENIZER_FILES)):
        digest.update(path.read_bytes() if path is not None and path.is_file() else b"\0")
    return digest.hexdigest()
