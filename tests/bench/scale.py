"""What a replica's process pays for responses of real size: 48 MoE layers, top 8 of 128, thousands of tokens.

The real worker, gate and partial rollouts around a scripted engine that samples in no time; no Ray, no model. The last
line of stdout is one JSON object:

    check_s_per_gb            seconds to check a gigabyte of routed experts where they arrive
    check_over_sort           that time over the time of sorting the rows, which finds repeated experts as well
    pause_s                   from the start of a pause, with every call under way, to its end
    pause_blocked_ms_max      longest time that the event loop did not run, from that start until all answers are merged
    merged_s                  from that start until all answers are merged
    snapshot_s_64_members     until 64 workers have written their groups in flight, of which the slowest takes a second
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from async_rl.config.loading import validate
from async_rl.driver.checkpoint import Checkpointer
from async_rl.queue.records import Ticket
from async_rl.rollout import routing_policies
from async_rl.rollout.actor import RolloutReplica
from async_rl.rollout.moments import SavedGroup
from async_rl.types import ExpertIds, Int32Array, Prompt, RoutingSpec
from tests.support.scripted_engine import Layout, Script, ScriptedEngine

SPEC = RoutingSpec(num_moe_layers=48, top_k=8, num_experts=128)
PROMPT_TOKENS = 512
GROUP_SIZE = 16


def distinct_rows(count: int) -> ExpertIds:
    """Return rows as routers would choose them, [count, L, K]: a few thousand of them, over and over."""
    rng = np.random.default_rng(0)
    some = rng.random((min(count, 2048), SPEC.num_moe_layers, SPEC.num_experts), dtype=np.float32)
    rows = some.argsort(axis=-1)[..., : SPEC.top_k].astype(SPEC.dtype)
    return np.concatenate([rows] * -(-count // len(rows)))[:count]


def seconds(work: Callable[[], object], repeat: int = 5) -> float:
    """Return the shortest of several times of ``work``."""
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def measure_checks(rows: ExpertIds) -> dict[str, float]:
    """Time the check of a finished call's routed experts, and a sort of the same rows."""
    checked = seconds(lambda: routing_policies.check("bench", rows, rows=len(rows), spec=SPEC))
    ordered = seconds(lambda: np.sort(rows, axis=-1), repeat=2)
    return {"check_s_per_gb": checked / rows.nbytes * 1e9, "check_over_sort": checked / ordered}


class Engine(ScriptedEngine):
    """Returns views of rows made before, so that what is measured is the worker."""

    rows: ExpertIds

    def _rows(self, sent: int, versions: Int32Array, first_row: int) -> ExpertIds | None:
        return self.rows[first_row : sent + len(versions) - 1]


class Endless:
    """A queue that always has tickets, and that nothing is put into."""

    def __init__(self) -> None:
        self.issued = 0

    async def take(self, _worker: str, limit: int) -> list[Ticket]:
        first, self.issued = self.issued, self.issued + limit
        ids = np.arange(PROMPT_TOKENS, dtype=np.int32)
        return [Ticket(f"0-{i}.0", Prompt(f"0-{i}", i + 1, "prompt", ids), 0) for i in range(first, first + limit)]


async def lateness(until: asyncio.Event) -> float:
    """Return the longest time in seconds that the event loop did not run until the event is set."""
    longest, last = 0.0, time.perf_counter()
    while not until.is_set():
        await asyncio.sleep(0)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


async def measure_pause(calls: int, tokens: int, rows: ExpertIds) -> dict[str, float]:
    """Interrupt all calls of a replica as a weight sync does, when each has sampled that many tokens."""
    config = validate(
        {
            "model": {"path": "model"},
            "data": {"train": "train.jsonl", "max_prompt_tokens": PROMPT_TOKENS},
            "rollout": {"n": GROUP_SIZE, "max_num_seqs": calls, "max_response_tokens": 2 * tokens},
        }
    )
    layout = Layout(SPEC, frozenset({0}), vocab_size=150_000)
    engine = Engine(config, script=Script(length=2 * tokens, tokens_per_turn=tokens, turn_s=0.01, layout=layout))
    engine.rows = rows
    stand_in: Any = Endless()
    replica = RolloutReplica(config, 0, stand_in, engine, None, stand_in)
    work = asyncio.create_task(replica.run())
    while engine.sampled < calls * tokens:
        await asyncio.sleep(0.001)
    merged = asyncio.Event()
    watching = asyncio.create_task(lateness(merged))
    began = time.perf_counter()
    await replica.pause()
    paused = time.perf_counter() - began
    while replica._worker._merging:
        await asyncio.sleep(0)
    all_merged = time.perf_counter() - began
    merged.set()
    work.cancel()
    return {"pause_s": paused, "pause_blocked_ms_max": 1e3 * await watching, "merged_s": all_merged}


class Member:
    """A worker that writes its groups in flight within its own time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def freeze(self, _step: int) -> None:
        """Keep references to the groups."""

    async def write_in_flight(self, _step: int, _folder: Path) -> dict[str, SavedGroup]:
        await asyncio.sleep(self.seconds)
        return {}


async def measure_snapshot(members: int) -> dict[str, float]:
    """Time the snapshot of a checkpoint, on the driver's side: from the pause until all workers have written."""
    config = validate({"model": {"path": "model"}, "data": {"train": "train.jsonl"}})
    sync: Any = SimpleNamespace(members={n: Member((1 + n) / members) for n in range(members)})
    sync.on = lambda replica, call: call(sync.members[replica])
    parts: Any = dict.fromkeys(("queue", "rollouts", "trainers", "replicas", "monitor", "recorder"))
    subject = Checkpointer(config, sync=sync, **parts)
    began = time.perf_counter()
    await asyncio.gather(*(subject.freeze(1, replica) for replica in sync.members))
    await subject._write_in_flight(Path("unused"), 1, subject._frozen)
    return {f"snapshot_s_{members}_members": time.perf_counter() - began}


def main() -> None:
    """Run the measurements and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16_384)
    options = parser.parse_args()
    rows = distinct_rows(PROMPT_TOKENS + 2 * options.tokens)
    found = measure_checks(rows[: PROMPT_TOKENS + options.tokens])
    found |= asyncio.run(measure_pause(options.calls, options.tokens, rows))
    found |= asyncio.run(measure_snapshot(64))
    print(json.dumps({key: float(f"{value:.3g}") for key, value in found.items()}))


if __name__ == "__main__":
    main()
