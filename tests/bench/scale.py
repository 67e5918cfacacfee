"""What a replica's process and the driver pay for responses of real size: 48 MoE layers, top 8 of 128, thousands of
tokens.

The real worker, gate and partial rollouts around a scripted engine that samples in no time; no Ray, no model. Then the
real training loop and records between scripted parts, for a step whose messages have 13 GB and are not to be read. The
last line of stdout is one JSON object:

    check_s_per_gb            seconds to check a gigabyte of routed experts where they arrive
    check_over_sort           that time over the time of sorting the rows, which finds repeated experts as well
    pause_s_256x16k           from the start of a pause, with every call under way, to its end
    pause_blocked_ms_max      longest time that the event loop did not run, from that start until all answers are merged
    merged_s                  from that start until all answers are merged
    engine_pause_s            the pause of the scripted engine by itself, with the same calls and no worker
    engine_blocked_ms_max     longest time that it keeps the event loop, until all its calls have ended
    snapshot_s_64_members     until 64 workers have written their groups in flight, of which the slowest takes a second
    resume_delay_s_with_13gb_step   from the end of the transfer until the engines resume, after a step of 64 groups of
                                    16 responses of 32,768 tokens
    resume_delay_s_with_small_step  the same after as many responses of 32 tokens

and, unless --no-run is given, of what ``driver_at_scale`` prints about a whole run on Ray:

    driver_bytes_per_step, driver_loop_blocked_ms_max

pause_s_256x16k is named after --calls and --tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from async_rl.config.loading import validate
from async_rl.config.schema import RunConfig
from async_rl.driver.checkpoint import Checkpointer
from async_rl.driver.loop import Leased, TrainingLoop
from async_rl.driver.push import Pusher
from async_rl.driver.recorder import Recorder
from async_rl.metrics.records import StepReport, SyncRecord
from async_rl.queue.records import GroupMeta, Ticket
from async_rl.rollout import routing_policies
from async_rl.rollout.actor import RolloutReplica
from async_rl.rollout.engine.interface import Sampling
from async_rl.rollout.moments import SavedGroup
from async_rl.types import ExpertIds, Int32Array, Prompt, RoutingSpec
from async_rl.weights.sync_attempt import AllPaused
from tests.support.scripted_engine import Layout, Script, ScriptedEngine
from tests.support.step_records import step_report

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
    longest = 0.0
    while not until.is_set():
        due = time.perf_counter() + 0.001
        await asyncio.sleep(0.001)  # without one, this would take processor and interpreter from the threads
        longest = max(longest, time.perf_counter() - due)
    return longest


def scripted(calls: int, tokens: int, rows: ExpertIds) -> tuple[RunConfig, Engine]:
    """Return an engine, and settings for it, whose calls sample so many tokens at once, four times."""
    config = validate(
        {
            "model": {"path": "model"},
            "data": {"train": "train.jsonl", "max_prompt_tokens": PROMPT_TOKENS},
            "rollout": {"n": GROUP_SIZE, "max_num_seqs": calls, "max_response_tokens": 4 * tokens},
        }
    )
    layout = Layout(SPEC, frozenset({0}), vocab_size=150_000)
    engine = Engine(config, script=Script(length=4 * tokens, tokens_per_turn=tokens, turn_s=0.01, layout=layout))
    engine.rows = rows
    return config, engine


async def sampled(engine: Engine, tokens: int, asking: asyncio.Future[Any]) -> None:
    """Wait until the engine has sampled so many tokens. Raises what ends those that ask it before that."""
    while engine.sampled < tokens:
        await asyncio.sleep(0.001)
        if asking.done():
            asking.result()


async def measure_engine(calls: int, tokens: int, rows: ExpertIds) -> dict[str, float]:
    """Interrupt the same calls without a worker."""
    _, engine = scripted(calls, tokens, rows)
    ids, sampling = np.arange(PROMPT_TOKENS, dtype=np.int32), Sampling(1.0, 1.0)
    requests = [engine.generate(f"0-{i}.0/0/0", ids, sampling, 4 * tokens) for i in range(calls)]
    ended = asyncio.gather(*requests)
    await sampled(engine, calls * tokens, ended)
    over = asyncio.Event()
    watching = asyncio.create_task(lateness(over))
    began = time.perf_counter()
    await engine.pause("abort")
    paused = time.perf_counter() - began
    await ended
    over.set()
    return {"engine_pause_s": paused, "engine_blocked_ms_max": 1e3 * await watching}


async def measure_pause(calls: int, tokens: int, rows: ExpertIds) -> dict[str, float]:
    """Interrupt all calls of a replica as a weight sync does, when each has sampled that many tokens."""
    config, engine = scripted(calls, tokens, rows)
    queue: Any = Endless()
    rewards: Any = SimpleNamespace(whole_groups=False)  # no response ends, so it is not called
    replica = RolloutReplica(config, 0, queue, engine, None, rewards)
    work = asyncio.create_task(replica.run())
    await sampled(engine, calls * tokens, work)
    merged = asyncio.Event()
    watching = asyncio.create_task(lateness(merged))
    began = time.perf_counter()
    await replica.pause()
    paused = time.perf_counter() - began
    await replica._gate.wait_quiet()
    while merging := replica._worker.calls.merging:
        await asyncio.wait(merging.values())
    all_merged = time.perf_counter() - began
    merged.set()
    work.cancel()
    return {
        f"pause_s_{calls}x{tokens // 1024}k": paused,
        "pause_blocked_ms_max": 1e3 * await watching,
        "merged_s": all_merged,
    }


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


def leased_step(tokens: int, groups: int = 64, responses: int = 16) -> Leased:
    """Return the groups of a step whose responses have so many tokens; no message can be read."""
    nbytes = responses * tokens * (SPEC.num_moe_layers * SPEC.top_k + 12)
    each = (0.5,) * responses, (tokens,) * responses, (1,) * responses, (0,) * responses, ("stop",) * responses
    metas = [
        GroupMeta(f"0-{n}.0", responses * tokens, nbytes, 0, 0, responses, 0, (tokens,) * responses, "", *each)
        for n in range(groups)
    ]
    return [(meta, [object()]) for meta in metas]


async def done(*_: Any, **__: Any) -> None:
    """Stand for a part of the run that is done at once."""


class ScriptedLoop(TrainingLoop):
    """The real training step and weight sync; what they call is done at once, but for the records."""

    def __init__(self, recorder: Recorder, step: Leased) -> None:
        parts: Any = SimpleNamespace
        self._config = recorder._config
        self._recorder, self._trained = recorder, step
        recorder.samples = parts(before_ack=done, begin=done)  # read once the engines have resumed
        self._step = 0
        self._monitor = monitor = parts(phase=lambda *_: contextlib.nullcontext())
        self._checkpointer = checkpointer = parts(due=lambda _: False)
        self._queue = queue = parts(ack=done, advance=done)
        self._pusher = Pusher(
            0,
            0,
            queue=queue,
            sync=parts(run=self._transferred, needs_trainer=False),
            replicas=parts(add_waiting_members=done, on_sync_done=lambda: None),
            evaluator=parts(finished=done, while_paused=done, pauses=lambda *_: False, beside_rollouts=lambda *_: None),
            checkpointer=checkpointer,
            monitor=monitor,
            recorder=recorder,
        )
        self.delays: list[float] = []

    async def _update(self, leased: Leased) -> list[StepReport]:
        await self._pusher.finished(self._step + 1)
        leased += self._trained
        report: StepReport = step_report(version=self._pusher.version)
        return [report]

    async def _transferred(self, version: int, *, all_paused: AllPaused, **_: Any) -> SyncRecord:
        await all_paused()
        # The step is recorded meanwhile, on the loop that is to notice the end.
        there = await asyncio.to_thread(lambda: time.sleep(0.001) or time.perf_counter())
        self.delays.append(time.perf_counter() - there)
        return SyncRecord(policy_version=version, seconds=0.1)

    async def trained(self, steps: int) -> float:
        """Train so many steps; return the median delay of a resume."""
        for _ in range(steps):
            await self._train_step()
        await self._pusher.finished(self._step)
        return statistics.median(self.delays)


def measure_resume(steps: int = 20) -> dict[str, float]:
    """Time the driver's part of a resume after a large step, and after one of as many short responses."""
    found: dict[str, float] = {}
    for name, tokens in (("small", 32), ("13gb", 32_768)):
        with tempfile.TemporaryDirectory() as folder:
            tree = {"runs": folder, "model": {"path": "model"}, "data": {"train": "t"}, "trainer": {"streaming": False}}
            config = validate(tree | {"metrics": {"samples_per_step": 0}})
            with Recorder(config, time.monotonic(), lambda _: "") as recorder:
                recorder.training_begins()
                found[f"resume_delay_s_with_{name}_step"] = asyncio.run(
                    ScriptedLoop(recorder, leased_step(tokens)).trained(steps)
                )
    return found


def measure_run() -> dict[str, float]:
    """Return what a whole run hands to the driver, from a process of its own."""
    command = [sys.executable, "-m", "tests.bench.driver_at_scale"]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(printed.strip().splitlines()[-1])
    return {key: found[key] for key in ("driver_bytes_per_step", "driver_loop_blocked_ms_max")}


def main() -> None:
    """Run the measurements and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--no-run", action="store_true", help="leave out what needs Ray")
    options = parser.parse_args()
    rows = distinct_rows(PROMPT_TOKENS + 4 * options.tokens)
    found = measure_checks(rows[: PROMPT_TOKENS + options.tokens])
    found |= asyncio.run(measure_pause(options.calls, options.tokens, rows))
    found |= asyncio.run(measure_engine(options.calls, options.tokens, rows))
    found |= asyncio.run(measure_snapshot(64))
    found |= measure_resume()
    if not options.no_run:
        found |= measure_run()
    print(json.dumps({key: float(f"{value:.3g}") for key, value in found.items()}))


if __name__ == "__main__":
    main()
