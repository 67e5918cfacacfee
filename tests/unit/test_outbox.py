"""The worker's end of the stream of finished groups: how much leaves it while the queue accepts nothing."""

import asyncio

import numpy as np
import pytest

from async_rl.queue import client as client_module
from async_rl.queue.handover import Outbox
from async_rl.queue.records import GroupMeta
from async_rl.types import Prompt, Segment, Trajectory
from tests.support.groups import grouped

TOKENS = 1000


def group(number):
    prompt = Prompt(f"0-{number}", number, "x", np.zeros(3, np.int32), {})
    trajectory = Trajectory(
        trajectory_id=f"0-{number}.0/0",
        prompt_ids=prompt.token_ids,
        response_ids=np.ones(TOKENS, np.int32),
        logprobs=np.full(TOKENS, -0.5, np.float32),
        versions=np.zeros(TOKENS, np.int32),
        segments=(Segment(0, TOKENS, 0),),
        finish_reason="stop",
    )
    return grouped(f"0-{number}.0", prompt, [trajectory])


async def test_invariant_6_a_full_queue_stops_the_worker_from_filling_the_object_store(monkeypatch):
    """Each group waits as it is until there is a place for its message. None is lost, and their order is kept."""
    encoded, real = [], client_module.encode

    def counting(one, *arguments):
        encoded.append(one.group_id)
        return real(one, *arguments)

    monkeypatch.setattr(client_module, "encode", counting)
    outbox, left = Outbox(None), []

    async def work():
        await asyncio.gather(*(outbox.put(group(number)) for number in range(64)))

    async def read():
        # As Ray does: it takes what a generator has as soon as it is there.
        async for item in outbox.stream(work()):
            if isinstance(item, GroupMeta):
                left.append(item.group_id)

    reading = asyncio.create_task(read())
    async with asyncio.timeout(5):
        while len(left) < 2:
            await asyncio.sleep(0)
    await asyncio.sleep(0.1)
    assert len(left) == len(encoded) == 2, "the queue has accepted none"
    for number in range(64):
        async with asyncio.timeout(5):
            while len(left) <= number:
                await asyncio.sleep(0)
        assert len(left) <= number + 2
        outbox.accepted(left[number])
    await asyncio.wait_for(reading, 5)
    assert sorted(left) == sorted(f"0-{number}.0" for number in range(64))


async def test_a_group_that_cannot_be_encoded_does_not_keep_its_place(monkeypatch):
    def failing(*_):
        raise ValueError("it is not JSON-like")

    monkeypatch.setattr(client_module, "encode", failing)
    outbox = Outbox(None)
    for number in range(5):
        with pytest.raises(ValueError, match="JSON-like"):
            await asyncio.wait_for(outbox.put(group(number)), 5)
