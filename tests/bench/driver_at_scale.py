"""What the driver and a weight sync pay for a training step of real size: 48 MoE layers, top 8 of 128, long responses.

A whole run on this machine: real driver, queue, worker and Ray around a scripted engine and a trainer that reads its
groups and computes nothing. It is made twice, with short and with long responses. Printed last, one JSON line:

    step_gb                       bytes of the groups of a long step, in GB
    driver_bytes_per_step         what Ray hands to the driver's process for each long step, samples aside
    driver_bytes_long_over_short  that over what it is for a short step
    driver_loop_blocked_ms_max    longest time that the driver's event loop did not run, during the long steps
    pause_s                       median time for which a weight sync pauses the engine, with long responses
    pause_long_over_short         that over what it is with short ones: the delay that the size of a step causes

    .venv/bin/python -m tests.bench.driver_at_scale [--steps 6] [--groups 8] [--short 256] [--long 8192]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from safetensors.numpy import save_file
from transformers import Qwen3MoeConfig

from async_rl.config.loading import validate
from async_rl.config.schema import RunConfig
from async_rl.demo import checkpoint
from async_rl.driver import actors
from async_rl.driver import run as driver_run
from async_rl.driver.loop import TrainingLoop
from async_rl.driver.run import run
from async_rl.metrics.timeline import TIMELINE
from async_rl.rollout.engine.interface import Score
from async_rl.types import ExpertIds, Int32Array, RoutingSpec
from tests.bench.scale import distinct_rows
from tests.support.scripted_engine import Layout, Script, ScriptedEngine
from tests.support.scripted_trainer import LOGPROB, ScriptedTrainer

SPEC = RoutingSpec(num_moe_layers=48, top_k=8, num_experts=128)
RESPONSES = 8  # per group
STORE_BYTES = 4 * 2**30


class Engine(ScriptedEngine):
    """Samples many tokens at once; its routed experts are views of rows that were made before."""

    script = Script(tokens_per_turn=64, turn_s=0.002, layout=Layout(SPEC, frozenset({0}), vocab_size=32))

    async def start(self) -> None:
        self._made = distinct_rows(self._config.data.max_prompt_tokens + self._config.rollout.max_response_tokens)

    def last_position(self, trajectory_id: str, response: Int32Array) -> int:
        del trajectory_id, response
        return self._config.rollout.max_response_tokens - 1

    def _rows(self, sent: int, versions: Int32Array, first_row: int) -> ExpertIds | None:
        return self._made[first_row : sent + len(versions) - 1]

    async def score(self, sequences: list[Int32Array]) -> list[Score]:
        lengths = [len(sequence) - 1 for sequence in sequences]
        return [Score(np.full(length, LOGPROB, np.float32), self._made[:length]) for length in lengths]


def reward(prompt: Any, response: str) -> float:
    """Return a constant: what is measured is the way of the groups."""
    del prompt, response
    return 0.5


class Meter:
    """Counts what Ray hands to this process, and how late its event loop is, while it is on."""

    def __init__(self) -> None:
        self.nbytes, self.late_s, self.steps, self.on = 0, 0.0, 0, False
        self._worker = type(ray._private.worker.global_worker)
        self._deserialize = self._worker.deserialize_objects
        self._worker.deserialize_objects = self._counted()

    def _counted(self) -> Any:
        deserialize = self._deserialize

        def counted(worker: Any, serialized: Any, *arguments: Any, **named: Any) -> Any:
            if self.on:
                self.nbytes += sum(len(data) for data, *_ in serialized if data is not None)
            return deserialize(worker, serialized, *arguments, **named)

        return counted

    async def watch(self) -> None:
        """Note the longest time for which this coroutine did not get its turn."""
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            if self.on:
                self.late_s = max(self.late_s, time.perf_counter() - began - 0.001)

    def close(self) -> None:
        self._worker.deserialize_objects = self._deserialize


class MeteredLoop(TrainingLoop):
    """A training loop that is measured from its third step on."""

    meter: Meter

    async def _train(self) -> None:
        watching = asyncio.ensure_future(self.meter.watch())
        try:
            await super()._train()
        finally:
            self.meter.on = False
            watching.cancel()

    async def _train_step(self) -> None:
        self.meter.on = self._step >= 2
        await super()._train_step()
        self.meter.steps += self.meter.on


def make_model(folder: Path) -> None:
    """Write a model folder with the shapes of real routing, the demo's tokenizer and no weights."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        folder.joinpath(name).write_bytes((checkpoint.FOLDER / name).read_bytes())
    small = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 32, "vocab_size": 32}
    Qwen3MoeConfig(
        **small,
        num_hidden_layers=SPEC.num_moe_layers,
        num_experts=SPEC.num_experts,
        num_experts_per_tok=SPEC.top_k,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=65536,
        eos_token_id=0,
        architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(folder)
    save_file({"unread": np.zeros(1, np.float32)}, folder / "model.safetensors")


def make_files(folder: Path) -> None:
    """Write what ``settings`` names: a model folder and a thousand prompts, which are all the same."""
    (folder / "model").mkdir(parents=True)
    make_model(folder / "model")
    rows = (json.dumps({"prompt": "dcba>", "answer": "abcd"}) for _ in range(1000))
    (folder / "train.jsonl").write_text("\n".join(rows))


def settings(folder: Path, name: str, tokens: int, steps: int, groups: int) -> RunConfig:
    """Return the settings of a run with responses of so many tokens."""
    return validate(
        {
            "name": name,
            "runs": str(folder / "runs"),
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": 64},
            "reward": {"function": "tests.bench.driver_at_scale:reward"},
            "rollout": {
                "engine": "tests.bench.driver_at_scale:Engine",
                "n": RESPONSES,
                "max_response_tokens": tokens,
                "max_num_seqs": 2 * RESPONSES * groups,
            },
            "queue": {"max_bytes": STORE_BYTES},
            "trainer": {"steps": steps, "groups_per_step": groups, "router_replay": "R3"},
            "metrics": {"samples_per_step": 0},
        }
    )


def measure(config: RunConfig) -> dict[str, float]:
    """Make one run and return what it cost."""
    meter = MeteredLoop.meter = Meter()
    try:
        run(config)
    finally:
        meter.close()
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    spans = [json.loads(line) for line in (config.run_dir / TIMELINE / "rollout-0.jsonl").read_text().splitlines()]
    pauses = [span["s"] for span in spans if span["what"] == "pause" and span["at"] > rows[1]["time"]]
    per_group = statistics.median(row["queue_bytes"] / row["queue_groups"] for row in rows if row["queue_groups"])
    return {
        "step_bytes": per_group * config.trainer.groups_per_step,
        "driver_bytes": meter.nbytes / meter.steps,
        "late_ms": 1e3 * meter.late_s,
        "pause_s": statistics.median(pauses),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--groups", type=int, default=8, help="groups per training step, of 8 responses each")
    parser.add_argument("--short", type=int, default=256, help="tokens of a response")
    parser.add_argument("--long", type=int, default=16_384)
    options = parser.parse_args()
    actors.TrainerActor = ScriptedTrainer  # type: ignore[misc]
    driver_run.TrainingLoop = MeteredLoop  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder)
        found = {
            which: measure(settings(folder, which, tokens, options.steps, options.groups))
            for which, tokens in (("short", options.short), ("long", options.long))
        }
    short, long = found["short"], found["long"]
    result = {
        "step_gb": long["step_bytes"] / 1e9,
        "driver_bytes_per_step": long["driver_bytes"],
        "driver_bytes_long_over_short": long["driver_bytes"] / short["driver_bytes"],
        "driver_loop_blocked_ms_max": long["late_ms"],
        "pause_s": long["pause_s"],
        "pause_long_over_short": long["pause_s"] / short["pause_s"],
    }
    print(json.dumps({key: float(f"{value:.3g}") for key, value in result.items()}))


if __name__ == "__main__":
    main()
