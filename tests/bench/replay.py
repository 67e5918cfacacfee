"""The cost of routing replay in the trainer, on the wire and in the engine, and the extra tokens of policy ``exact``.

The groups are real ones, recorded from a short run with routing policy ``exact``. The two sides of a comparison run in
turns in one process each, and only one of them works at a time. Printed last is one JSON line:

    step_ratio_r3_over_off          a training step with R3 over one without replay, the same batches; median of rounds
    wire_bytes_ratio                bytes that routing adds to a message, over rows x layers x top-k x size of an id:
                                    some 65 tokens, 4 layers and top 2 are a few hundred bytes, so the field table
                                    and the alignment to 64 bytes matter
    wire_bytes_ratio_large          the same of 2,048 made-up tokens of a model with 48 MoE layers and top 8
    engine_ratio_with_over_without  tokens/s of the engine returning routing, over those of one that does not
    exact_extra_token_fraction      positions that ``exact`` computes beyond one pass over each trajectory, as a share

    .venv/bin/python -m tests.bench.replay [--rounds 9] [--config configs/tiny_moe.yaml]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from async_rl.queue import codec
from async_rl.trainer.samples import samples_of
from async_rl.types import Group, Prompt, RoutingSpec, Segment, Trajectory
from tests.bench.runs import ROOT, train
from tests.support.groups import grouped, with_trajectories

GROUPS_PER_STEP = 8
STEPS = 12
PROMPTS, MAX_TOKENS = 64, 150


def record(config: Path, folder: Path) -> list[Path]:
    """Return the groups of a run's last steps, as wire-format files."""
    settings = {
        "async_training.partial_rollout.routing": "exact",
        "trainer.steps": STEPS,
        "trainer.groups_per_step": GROUPS_PER_STEP,
        "debug.dump_trajectories": 6 * GROUPS_PER_STEP,
        "eval.n": 1,
    }
    return sorted((train(config, folder, "recorded", settings) / "trajectories").iterdir())


# ---- the trainer's side, in a process for each mode ----

_worker: Any = None


def open_trainer(config: Path, mode: str, files: list[Path]) -> None:
    global _worker
    import torch

    from async_rl.config.loading import load
    from async_rl.trainer.trainer import Trainer

    torch.set_num_threads(1)
    settings = {"trainer.router_replay": mode, "trainer.verify_replay_steps": 0, "resources.device": "cpu"}
    groups = [codec.decode(file.read_bytes()) for file in files]
    _worker = Trainer(load(config, settings)), groups


def step(index: int) -> float:
    """Return the seconds of one training step on the ``index``-th batch."""
    trainer, groups = _worker
    batches = len(groups) // GROUPS_PER_STEP
    start = index % batches * GROUPS_PER_STEP
    began = time.perf_counter()
    trainer.train_step(groups[start : start + GROUPS_PER_STEP], version=STEPS, oldest_version=0)
    return time.perf_counter() - began


# ---- the engine's side ----


def open_engine(config: Path, side: str) -> None:
    global _worker
    from async_rl.config.loading import load
    from async_rl.rollout.engine.vllm.engine import VllmEngine

    settings = {"rollout.return_routed_experts": side == "with", "trainer.router_replay": "R2"}
    loop = asyncio.new_event_loop()
    engine = VllmEngine(load(config, settings), 0)
    loop.run_until_complete(engine.start())
    _worker = loop, engine


def generate(seed: int) -> float:
    """Return the tokens per second over a batch of prompts."""
    from async_rl.rollout.engine.interface import Sampling

    loop, engine = _worker
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, 30, int(length)).astype(np.int32) for length in rng.integers(20, 150, PROMPTS)]

    async def run() -> int:
        sampling = Sampling(temperature=1.0, top_p=1.0)
        calls = (engine.generate(f"{seed}/{i}", p, sampling, MAX_TOKENS) for i, p in enumerate(prompts))
        return sum(len(output.token_ids) for output in await asyncio.gather(*calls))

    began = time.perf_counter()
    tokens = loop.run_until_complete(run())
    return tokens / (time.perf_counter() - began)


def close_engine() -> None:
    loop, engine = _worker
    loop.run_until_complete(engine.shutdown())


# ---- counting ----


def without_own_routing(trajectory: Trajectory) -> Trajectory:
    """Return the trajectory as policy ``replace`` has it, with the last call's rows only."""
    return replace(trajectory, segments=tuple(replace(s, routed_experts=None) for s in trajectory.segments))


def without_routing(trajectory: Trajectory) -> Trajectory:
    return replace(without_own_routing(trajectory), routed_experts=None, routing_spec=None)


def changed(group: Group, change: Any) -> Group:
    return with_trajectories(group, change)


def wire_ratio(groups: list[Group]) -> float:
    added = minimum = 0
    for group in groups:
        added += len(codec.encode(changed(group, without_own_routing))) - len(
            codec.encode(changed(group, without_routing))
        )
        minimum += sum(t.routed_experts.nbytes for t in group.trajectories if t.routed_experts is not None)
    return added / minimum


def large_group() -> Group:
    spec = RoutingSpec(num_moe_layers=48, top_k=8, num_experts=128)
    rng = np.random.default_rng(0)
    prompt, response = (rng.integers(0, 150_000, 1024).astype(np.int32) for _ in range(2))
    trajectory = Trajectory(
        trajectory_id="0-0.0/0",
        prompt_ids=prompt,
        response_ids=response,
        logprobs=-rng.random(1024).astype(np.float32),
        versions=np.zeros(1024, np.int32),
        segments=(Segment(0, 1024, 0),),
        finish_reason="stop",
        routed_experts=rng.integers(0, 128, (2047, 48, 8)).astype(np.uint8),
        routing_spec=spec,
    )
    return grouped("0-0.0", Prompt("0-0", 1, "p", prompt), [trajectory])


def extra_fraction(trajectories: list[Trajectory]) -> float:
    views = sum(
        view.positions
        for t in trajectories
        for view in samples_of(t, advantage=0.0, oldest_version=0, per_segment=True)
    )
    once = sum(t.num_tokens - 1 for t in trajectories)
    return views / once - 1.0


def alternately(sides: dict[str, Any], function: Any, rounds: int) -> dict[str, list[float]]:
    """Call ``function`` on each side in turns; the first call of each does not count, because it compiles."""
    values: dict[str, list[float]] = {side: [] for side in sides}
    for index in range(rounds + 1):
        for side in sides if index % 2 else reversed(sides):
            value = sides[side].submit(function, index).result()
            if index:
                values[side].append(value)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny_moe.yaml")
    arguments = parser.parse_args()
    spawn = get_context("spawn")

    with tempfile.TemporaryDirectory() as folder:
        files = record(arguments.config, Path(folder))
        groups = [codec.decode(file.read_bytes()) for file in files]
        trajectories = [t for group in groups for t in group.trajectories]
        partial = sum(t.is_partial for t in trajectories) / len(trajectories)
        segments = statistics.mean(len(t.segments) for t in trajectories)
        print(
            f"{len(trajectories)} trajectories, {partial:.0%} partial, {segments:.2f} segments on average", flush=True
        )

        with ProcessPoolExecutor(1, spawn) as r3, ProcessPoolExecutor(1, spawn) as off:
            for mode, pool in (("R3", r3), ("off", off)):
                pool.submit(open_trainer, arguments.config, mode, files).result()
            seconds = alternately({"R3": r3, "off": off}, step, arguments.rounds)
        for mode, values in seconds.items():
            print(f"training step, {mode:3s}: median {statistics.median(values) * 1e3:.0f} ms", flush=True)

    with ProcessPoolExecutor(1, spawn) as with_routing, ProcessPoolExecutor(1, spawn) as without:
        pools = {"with": with_routing, "without": without}
        for side, pool in pools.items():
            pool.submit(open_engine, arguments.config, side).result()
        rates = alternately(pools, generate, arguments.rounds)
        for pool in pools.values():
            pool.submit(close_engine).result()
    for side, values in rates.items():
        print(f"engine {side} routing: median {statistics.median(values):.0f} tokens/s", flush=True)

    for name, values, over, under in (("step", seconds, "R3", "off"), ("engine", rates, "with", "without")):
        ratios = sorted(a / b for a, b in zip(values[over], values[under], strict=True))
        print(f"{name} ratios by round: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")

    def ratio(values: dict[str, list[float]], over: str, under: str) -> float:
        return statistics.median(a / b for a, b in zip(values[over], values[under], strict=True))

    print(
        json.dumps(
            {
                "step_ratio_r3_over_off": round(ratio(seconds, "R3", "off"), 4),
                "wire_bytes_ratio": round(wire_ratio(groups), 4),
                "wire_bytes_ratio_large": round(wire_ratio([large_group()]), 5),
                "engine_ratio_with_over_without": round(ratio(rates, "with", "without"), 4),
                "exact_extra_token_fraction": round(extra_fraction(trajectories), 4),
            }
        )
    )


if __name__ == "__main__":
    main()
