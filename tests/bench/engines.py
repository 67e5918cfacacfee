"""What an engine costs on this machine: vLLM and SGLang, in turns, with the same checkpoint.

    python -m tests.bench.engines

Each engine starts in a process of its own, answers 64 calls at once, then one alone. Last a JSON line: for each engine
seconds and CPU-seconds of its start, tokens per second and per CPU-second, and the memory of its processes (resident,
shared pages divided among those that share them).
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

ENGINES = ("vllm", "sglang")
CALLS, TOKENS, PROMPT = 64, 64, 37
ROUNDS = 3


def of_processes() -> tuple[float, float]:
    """CPU-seconds that this process and its descendants have taken, and the megabytes that they hold."""
    seconds, size = 0.0, 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        times = process.cpu_times()
        seconds += times.user + times.system
        size += process.memory_full_info().pss
    return seconds, size / 1e6


async def measure(kind: str, folder: Path) -> dict[str, float]:
    from tests.support.engine_checkpoint import VOCAB, engine_config, make_checkpoint, running

    checkpoint = make_checkpoint(folder / "model", eos=None, dense=())
    config = engine_config(checkpoint, runs=folder / "runs", engine=kind, max_num_seqs=CALLS)
    before, _ = of_processes()
    began = time.monotonic()
    async with running(config) as engine:
        started = time.monotonic() - began
        of_start, _ = of_processes()
        prompts = np.random.default_rng(0).integers(2, VOCAB, (CALLS, PROMPT)).astype(np.int32)
        rates, per_cpu = [], []
        for _ in range(ROUNDS):
            began, (cpu, _) = time.monotonic(), of_processes()
            await answer(engine, prompts)
            rates.append(CALLS * TOKENS / (time.monotonic() - began))
            per_cpu.append(CALLS * TOKENS / (of_processes()[0] - cpu))
        began = time.monotonic()
        await answer(engine, prompts[:1])
        alone = TOKENS / (time.monotonic() - began)
        _, megabytes = of_processes()
    return {
        "start_s": round(started, 1),
        "start_cpu_s": round(of_start - before, 1),
        "tokens_per_s": round(max(rates)),
        "tokens_per_cpu_s": round(max(per_cpu)),
        "tokens_per_s_alone": round(alone),
        "memory_mb": round(megabytes),
    }


async def answer(engine, prompts) -> None:
    from async_rl.rollout.engine.interface import Sampling

    calls = (engine.generate(f"c{i}", prompt, Sampling(1.0, 1.0), TOKENS) for i, prompt in enumerate(prompts))
    outputs = await asyncio.gather(*calls)
    assert [len(output.token_ids) for output in outputs] == [TOKENS] * len(prompts)


def main() -> None:
    if len(sys.argv) == 2:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(asyncio.run(measure(sys.argv[1], Path(folder)))), flush=True)
        return
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in ENGINES}
    for _ in range(2):  # in turns, for what else the machine does changes
        for kind, results in found.items():
            command = [sys.executable, "-m", "tests.bench.engines", kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"{kind}: {results[-1]}", flush=True)
    best = {kind: {name: _best(name, results) for name in results[0]} for kind, results in found.items()}
    print(json.dumps({"bench": "engines", **best}))


def _best(name: str, results: list[dict[str, float]]) -> float:
    values = [result[name] for result in results]
    return max(values) if name.startswith("tokens") else min(values)


if __name__ == "__main__":
    main()
