"""Hundreds of weight pushes to one real vLLM engine while calls run and are cancelled leave nothing behind.

    .venv/bin/python -m pytest -s tests/chaos/test_many_pushes.py

prints the bytes by which each process grows with a push. PUSHES sets how many there are; with few, memory that the
allocator has yet to settle on counts as growth.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import statistics
from pathlib import Path

import numpy as np
import psutil
import pytest

from async_rl.rollout.engine.interface import Sampling
from tests.support.engine_checkpoint import (
    EOS,
    MAX_RUNNING,
    VOCAB,
    Pusher,
    engine_config,
    make_checkpoint,
    perturbed,
    running,
    until_sampled,
)

pytestmark = [pytest.mark.engine, pytest.mark.long]

PUSHES = int(os.environ.get("PUSHES", "500"))
# A process may grow by this much with each push: it was 5 kB over 500 of them, and a leaked copy of the weights has a
# megabyte.
MOST_BYTES_A_PUSH = 16 * 1024
MODES = ("abort", "keep", "abort", "wait")

# vLLM loads it in the engine core's process too, which has the scheduler.
PLUGIN = """
def register():
    from vllm.v1.engine.core import EngineCore

    EngineCore.kept_requests = lambda self: [len(self.scheduler.requests), len(self.scheduler._re_block_ids)]
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Install a plugin of vLLM that counts the requests its scheduler knows, and those whose blocks it keeps."""
    (tmp_path / "scheduler_counts.py").write_text(PLUGIN)
    described = tmp_path / "scheduler_counts-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: scheduler-counts\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nscheduler_counts = scheduler_counts:register\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # as in a run, see driver/actors.py


async def keep_calling(engine, caller, calls):
    """Make one call after the other: a pause of mode "abort" ends some, some are cancelled, the others finish."""
    chance = np.random.default_rng(caller)
    for number in itertools.count():
        prompt = chance.integers(EOS + 1, VOCAB, int(chance.integers(4, 150))).astype(np.int32)
        call = asyncio.create_task(
            engine.generate(f"{caller}/{number}", prompt, Sampling(1.0, 1.0), int(chance.integers(20, 100)))
        )
        try:
            if chance.random() < 0.3:
                await asyncio.sleep(chance.uniform(0, 0.2))
                call.cancel()
            await asyncio.wait({call})
        finally:
            call.cancel()
            await asyncio.wait({call})
        calls["cancelled" if call.cancelled() else call.result().finish_reason] += 1


def memory(process):
    """Return the resident bytes that a process shares with no other."""
    info = process.memory_info()
    return info.rss - info.shared


def shared_files(process):
    return len(set(re.findall(r"/dev/shm/\S+", Path(f"/proc/{process.pid}/maps").read_text())))


def slope(readings):
    """Return the bytes per push over the second half; in the first, allocators and caches reach their sizes."""
    settled = readings[len(readings) // 2 :]
    return statistics.linear_regression(range(len(settled)), settled).slope


async def test_an_engine_stays_as_it_is_over_hundreds_of_pushes(plugin, tmp_path):
    from safetensors.torch import load_file

    folder = make_checkpoint(tmp_path / "tiny_moe")
    weights = load_file(folder / "model.safetensors")
    both = itertools.cycle([perturbed(weights), weights])
    calls = dict.fromkeys(("cancelled", "abort", "stop", "length"), 0)
    async with running(engine_config(folder)) as engine:
        trainer = Pusher(engine, weights)
        await trainer.connect()
        core = max(psutil.Process().children(recursive=True), key=memory)
        readings = {core: [], psutil.Process(): []}
        shared, kept = [], []
        callers = [asyncio.create_task(keep_calling(engine, n, calls)) for n in range(MAX_RUNNING)]
        try:
            for mode in itertools.islice(itertools.cycle(MODES), PUSHES):
                await until_sampled(engine, 2, calls=MAX_RUNNING // 2)
                await trainer.push(next(both), mode)
                for process, found in readings.items():
                    found.append(memory(process))
                shared.append(sum(map(shared_files, readings)))
                kept.append(await engine._llm.engine_core.call_utility_async("kept_requests"))
            assert not [error for task in callers if task.done() and (error := task.exception())]
        finally:
            for task in callers:
                task.cancel()
            await asyncio.wait(callers)
        requests, blocks = await engine._llm.engine_core.call_utility_async("kept_requests")
        trainer.sender.shutdown()
    slopes = {process.name(): round(slope(found)) for process, found in readings.items() if process.is_running()}
    print(f"{PUSHES} pushes, {calls}, bytes per push: {slopes}")
    assert min(calls["cancelled"], calls["abort"], calls["length"]) > PUSHES / 4, f"little was tried: {calls}"
    assert (requests, blocks) == (0, 0)
    assert max(blocks for _, blocks in kept) <= 2 * MAX_RUNNING
    assert len(set(shared[2:])) == 1, f"files in shared memory: {shared}"
    for process, found in readings.items():
        assert slope(found) < MOST_BYTES_A_PUSH, f"{process}: {found[:: PUSHES // 10]}"
