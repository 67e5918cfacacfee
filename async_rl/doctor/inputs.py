"""What a run reads and where it writes: model folder, datasets, functions that settings name, runs folder.

Asks the readers that the run itself uses, so that both say the same.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from async_rl.config.schema import RunConfig
from async_rl.data.prompts import Encode, read_jsonl
from async_rl.doctor.check import Check, refused
from async_rl.errors import AsyncRLError, ConfigError, DatasetError, ModelError
from async_rl.models.config import check_run, checkpoint_shards, read_model_config
from async_rl.rollout.engine.loader import load_engine
from async_rl.rollout.environments.turns import load_environment
from async_rl.rollout.rewards.loader import load_reward

# A larger dataset is read once, when the run starts, not here as well.
DATASET_BYTES_CHECKED = 64 * 2**20


# -------------------------------------------------------------------------------------------


def folder(config: RunConfig) -> Iterator[Check]:
    existing = next(path for path in (config.runs.absolute(), *config.runs.absolute().parents) if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        yield Check("runs", "ok", f"{config.runs} is writable")
    else:
        yield Check(
            "runs",
            "FAIL",
            f"{existing} is not a folder one can write to",
            "set --runs elsewhere",
            ConfigError,
        )


def model(config: RunConfig) -> Iterator[Check]:
    path = config.model.path
    if config.prepare is not None and not path.exists():
        yield Check("model.path", "ok", f"{path}: made by {config.prepare} at start")
        return
    try:
        found = read_model_config(path)
        check_run(config, found)
        shards = checkpoint_shards(path)
    except AsyncRLError as error:
        yield refused("model", error)
        return
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        yield Check(
            "model.path",
            "FAIL",
            f"{path} has no tokenizer (tokenizer.json)",
            "copy the tokenizer's files of the checkpoint there",
            ModelError,
        )
        return
    size = sum(shard.stat().st_size for shard in shards)
    yield Check("model.path", "ok", f"{path}: {found.architecture}, {size / 10**6:.1f} MB in {len(shards)} files")


def data(config: RunConfig) -> Iterator[Check]:
    for key, path in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if path is None:
            yield Check(key, "warn", "no held-out problems: nothing is evaluated", f"set {key} to a JSONL file")
        elif config.prepare is not None and not path.exists():
            yield Check(key, "ok", f"{path}: made by {config.prepare} at start")
        else:
            yield _dataset(config, key, path)


def _dataset(config: RunConfig, key: str, path: Path) -> Check:
    try:
        size = path.stat().st_size
        if size > DATASET_BYTES_CHECKED:
            return Check(key, "ok", f"{path}: {size / 10**6:.0f} MB, read when the run starts")
        dataset = read_jsonl(
            path,
            encode=_encode(config.model.path),
            prompt_field=config.data.prompt_field,
            max_prompt_tokens=config.data.max_prompt_tokens,
            on_bad_row=config.data.on_bad_row,
        )
        if key == "data.eval":
            dataset.first(config.eval.n, label="eval", key="eval.n")
    except OSError as error:
        return Check(key, "FAIL", f"{path}: {error.strerror}", f"set {key} to a JSONL file", DatasetError)
    except AsyncRLError as error:
        return refused(key, error)
    bad = dataset.bad_row_report()
    if bad is not None:
        return Check(key, "warn", bad, "mend those rows; data.on_bad_row is skip, so they are left out")
    return Check(key, "ok", f"{path}: {len(dataset.rows)} rows")


def _encode(path: Path) -> Encode:
    """The checkpoint's tokenizer where it is a plain file, to judge lengths; else any text is one token."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return lambda _: [0]
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001  its own errors are plain Exceptions
        raise ModelError(f"model.path {path}: tokenizer.json cannot be read ({error})") from None
    return lambda text: tokenizer.encode(text).ids


def functions(config: RunConfig) -> Iterator[Check]:
    """Functions that the config names can be imported."""
    yield _try("reward.function", config.reward.function, lambda: load_reward(config.reward.function))
    if config.rollout.engine != "vllm":
        yield _try("rollout.engine", config.rollout.engine, lambda: load_engine(config.rollout.engine))
    environment = config.rollout.environment.function
    if environment is not None:
        yield _try("rollout.environment.function", environment, lambda: load_environment(environment))
    if config.prepare is not None:
        module, _, name = config.prepare.partition(":")
        yield _try("prepare", config.prepare, lambda: getattr(importlib.import_module(module), name))


def durable_queue(config: RunConfig) -> Iterator[Check]:
    """The server of queue.backend redis answers, and lets this run in."""
    if config.queue.backend == "memory":
        return
    try:
        from async_rl.queue import redis_store
    except ModuleNotFoundError:
        yield Check(
            "queue.backend", "FAIL", "redis: its client is not installed", "pip install 'redis>=6'", ConfigError
        )
        return
    try:
        redis_store.ping(config.queue.redis)
    except ConfigError as error:
        yield refused("queue.redis", error)
    else:
        yield Check("queue.redis", "ok", config.queue.redis.url)


def _try(key: str, name: str, load: Callable[[], object]) -> Check:
    try:
        load()
    except AsyncRLError as error:
        return refused(key, error)
    except (ImportError, AttributeError) as error:
        return Check(key, "FAIL", f"cannot load {name}: {error}", "check the spelling and PYTHONPATH", ConfigError)
    return Check(key, "ok", name)
