"""``async-rl train``: prepares the inputs of a run, starts Ray, runs the training loop and records how it ended.

Owns what happens before and after the loop. What happens in it is in ``driver.loop``.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from async_rl import doctor
from async_rl.config.functions import load_function
from async_rl.config.inputs import HELD_OUT
from async_rl.config.paths import absolute
from async_rl.config.schema import RunConfig
from async_rl.data import reading
from async_rl.data.dataset import Dataset
from async_rl.data.mixture import TrainSet
from async_rl.data.prompts import Encoder
from async_rl.data.tokenizer import configured_stop_tokens, end_token
from async_rl.driver import checkpoint_folder, run_state
from async_rl.driver.cluster import ray_cluster, ray_exporters
from async_rl.driver.evaluation import EvalSet
from async_rl.driver.hosts import joined
from async_rl.driver.loop import TrainingLoop
from async_rl.driver.recorder import Recorder
from async_rl.driver.remote_files import courier
from async_rl.errors import CheckpointDamaged, ConfigError
from async_rl.runtime import logs
from async_rl.runtime.failures import explain
from async_rl.runtime.interrupt import Interrupted, until_interrupted

log = structlog.get_logger(__name__)


class Inputs(NamedTuple):
    """What a run reads before it can begin; ``decode`` turns token ids into text."""

    decode: Callable[[Any], str]
    train_set: TrainSet
    eval_sets: Sequence[EvalSet]
    bad_rows: Mapping[str, int]


def run(config: RunConfig, *, resume: bool = False) -> int:
    """Run ``config`` to its end. Returns the exit code: 0 finished, 130 interrupted. Raises AsyncRLError on failure.

    With ``resume`` the run of this name continues from its latest valid checkpoint, or from the beginning if it has
    none. summary.json is written in every case once the run folder exists.
    """
    started = time.monotonic()
    doctor.require(config)
    prepare(config)
    config = resolved(config, resume=resume)
    # Transformers takes seconds to import, and Ray to start: side by side.
    with ThreadPoolExecutor(1) as background:
        inputs = background.submit(read_inputs, config)
        with joined(config) as config:
            return _record(config, started, inputs, resume=resume)


def _record(config: RunConfig, started: float, inputs: Future[Inputs], *, resume: bool) -> int:
    """Start Ray unless a cluster is joined, run the training loop, record how it ended. See ``run``."""
    own_cluster = contextlib.nullcontext() if config.cluster.joined_address else ray_cluster(config)
    with Recorder(config, started, lambda token_ids: inputs.result().decode(token_ids), resume=resume) as recorder:
        logs.configure(config.run_dir, "pipeline", console=True)
        try:
            # Before any process is started: what can be seen without reading files.
            checked = checkpoint_folder.latest_valid(recorder.checkpoints) if resume else None
            prepare_store(config, resume=resume, clear=checked is None)
            with own_cluster:
                recorder.announce_ray_exporters(ray_exporters())
                read = inputs.result()
                recorder.record_bad_rows(**read.bad_rows)
                with courier(config):
                    _train(config, recorder, read, resume=resume)
        except (Interrupted, KeyboardInterrupt):  # the latter before the event loop handles signals
            recorder.finish("interrupted")
            return 130
        except BaseException as error:
            failure = explain(error, config.run_dir)
            with contextlib.suppress(OSError):  # of the full disk that the failure tells of
                recorder.finish(f"failed: {failure}")
            raise failure from error
        try:
            recorder.finish("finished")
        except OSError as error:
            raise explain(error, config.run_dir) from error
    return 0


def _train(config: RunConfig, recorder: Recorder, read: Inputs, *, resume: bool) -> None:
    """Run the training loop, with ``resume`` from the newest checkpoint that turns out to be intact when loaded."""
    damaged: dict[Path, str] = {}
    while True:
        gc.collect()  # the actors of a loop that found its checkpoint damaged, with their GPUs
        found = checkpoint_folder.latest_valid(recorder.checkpoints, damaged) if resume else None
        try:
            if resume:
                recorder.restore(None if found is None else run_state.read(found))
            loop = TrainingLoop(config, recorder, read.train_set, read.eval_sets, found)
            asyncio.run(until_interrupted(loop.run(), wind_up=loop.wind_up, on_demand=loop.request_checkpoint))
            return
        except CheckpointDamaged as error:
            damaged[Path(error.path)] = error.damage


def prepare(config: RunConfig) -> None:
    """Run the ``prepare`` hook, if configured, then repeat the preflight checks."""
    if config.prepare is not None:
        load_function("prepare", config.prepare, ("config",), ConfigError)(config)
        doctor.require(config)


def resolved(config: RunConfig, *, resume: bool) -> RunConfig:
    """Return the config with what depends on this machine filled in.

    That is absolute paths, the backend of weight syncs, the device (on a cluster, its hosts decide) and, unless a run
    is resumed, a free name: name, name-2, ...
    """
    config = absolute(config)
    # For the run folder, and for actors whose environment is another one.
    config = config.model_copy(
        update={
            "sync": config.sync.model_copy(update={"backend": config.sync_backend}),
            "cluster": config.cluster.model_copy(update={"run_host": None}),  # of another start; ``hosts`` knows it
        }
    )
    if config.cluster.joined_address is None:
        device = "cuda" if doctor.uses_gpu(config) else "cpu"
        config = config.model_copy(update={"resources": config.resources.model_copy(update={"device": device})})
    if resume:
        return config
    number, candidate = 1, config
    while candidate.run_dir.exists() and any(candidate.run_dir.iterdir()):
        number += 1
        candidate = config.model_copy(update={"name": f"{config.name}-{number}"})
    return candidate


def read_inputs(config: RunConfig) -> Inputs:
    """Load the tokenizer; read and tokenize the rows for training and evaluation.

    Bad rows are handled as data.on_bad_row says. Raises ModelError and DatasetError.
    """
    if not configured_stop_tokens(config.model.path) and (token := end_token(config.model.path)) is not None:
        log.warning("stop_token_of_tokenizer", token=token, reason="the model's config.json has no eos_token_id")
    encode = reading.encoder(
        config,
        lambda token: log.warning("second_begin_token_removed", token=token, reason="prompts begin with its text"),
    )
    train_set = reading.read_train(config, lambda key: _read(config, key, encode))
    bad_rows = {"train": len(train_set.bad_rows), "eval": 0}
    eval_sets = read_eval_sets(config, encode, bad_rows)
    if encode.prints_date:
        log.warning("chat_template_writes_the_date", fix="set it in data.template_kwargs, or prompts change overnight")
    return Inputs(encode.tokenizer.decode, train_set, eval_sets, bad_rows)


def read_eval_sets(config: RunConfig, encode: Encoder, bad_rows: dict[str, int]) -> list[EvalSet]:
    """Read the problems of every evaluation set, and count the bad rows of each. Raises DatasetError."""
    sets = []
    for name in config.eval_sets:
        dataset = _read(config, reading.eval_key(name), encode)
        bad_rows["eval" if name == HELD_OUT else f"eval.{name}"] = len(dataset.bad_rows)
        sets.append(EvalSet.of(config, name, reading.eval_prompts(config, name, dataset)))
    return sets


def _read(config: RunConfig, key: str, encode: Encoder) -> Dataset:
    dataset = reading.read(config, key, encode)
    if (report := dataset.bad_row_report()) is not None:
        log.warning("rows_skipped", report=report)
    if dataset.later is not None:
        log.info("rows_left_on_disk", dataset=key, rows=dataset.later.count, checked=dataset.later.first - 1)
    return dataset


def prepare_store(config: RunConfig, *, resume: bool, clear: bool) -> None:
    """Check the store of queue.backend redis before any process is started; ``clear`` removes what it has of this run.

    Raises ConfigError if it cannot be used, or holds a run of this name although ``resume`` is not asked for.
    """
    if config.queue.backend == "redis":
        from async_rl.queue import redis_store

        redis_store.check(config.queue.redis, config.name, resume=resume)
        if clear:
            redis_store.remove(config.queue.redis, config.name)
