"""The throughput of put, lease and ack through the queue's actor, against bare ``ray.put`` and ``ray.get``.

Both ways move the same encoded groups (one trajectory of 2,048 tokens with [2047, 48, 8] routing each) into the
object store and out of it in batches of 16, a training step's worth, from one process. The queue's way puts each
group, leases it, and acknowledges it; its producers and its consumer run side by side, as workers and trainer
do. The two ways take turns; each round gives one ratio, and the median counts. The last line of stdout is one JSON
object:

    throughput_over_ray   groups per second through the queue over groups per second bare
    groups_per_s          through the queue
    ray_groups_per_s      bare
    group_bytes           size of one encoded group
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time

import numpy as np
import ray

from async_rl.queue.actor import QueueActor
from async_rl.queue.broker import Broker
from async_rl.queue.broker_state import BrokerSettings
from async_rl.queue.client import QueueClient
from async_rl.queue.codec import encode
from async_rl.queue.records import GroupMeta, Ticket
from async_rl.queue.start import MAX_CONCURRENCY
from async_rl.types import Int32Array, Prompt, RoutingSpec, Segment, Trajectory
from tests.support.groups import grouped

BATCH, BATCHES, ROUNDS = 16, 12, 9
PRODUCERS = 2  # as two workers would: one stores while the other waits for the actor
PROMPT, RESPONSE, SPEC = 512, 1536, RoutingSpec(num_moe_layers=48, top_k=8, num_experts=128)


class Endless:
    """A dataset without end, of prompts that weigh nothing."""

    def __init__(self) -> None:
        self.row = 0

    def next(self) -> Prompt:
        self.row += 1
        return Prompt(f"0-{self.row}", self.row, "", np.zeros(1, dtype=np.int32))

    def give_back(self, prompt: Prompt, *, defer: bool = False) -> None:
        raise AssertionError(f"nothing is given back here, but {prompt.prompt_id} was")


def make_message(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)

    def ids(n: int) -> Int32Array:
        return rng.integers(0, 150_000, n).astype(np.int32)

    prompt = Prompt("0-1", 1, "a prompt", ids(PROMPT))
    shape = (PROMPT + RESPONSE - 1, SPEC.num_moe_layers, SPEC.top_k)
    trajectory = Trajectory(
        trajectory_id="0-1.0/0",
        prompt_ids=prompt.token_ids,
        response_ids=ids(RESPONSE),
        logprobs=rng.normal(size=RESPONSE).astype(np.float32),
        versions=np.zeros(RESPONSE, dtype=np.int32),
        segments=(Segment(0, RESPONSE, 0),),
        finish_reason="stop",
        routed_experts=rng.integers(0, SPEC.num_experts, shape, dtype=np.uint8),
        routing_spec=SPEC,
    )
    return encode(grouped("0-1.0", prompt, [trajectory]))


def bare(messages: list[np.ndarray]) -> float:
    """Return groups per second of ray.put and ray.get alone."""
    began = time.perf_counter()
    for _ in range(BATCHES):
        ray.get([ray.put(message) for message in messages])
    return BATCH * BATCHES / (time.perf_counter() - began)


async def through(client: QueueClient, messages: list[np.ndarray], tickets: list[Ticket]) -> float:
    """Return groups per second of put, lease, get and ack."""

    async def put(ticket: Ticket, message: np.ndarray) -> None:
        meta = GroupMeta(ticket.group_id, 2048, message.nbytes, ticket.version, ticket.version, 1, 0)
        await client.put_stored(meta, [ray.put(message)])

    async def produce(first: int) -> None:
        for i in range(first, len(tickets), PRODUCERS * BATCH):
            await asyncio.gather(*map(put, tickets[i : i + BATCH], messages))

    async def consume() -> None:
        for _ in range(BATCHES):
            leased = await client.lease("trainer", BATCH)
            ray.get([reference for _, (reference,) in leased])
            await client.ack([meta.group_id for meta, _ in leased])

    began = time.perf_counter()
    await asyncio.gather(*(produce(i * BATCH) for i in range(PRODUCERS)), consume())
    return BATCH * BATCHES / (time.perf_counter() - began)


async def measure() -> dict[str, float]:
    messages = [make_message(seed) for seed in range(BATCH)]
    groups = BATCH * BATCHES
    settings = BrokerSettings(
        required_groups=BATCH,
        window_limit=groups,
        max_staleness=0,
        on_stale="mask",
        max_groups=4 * BATCH,
        max_bytes=4 * BATCH * messages[0].nbytes,
    )
    actor_class = ray.remote(num_cpus=0, max_concurrency=MAX_CONCURRENCY)(QueueActor)
    client = QueueClient(actor_class.remote(Broker(Endless(), settings)))
    alone, queued = [], []
    for version in range(1, ROUNDS + 2):
        tickets = await client.take("worker", groups)
        alone.append(bare(messages))
        queued.append(await through(client, messages, tickets))
        await client.advance(version)
    ratios = [q / a for q, a in zip(queued[1:], alone[1:], strict=True)]  # the first round warms up
    return {
        "throughput_over_ray": round(statistics.median(ratios), 3),
        "groups_per_s": round(statistics.median(queued[1:]), 1),
        "ray_groups_per_s": round(statistics.median(alone[1:]), 1),
        "group_bytes": messages[0].nbytes,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=2**30, logging_level="error")
    try:
        result = asyncio.run(measure())
    finally:
        ray.shutdown()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
