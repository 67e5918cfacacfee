"""Checks of a run's inputs and output folder: model, datasets, functions that settings name, runs folder.

Uses the readers of the run itself, so that both give the same verdict.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from glob import has_magic
from typing import Any

from async_rl.config.functions import load_function
from async_rl.config.paths import is_hub_name
from async_rl.config.schema import RunConfig
from async_rl.data import hub, reading
from async_rl.data.files import expanded
from async_rl.data.messages import Message
from async_rl.data.tokenizer import configured_stop_tokens, end_token, prompt_encoder, tokenizer_file
from async_rl.doctor import machine
from async_rl.doctor.check import Check, refused
from async_rl.doctor.machine import device_is_known, uses_gpu
from async_rl.errors import AsyncRLError, ConfigError, DatasetError, ModelError, RewardError
from async_rl.models.config import ModelConfig, check_not_quantized, check_run, checkpoint_shards, read_model_config
from async_rl.rollout.agent import load_agent
from async_rl.rollout.engine.loader import load_engine
from async_rl.rollout.engine.sglang import versions
from async_rl.rollout.environments import play
from async_rl.rollout.environments.named import environments_of
from async_rl.rollout.environments.turns import load_environment
from async_rl.rollout.responses import load_filter
from async_rl.rollout.rewards import code
from async_rl.rollout.rewards.loader import load_reward
from async_rl.rollout.rewards.named import rewards_of

# Larger datasets are not read here, only once when the run starts.
DATASET_BYTES_CHECKED = 64 * 2**20


def folder(config: RunConfig) -> Iterator[Check]:
    """Check that the runs folder can be written to."""
    existing = next(path for path in (config.runs.absolute(), *config.runs.absolute().parents) if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        yield Check("runs", "ok", f"{config.runs} is writable")
    else:
        yield Check(
            "runs",
            "FAIL",
            f"{existing} is not a writable folder",
            "set --runs to a writable folder",
            ConfigError,
        )


def model(config: RunConfig) -> Iterator[Check]:
    """Check that the model folder is complete and fits the settings."""
    path = config.model.path
    if config.prepare is not None and not path.exists():
        yield Check("model.path", "ok", f"{path}: will be created by {config.prepare} at start")
        return
    try:
        found = read_model_config(path)
        check_run(config, found)
        shards = checkpoint_shards(path)
        check_not_quantized(path)
    except AsyncRLError as error:
        yield refused("model", error)
        return
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        yield Check(
            "model.path",
            "FAIL",
            f"{path} has no tokenizer (tokenizer.json)",
            "copy the checkpoint's tokenizer files into it",
            ModelError,
        )
        return
    size = sum(shard.stat().st_size for shard in shards)
    yield Check("model.path", "ok", f"{path}: {found.architecture}, {size / 10**6:.1f} MB in {len(shards)} files")
    yield from _stop_token(config)
    yield from _kv_cache(config, found)
    yield from _fp8_cache(config, found)
    yield from _latent_attention(config, found)


def _latent_attention(config: RunConfig, model: ModelConfig) -> Iterator[Check]:
    """Check that SGLang's engine on CPU has not to compute latent attention: it fails at its first step."""
    if uses_gpu(config) or not device_is_known(config) or model.latent is None:
        return
    if "sglang" in config.rollout.engine_names:
        yield Check(
            config.rollout.engine_setting,
            "FAIL",
            f"sglang, which on CPUs does not compute the latent attention of {model.architecture}",
            "set it to vllm",
            ConfigError,
        )


def _kv_cache(config: RunConfig, model: ModelConfig) -> Iterator[Check]:
    """Check that a cache of keys and values whose size is set has room for one sequence of full length at least."""
    if not machine.sets_kv_cache(config) or not device_is_known(config):
        return
    ranks = config.rollout.data_parallel_size
    needed = ranks * kv_cache_minimum(config, model)
    if config.rollout.kv_cache_bytes < needed:
        length = config.data.max_prompt_tokens + config.longest_response
        on_each = f" on {ranks} data-parallel ranks, any of which may get it" if ranks > 1 else ""
        yield Check(
            "rollout.kv_cache_bytes",
            "FAIL",
            f"{config.rollout.kv_cache_bytes} bytes, and one sequence of {length} tokens (data.max_prompt_tokens + "
            f"the longest max_response_tokens) takes {needed}{on_each}",
            f"set it to at least {needed}; for rollout.max_num_seqs such sequences at once, to as many times that",
            ConfigError,
        )


def _fp8_cache(config: RunConfig, model: ModelConfig) -> Iterator[Check]:
    """Check that an engine on CPU has a kernel for keys and values in fp8."""
    if uses_gpu(config) or not device_is_known(config) or config.rollout.kv_cache_dtype is None:
        return
    fault = None
    if model.latent is not None:
        fault = f"the latent attention of {model.architecture} has none on CPUs"
    elif model.head_dim % 32:
        fault = f"heads of {model.head_dim} have none on CPUs, only multiples of 32"
    elif "avx512f" not in machine.processor_flags():
        fault = "this processor has no AVX-512, which it takes"
    if fault is not None:
        detail = f"{config.rollout.kv_cache_dtype}, for which there must be a kernel, but {fault}"
        yield Check("rollout.kv_cache_dtype", "FAIL", detail, "set it to null", ConfigError)


def kv_cache_minimum(config: RunConfig, model: ModelConfig) -> int:
    """Return the bytes of each rank of an engine on CPU below which vLLM does not start.

    They are those of the blocks of one sequence of full length in every layer, and of one block that it never uses.
    """
    latent = model.latent
    if latent is None:
        block = 128
        values = 2 * max(1, model.num_kv_heads // config.rollout.tensor_parallel_size) * model.head_dim
    else:
        block = 16  # with AMX 128, which takes more
        values = latent.key_value_rank + latent.rotary_dim
    length = config.data.max_prompt_tokens + config.longest_response
    return (math.ceil(length / block) + 1) * block * model.num_layers * values * config.kv_value_bytes


def _stop_token(config: RunConfig) -> Iterator[Check]:
    """Check that some token ends a response."""
    path = config.model.path
    try:
        if configured_stop_tokens(path):
            return
        token = end_token(path)
    except ModelError as error:
        yield refused("stop token", error)
        return
    if token is not None:
        yield Check("stop token", "ok", f"{token}, the tokenizer's: the model's config.json has no eos_token_id")
    else:
        yield Check(
            "stop token",
            "warn",
            f"{path}: neither config.json, generation_config.json nor the tokenizer names one, so that each response "
            f"ends at rollout.max_response_tokens = {config.rollout.max_response_tokens}",
            "add eos_token_id to generation_config.json",
        )


def data(config: RunConfig) -> Iterator[Check]:
    """Check that the datasets can be read and are large enough."""
    for key in reading.keys(config):
        paths = reading.paths_of(config, key)
        if not paths and key == "data.eval" and config.data.eval is None:
            if config.eval.sets:
                continue
            yield Check(key, "warn", "no held-out prompts, so nothing is evaluated", f"set {key} to a JSONL file")
        elif config.prepare is not None and len(paths) == 1 and not paths[0].exists() and not has_magic(str(paths[0])):
            yield Check(key, "ok", f"{paths[0]}: will be created by {config.prepare} at start")
        else:
            yield _dataset(config, key)


def _dataset(config: RunConfig, key: str) -> Check:
    try:
        paths = reading.paths_of(config, key)
        if names := [path for path in paths if is_hub_name(path)]:
            for each in names:
                hub.check_name(each, key, allow_download=config.data.allow_download)
            return Check(key, "ok", f"{', '.join(str(name) for name in names)}: loaded when the run starts")
        sizes = [path.stat().st_size for path in expanded(paths, key)]
        if sum(sizes) > DATASET_BYTES_CHECKED:
            name = ", ".join(map(str, reading.paths_of(config, key)))
            return Check(key, "ok", f"{name}: {sum(sizes) / 10**6:.0f} MB, read when the run starts")
        dataset = reading.read(config, key, _LengthEncoder(config))
        for name in config.eval_sets:
            if key == reading.eval_key(name):
                reading.eval_prompts(config, name, dataset)
    except OSError as error:
        return Check(key, "FAIL", f"{error.filename}: {error.strerror}", f"set {key} to a JSONL file", DatasetError)
    except AsyncRLError as error:
        return refused(key, error)
    bad = dataset.bad_row_report()
    if bad is not None:
        return Check(key, "warn", bad, "fix those rows; data.on_bad_row is skip, so they are left out")
    later = "" if dataset.later is None else f", of which the first {dataset.later.first - 1} were checked"
    return Check(key, "ok", f"{dataset.path}: {dataset.lines} rows{later}")


class _LengthEncoder:
    """Encodes text with the checkpoint's tokenizer.json, without Transformers, which takes seconds to import.

    Messages need Transformers. Without a tokenizer.json any text is one token.
    """

    def __init__(self, config: RunConfig) -> None:
        self._full = reading.encoder(config)
        file = config.model.path / "tokenizer.json"
        self._text: Callable[[str], Sequence[int]] = lambda _: [0]
        if file.is_file():
            tokenizer = tokenizer_file(file)
            self._text = prompt_encoder(lambda text: tokenizer.encode(text).ids, tokenizer.id_to_token)
        self._has_model = config.model.path.is_dir()

    def text(self, text: str) -> list[int]:
        """Return the tokens of a prompt that is text."""
        return list(self._text(text))

    def chat(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, variables: Mapping[str, Any]
    ) -> tuple[str, list[int]]:
        """Return the text and tokens of messages; one token where ``prepare`` has yet to make the model."""
        return self._full.chat(messages, tools, variables) if self._has_model else ("", [0])


def functions(config: RunConfig) -> Iterator[Check]:
    """Check that the functions named by settings can be imported and called with their arguments."""
    for named in rewards_of(config.reward):
        reward = _try(named.setting, named.function, functools.partial(load_reward, named))
        yield reward
        if reward.status == "ok" and named.module == code.__name__:
            yield _sandbox()
    for engine in config.rollout.engine_names:
        if engine == "sglang":
            yield _sglang(config)
        elif engine != "vllm":
            yield _try(config.rollout.engine_setting, engine, functools.partial(load_engine, engine))
    filter_function = config.rollout.filter.function
    if filter_function is not None:
        yield _try("rollout.filter.function", filter_function, lambda: load_filter(config.rollout.filter))
    yield from _agents(config)
    for environment, key in environments_of(config).items():
        yield _try(key, environment, functools.partial(load_environment, environment, key))
    if environments_of(config):
        yield from _chat_turns(config)
    if config.prepare is not None:
        prepare = config.prepare
        yield _try("prepare", prepare, lambda: load_function("prepare", prepare, ("config",), ConfigError))


def _agents(config: RunConfig) -> Iterator[Check]:
    """Check that each agent can be started, whatever it is."""
    for section, agent in config.rollout.agent_sections.items():
        if agent.function is not None:
            load = functools.partial(load_agent, agent.function, section)
            yield _try(f"{section}.function", agent.function, load)
        if agent.command is not None:
            yield _program(f"{section}.command", agent.command[0])
        if agent.environment is not None:
            yield _try(f"{section}.environment", agent.environment, functools.partial(play.probe, config, section))


def _program(key: str, name: str) -> Check:
    """Say whether the program of an agent is there, as this host has it."""
    found = shutil.which(name)
    if found is None:
        return Check(
            key, "FAIL", f"{name} is no program on this host", "give its path, or have it in PATH on each host"
        )
    return Check(key, "ok", found)


def _chat_turns(config: RunConfig) -> Iterator[Check]:
    """Say which messages an environment may answer with, if the checkpoint has a chat template."""
    try:
        found = reading.chat_turns(config).check()
    except AsyncRLError:  # It has none, and an environment may return text; a faulty one is named where it is used.
        return
    able = [role for role, fault in found.items() if fault is None]
    faults = [f"{role}: {fault}" for role, fault in found.items() if fault is not None]
    if not faults:
        yield Check("chat turns", "ok", f"environments may return text, or messages of {' and '.join(able)}")
    else:
        yield Check(
            "chat turns",
            "warn",
            f"environments cannot return messages of {'; '.join(faults)}",
            "have them return text" if not able else f"have them return text, or messages of {' and '.join(able)}",
        )


def _sglang(config: RunConfig) -> Check:
    """Check that the Python that is to run SGLang's server has the SGLang that this package was written for."""
    python = config.rollout.sglang.python
    key = versions.SETTING if python is not None else config.rollout.engine_setting
    fault = versions.fault(python, nccl=config.sync_backend == "nccl")
    if fault is None:
        where = "" if python is None else f" of {python}"
        return Check(key, "ok", f"sglang {versions.SGLANG_VERSION}{where}")
    detail, _, fix = fault.rpartition("; ")
    return Check(key, "FAIL", detail, fix, ConfigError)


def _sandbox() -> Check:
    """Check what a sandbox for code that the policy wrote keeps from it on this host."""
    try:
        found = code.isolation()
    except RewardError as error:
        return refused("code sandbox", error)
    if code.HIDDEN in found:
        return Check("code sandbox", "ok", found)
    return Check(
        "code sandbox",
        "warn",
        f"{found}: a program can open data.train and print the outputs that are expected of it",
        "use a kernel with Landlock (5.13 or newer, `landlock` in its list of security modules)",
    )


def durable_queue(config: RunConfig) -> Iterator[Check]:
    """Check that the server of queue.backend redis answers and accepts this run."""
    if config.queue.backend == "memory":
        return
    try:
        from async_rl.queue import redis_store
    except ModuleNotFoundError:
        yield Check(
            "queue.backend", "FAIL", "redis, whose client is not installed", "pip install 'redis>=6'", ConfigError
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
    return Check(key, "ok", name)
