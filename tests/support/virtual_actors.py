"""The rollout workers and trainer ranks of a run in virtual time, as its driver calls them. They compute nothing."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from async_rl.queue.handover import Outbox
from async_rl.queue.records import GroupMeta, Ticket
from async_rl.rollout.engine.interface import Score
from async_rl.rollout.stats import WorkerStats, worker_id
from async_rl.types import ExpertIds, Float32Array, Int32Array, RoutingSpec
from async_rl.weights.buckets import checksum
from tests.support.metered_calls import Handle, Message
from tests.support.step_records import step_report

SPEC = RoutingSpec(num_moe_layers=48, top_k=8, num_experts=128)
RESPONSES, PROMPT_TOKENS = 8, 512
REPLICAS_PER_HOST = 8
RANKS = 8
# Routed experts, and id, log-prob and version.
TOKEN_BYTES = SPEC.num_moe_layers * SPEC.top_k * SPEC.dtype.itemsize + 12
LOGPROB = -3.0
TOKEN_S = 0.0005
TRAIN_S = 1.0
# Before the first group is finished, nothing happens but what happens every second.
QUIET = (2.0, 7.0)


@dataclass(frozen=True)
class Size:
    """How large a run is."""

    hosts: int
    groups: int
    """Groups of a training step."""
    tokens: int
    """Mean length of a response."""

    @property
    def replicas(self) -> int:
        return self.hosts * REPLICAS_PER_HOST


class _Outbox(Outbox):
    """The worker's end of the queue, whose groups are metadata from the start."""

    async def _encoded(self, group: Any) -> Any:
        return group, Message()


class Replica:
    """A rollout worker, as the driver calls it."""

    def __init__(self, size: Size, number: int, queue: Handle, capacity: int) -> None:
        self._size, self._outbox = size, _Outbox(queue)
        self._free = capacity
        self._freed = asyncio.Event()
        self._chance = random.Random(number)
        self._stats = WorkerStats(number)
        rows = (64, SPEC.num_moe_layers, SPEC.top_k)
        self._routing = np.random.default_rng(0).integers(0, SPEC.num_experts, rows, dtype=SPEC.dtype)

    async def start(self) -> None: ...

    async def groups(self) -> AsyncIterator[Any]:
        async for item in self._outbox.stream(self._run()):
            yield item

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            quiet_until = time.monotonic() + QUIET[1]
            while True:
                while not self._free:
                    self._freed.clear()
                    await self._freed.wait()
                for ticket in await self._outbox.take(worker_id(self._stats.replica), self._free):
                    self._free -= 1
                    tasks.create_task(self._group(ticket, max(0.0, quiet_until - time.monotonic())))

    async def _group(self, ticket: Ticket, quiet: float) -> None:
        lengths = [int(self._size.tokens * self._chance.uniform(0.5, 1.5)) for _ in range(RESPONSES)]
        await asyncio.sleep(quiet + TOKEN_S * max(lengths))
        await self._outbox.put(self._meta(ticket, lengths))
        self._stats.groups += 1
        self._stats.sampled_tokens += sum(lengths)
        self._free += 1
        self._freed.set()

    def _meta(self, ticket: Ticket, lengths: Sequence[int]) -> Any:
        whole = [PROMPT_TOKENS + length for length in lengths]
        version, cuts = self._stats.version, self._stats.version - ticket.version
        return GroupMeta(
            *(ticket.group_id, sum(whole), sum(whole) * TOKEN_BYTES, ticket.version, version),
            num_trajectories=RESPONSES,
            num_partial=RESPONSES if cuts else 0,
            lengths=tuple(whole),
            rewards=tuple(self._chance.random() for _ in lengths),
            response_tokens=tuple(lengths),
            segments=(1 + cuts,) * RESPONSES,
            interruptions=(cuts,) * RESPONSES,
            finish_reasons=("stop",) * RESPONSES,
        )

    async def accepted(self, group_id: str) -> None:
        self._outbox.accepted(group_id)

    def stats(self) -> WorkerStats:
        self._stats.busy_s = time.monotonic()
        return self._stats

    async def pause(self, *, end_calls: bool) -> None: ...

    async def receive(self, update: Mapping[str, Any], version: int) -> None:
        self._stats.version = version

    async def resume(self) -> None: ...

    async def wake_and_score(self, sequences: Sequence[Int32Array]) -> list[Score]:
        self._probed = [rows for score in await self.score(sequences) if (rows := score.routed_experts) is not None]
        return [Score(logprobs(ids), None, checksum(rows)) for ids, rows in zip(sequences, self._probed, strict=True)]

    async def probed_routing(self) -> list[ExpertIds]:
        return self._probed

    async def score(self, sequences: Sequence[Int32Array]) -> list[Score]:
        return [Score(logprobs(ids), self._routing[: len(ids) - 1]) for ids in sequences]

    async def stop(self) -> None: ...

    async def shutdown(self) -> None: ...


class Rank:
    """A rank of the trainer, as the driver calls it."""

    def __init__(self, size: Size) -> None:
        self._size = size
        self._round = 0

    async def open_store(self) -> str:
        return "address"

    async def start(self, checkpoint: Path | None, store: str) -> None: ...

    async def connect(self, replicas: Sequence[Any]) -> None: ...

    async def fetch(self, share: Any) -> list[str]:
        return []

    async def accumulate(self, share: Sequence[Any], version: int, oldest_version: int, *, first: bool) -> None:
        self._version = version
        await asyncio.sleep(TRAIN_S * sum(map(len, share)) * RANKS / self._size.groups)

    async def finish_step(self) -> Any:
        return step_report(version=self._version, groups=self._size.groups)

    async def stage_weights(self) -> list[dict[str, Any]]:
        """Return what ``WeightSender.stage`` returns: for each replica the file of its host."""
        self._round += 1
        files = [
            {"pid": 100_000 + host, "fd": 12, "nbytes": 60_000_000_000, "round": 2**48 + self._round}
            for host in range(self._size.hosts)
        ]
        return [files[replica // REPLICAS_PER_HOST] for replica in range(self._size.replicas)]

    async def logprobs(self, sequences: Sequence[Int32Array], routed_experts: Any) -> list[Float32Array]:
        return [logprobs(ids) for ids in sequences]

    async def export(self, folder: Path) -> None: ...

    async def shutdown(self) -> None: ...


def logprobs(ids: Int32Array) -> Float32Array:
    return np.full(len(ids) - 1, LOGPROB, np.float32)
