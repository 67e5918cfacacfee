"""How long generation stalls at a push on one host, against what moving the bytes and the canary take.

    python -m tests.bench.pause [--engine vllm|sglang] [--pushes 8]

A real engine samples eight responses; each push stages changed weights, then interrupts, loads, checks by a canary of
three sequences and resumes, as a weight sync does. The limit is ``2 x bytes / memory bandwidth + 20 ms`` plus the
canary's forward pass, each measured here: the bandwidth is that of copying as many bytes in one thread. Last a JSON
line: for each size the bytes, the medians of the pause and its phases in milliseconds, and the pause over the limit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

SIZES = {"demo": "demo", "105 million parameters": "large"}
CALLS = 8
PROBE = 3, 64  # sequences and tokens of the canary
FIXED_S = 0.02


async def measure(kind: str, size: str, pushes: int, folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    from async_rl.rollout.engine.interface import Sampling, ScoresOnResume, WeightUpdate
    from tests.support.engine_checkpoint import Pusher, engine_config, perturbed, running, until_sampled
    from tests.support.trainer_memory import SIZES as SHAPES
    from tests.support.trainer_memory import make_model

    make_model(folder / "model", SHAPES[size])
    weights = load_file(folder / "model" / "model.safetensors")
    both = [perturbed(weights, scale=1e-3), weights]
    rng, vocabulary = np.random.default_rng(0), SHAPES[size].shape["vocab_size"]
    probe = [rng.integers(2, vocabulary, PROBE[1]).astype(np.int32) for _ in range(PROBE[0])]
    config = engine_config(folder / "model", runs=folder / "runs", engine=kind, max_response_tokens=700)
    phases: dict[str, list[float]] = {name: [] for name in ("pause", "transfer", "canary", "whole")}
    async with running(config) as engine:
        trainer = Pusher(engine, weights)
        await trainer.connect()
        alone = []
        for _ in range(5):
            began = time.monotonic()
            await engine.score(probe)
            alone.append(time.monotonic() - began)

        async def call(number: int) -> None:
            prompt = rng.integers(2, vocabulary, 32).astype(np.int32)
            while True:
                await engine.generate(f"c{number}", prompt, Sampling(1.0, 1.0), 700)

        callers = [asyncio.create_task(call(number)) for number in range(CALLS)]
        for push in range(1, pushes + 1):
            trainer.weights = both[push % 2]
            update = await asyncio.to_thread(trainer.sender.stage)
            await until_sampled(engine, 2, calls=CALLS // 2)
            times = [time.monotonic()]
            await engine.pause("abort")
            times.append(time.monotonic())
            await engine.start_weight_update()
            await engine.update_weights(WeightUpdate(update))
            await engine.finish_weight_update()
            await engine.update_weight_version(str(push))
            times.append(time.monotonic())
            if isinstance(engine, ScoresOnResume):
                await engine.resume_and_score(probe)
            else:
                await engine.resume()
                await engine.score(probe)
            times.append(time.monotonic())
            spans = [*np.diff(times), times[-1] - times[0]]
            for found, seconds in zip(phases.values(), spans, strict=True):
                found.append(float(seconds))
        for task in callers:
            task.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        trainer.sender.shutdown()
    nbytes = sum(tensor.nbytes for tensor in weights.values())
    # The first push sets up what later ones reuse.
    medians = {name: statistics.median(found[1:]) for name, found in phases.items()}
    bandwidth, canary = copying(nbytes), statistics.median(alone)
    limit = 2 * nbytes / bandwidth + FIXED_S + canary
    return {
        "mb": round(nbytes / 1e6, 1),
        "gb_per_s": round(bandwidth / 1e9, 1),
        **{f"{name}_ms": round(1e3 * seconds, 1) for name, seconds in medians.items()},
        "canary_alone_ms": round(1e3 * canary, 1),
        "limit_ms": round(1e3 * limit, 1),
        "pause_over_limit": round(medians["whole"] / limit, 2),
    }


def copying(nbytes: int) -> float:
    """Return the bytes per second at which one thread copies so many, into memory that is already mapped."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    seconds = []
    for _ in range(5):
        began = time.monotonic()
        target.copy_(source)
        seconds.append(time.monotonic() - began)
    torch.set_num_threads(threads)
    return nbytes / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("vllm", "sglang"), default="vllm")
    parser.add_argument("--pushes", type=int, default=8)
    parser.add_argument("--size", help="measure this size alone, in this process")
    arguments = parser.parse_args()
    if arguments.size is not None:
        with tempfile.TemporaryDirectory() as folder:
            found = asyncio.run(measure(arguments.engine, arguments.size, arguments.pushes, Path(folder)))
        print(json.dumps(found), flush=True)
        return
    results = {}
    for name, size in SIZES.items():
        command = [sys.executable, "-m", "tests.bench.pause", "--engine", arguments.engine, "--size", size]
        command += ["--pushes", str(arguments.pushes)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{name}: {results[name]}", flush=True)
    print(json.dumps({"bench": "pause", "engine": arguments.engine, **results}))


if __name__ == "__main__":
    main()
