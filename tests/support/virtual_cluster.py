"""A run on many hosts in one process and in virtual time, to see what its driver and its queue do.

Real: the training loop with all that it owns (monitor, records, weight syncs, canary, supervision of replicas), the
queue's client, actor, broker and journal, and the rollout workers' end of the queue. Scripted: engines, which take time
and sample nothing; the trainer's ranks; Ray (``metered_calls``), and its placement of actors. A group is its metadata,
with the numbers that a real one of its size has. Its message does not exist.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import structlog
from prometheus_client import generate_latest

from async_rl.config.loading import validate
from async_rl.config.schema import RunConfig
from async_rl.data.dataset import Dataset
from async_rl.data.prompts import Row
from async_rl.driver import actors
from async_rl.driver import loop as loop_module
from async_rl.driver import recorder as recorder_module
from async_rl.driver.actors import RolloutHandle
from async_rl.driver.loop import TrainingLoop
from async_rl.driver.places import Place
from async_rl.driver.recorder import Recorder
from async_rl.queue.actor import QueueActor, begin
from async_rl.queue.client import QueueClient
from async_rl.queue.journal import FileJournal
from async_rl.queue.start import build_broker
from tests.support import virtual_time
from tests.support.metered_calls import Handle, Meter, meter_tasks
from tests.support.virtual_actors import PROMPT_TOKENS, QUIET, RANKS, RESPONSES, SPEC, Rank, Replica, Size

# Steps until the driver is in its stride.
WARM = 2
MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": SPEC.num_moe_layers, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 65536, "tie_word_embeddings": False,
    "num_experts": SPEC.num_experts, "num_experts_per_tok": SPEC.top_k, "moe_intermediate_size": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """What was counted until then."""

    at: float
    """Virtual time."""
    step: int
    meter: Meter
    written: int
    """Bytes of the lines of all steps in the run folder."""
    journal: int
    """Bytes that were appended to the queue's journal."""


@dataclass(frozen=True)
class Cost:
    """What a run cost: of the seconds in which nothing happens, and of the training steps."""

    size: Size
    second: Meter
    """What was counted in ``seconds`` before the first group is finished."""
    seconds: float
    steps: int
    """Training steps that ``during`` is of."""
    during: Meter
    during_s: float
    written: float
    """Bytes of each step's lines in the run folder."""
    journal: float
    """Bytes of each step in the queue's journal."""
    metric_lines: int
    """Lines that the driver's /metrics has."""

    POLLS = ("stats", "lease_poll")
    """Calls that are made every second, whatever happens. ``stats`` are also asked for at each step."""
    CANARY = ("wake_and_score", "probed_routing", "logprobs")
    """Calls with the routed experts of the canary's probe, whose bytes are counted apart."""

    def calls_per_second(self, side: str = "driver") -> float:
        return sum(self._of(self.second.calls, side).values()) / self.seconds

    def bytes_per_second(self, side: str = "driver") -> float:
        return sum(self._of(self.second.nbytes, side).values()) / self.seconds

    def us_per_second(self, side: str = "driver") -> float:
        """Return microseconds of the processor in the code of a side, that of asyncio and Ray not included."""
        return self.second.ns[side] / 1e3 / self.seconds

    def lines_per_second(self, side: str = "driver") -> float:
        return self.second.lines[side] / self.seconds

    def calls_per_step(self, side: str = "driver") -> float:
        return sum(self.by_method("calls", side).values())

    def bytes_per_step(self, side: str = "driver") -> float:
        return sum(self.by_method("nbytes", side).values()) - self.canary_bytes_per_step()

    def canary_bytes_per_step(self) -> float:
        return sum(count for method, count in self.by_method("nbytes").items() if method in self.CANARY)

    def us_per_step(self, side: str = "driver") -> float:
        return (self.during.ns[side] / 1e3 - self.us_per_second(side) * self.during_s) / self.steps

    def lines_per_step(self, side: str = "driver") -> float:
        return (self.during.lines[side] - self.lines_per_second(side) * self.during_s) / self.steps

    def by_method(self, what: str, side: str = "driver") -> dict[str, float]:
        """Return calls or nbytes of each step by method, without what is done every second."""
        found = self._of(getattr(self.during, what), side)
        return {method: count / self.steps for method, count in found.items() if method not in self.POLLS}

    @staticmethod
    def _of(counts: Mapping[tuple[str, str], int], side: str) -> dict[str, int]:
        return {method: count for (caller, method), count in counts.items() if caller == side and count}


class _Places:
    """Stands in for ``driver.places``."""

    one_host = False

    def __init__(self, config: RunConfig) -> None: ...

    def reserved(self) -> dict[str, Any]:
        return {}

    async def free(self) -> str:
        return ""

    async def of_trainer(self) -> list[Place]:
        return [Place(None)] * RANKS

    def of_replica(self, replica: int) -> Place:
        return Place(None)

    async def placed(self, replica: int) -> None: ...

    async def has_left(self, replica: int, error: BaseException) -> bool:
        return False

    async def until_gone(self, replica: int) -> None:
        await asyncio.Event().wait()

    def give_up(self, replica: int) -> None: ...

    def release(self) -> None: ...


class _NoMessages:
    """Stands in for the driver's ``queue.fetcher``, which has nothing to read."""

    def __init__(self, config: RunConfig) -> None: ...

    def messages(self, payloads: Any) -> dict[str, Any]:
        return {}

    def excerpts(self, responses: Any) -> list[Any]:
        return []


class _Journal(FileJournal):
    """Counts what is appended, which a compaction does not take away."""

    appended = 0

    def append(self, event: Any) -> None:
        before = self.size()
        super().append(event)
        self.appended += self.size() - before


class _Loop(TrainingLoop):
    """A training loop that notes moments."""

    count: Any
    counting: Any

    async def _train(self) -> None:
        self.moments: list[Moment] = []
        with self.counting:
            noting = asyncio.ensure_future(self._note_quiet())
            await super()._train()
            await noting

    async def _note_quiet(self) -> None:
        for before, until in zip((0.0, *QUIET), QUIET, strict=False):
            await asyncio.sleep(until - before)
            self.moments.append(self.count(self._step))

    async def _train_step(self) -> None:
        if self._step == WARM:
            self.moments.append(self.count(self._step))
        await super()._train_step()
        if self._step == self._config.trainer.steps:
            self.moments.append(self.count(self._step))


def settings(size: Size, folder: Path, steps: int) -> RunConfig:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MODEL))
    return validate(
        {
            "name": "run",
            "runs": str(folder / "runs"),
            "model": {"path": str(folder), "dtype": "bfloat16"},
            "data": {"train": "train.jsonl", "max_prompt_tokens": PROMPT_TOKENS},
            "rollout": {"replicas": size.replicas, "n": RESPONSES, "max_response_tokens": 2 * size.tokens},
            "queue": {"max_bytes": 10**15},
            "sync": {"backend": "object_store"},
            "trainer": {"steps": steps, "groups_per_step": size.groups, "parallel": {"dp": RANKS}},
            "metrics": {"samples_per_step": 0},
        }
    )


@contextlib.contextmanager
def _parts(size: Size, meter: Meter, journals: list[_Journal]) -> Iterator[None]:
    """Have the driver get scripted actors, and a queue in this process."""

    def start_queue(config: RunConfig, source: Any, *, journal: Path, state: Any) -> QueueClient:
        broker = build_broker(config, source)
        begin(FileJournal(journal, create=True), broker)
        journals.append(_Journal(journal))
        return QueueClient(Handle(QueueActor(broker, lambda: journals[0]), "queue", meter))

    def start_trainer(config: RunConfig, rank: int, place: Place, *, one_host: bool) -> Handle:
        return Handle(Rank(size), "trainer", meter)

    def start_rollout_worker(config: RunConfig, replica: int, queue: Any, place: Place) -> RolloutHandle:
        limit = int(1.5 * size.groups)
        return RolloutHandle(Handle(Replica(size, replica, queue, -(-limit // size.replicas)), "rollout", meter))

    with (
        patch.object(loop_module, "start_queue", start_queue),
        patch.object(loop_module, "Places", _Places),
        patch.object(recorder_module, "Fetcher", _NoMessages),
        patch.object(actors, "start_trainer", start_trainer),
        patch.object(actors, "start_rollout_worker", start_rollout_worker),
    ):
        yield


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Have no garbage collected: a collection looks through the objects of all sides, and would be one side's time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure(size: Size, folder: Path, *, steps: int = WARM + 2, lines: bool = False) -> Cost:
    """Make a run of so many training steps, and return what it cost; ``lines`` are counted where that is asked for."""
    meter, journals = Meter(), []
    config = settings(size, folder, steps)
    rows = tuple(Row(line, "", np.zeros(PROMPT_TOKENS, np.int32), {}) for line in range(1, 1 + 4 * steps * size.groups))
    dataset = Dataset(Path("train.jsonl"), rows, (), "digest")

    async def main(loop: virtual_time.VirtualLoop) -> tuple[list[Moment], int]:
        meter_tasks(loop, meter)
        with Recorder(config, loop.time(), str) as recorder:
            run = _Loop(config, recorder, dataset, [])
            run.count = functools.partial(count, recorder, loop)
            run.counting = meter.counting_lines() if lines else contextlib.nullcontext()
            await loop.create_task(run.run())
            return run.moments, len(generate_latest(recorder._metrics.registry).splitlines())

    def count(recorder: Recorder, loop: virtual_time.VirtualLoop, step: int) -> Moment:
        files = [config.run_dir / name for name in ("metrics.jsonl", "trained.jsonl")]
        written = sum(file.stat().st_size for file in files if file.exists())
        return Moment(loop.time(), step, meter.copy(), written, journals[0].appended)

    silence = contextlib.redirect_stdout(io.StringIO())
    with _parts(size, meter, journals), silence, structlog.testing.capture_logs(), _no_collections():
        moments, metric_lines = virtual_time.run(main)
    quiet, still_quiet, warm, end = moments
    done = end.step - warm.step
    return Cost(
        size,
        still_quiet.meter.since(quiet.meter),
        still_quiet.at - quiet.at,
        done,
        end.meter.since(warm.meter),
        end.at - warm.at,
        (end.written - warm.written) / done,
        (end.journal - warm.journal) / done,
        metric_lines,
    )
