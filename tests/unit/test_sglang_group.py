"""The trainer's end of a process group of SGLang's, over gloo: joined as SGLang's ranks join, broadcast, destroyed.

With a real server: ``tests/integration/test_sglang_broadcast.py``.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch.distributed import PrefixStore, distributed_c10d, rendezvous

from async_rl.errors import WeightSyncError
from async_rl.runtime.addresses import hold_port
from async_rl.weights.sglang_group import SenderGroup, group_name, packs
from async_rl.weights.shm_file import TensorMeta

LIMIT_S = 60.0  # nothing waits for it
SHORT_S = 2.0  # for what ends by it


@pytest.fixture(autouse=True)
def _loopback(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def join(port, world_size):
    """What SGLang's init_custom_process_group does, as rank 1."""
    timeout, name = timedelta(minutes=30), group_name(port)
    store, rank, world_size = next(rendezvous(f"tcp://127.0.0.1:{port}", 1, world_size, timeout=timeout))
    store.set_timeout(timeout)
    group, _ = distributed_c10d._new_process_group_helper(
        world_size, rank, [], "gloo", PrefixStore(name, store), group_name=name, timeout=timeout
    )
    distributed_c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


def meet(world_size=2, timeout_s=LIMIT_S):
    """A sender and the group of one rank that joined it."""
    listening = hold_port("127.0.0.1")
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(join, listening.getsockname()[1], world_size)
        try:
            sender = SenderGroup("127.0.0.1", listening, world_size, backend="gloo", timeout_s=timeout_s)
        except WeightSyncError:
            # It waits for half an hour, unless the store is closed.
            assert joined.exception(LIMIT_S) is not None
            raise
        return sender, joined.result()


def test_what_is_sent_arrives_in_order():
    sender, group = meet()
    sent = [torch.arange(n, dtype=torch.uint8) for n in (3, 200, 1)]
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(lambda: [sender.broadcast(tensor, src=0) for tensor in sent])
        for tensor in sent:
            got = torch.empty_like(tensor)
            torch.distributed.broadcast(got, src=0, group=group)
            assert torch.equal(got, tensor)
        sending.result()
    torch.distributed.destroy_process_group(group)
    sender.destroy()
    sender.destroy()
    with pytest.raises(RuntimeError, match="destroyed"):
        sender.broadcast(sent[0], src=0)


def test_a_rank_that_does_not_come_ends_the_meeting_for_all():
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"not all ranks have joined the process group within 2 s"):
        meet(world_size=3, timeout_s=SHORT_S)
    assert time.monotonic() - began < LIMIT_S


def test_a_receiver_ends_when_the_sender_leaves_in_the_middle():
    sender, group = meet()
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(torch.distributed.broadcast, torch.empty(9), src=0, group=group)
        time.sleep(0.1)
        sender.destroy()
        with pytest.raises(RuntimeError):
            receiving.result(LIMIT_S)
    torch.distributed.destroy_process_group(group)


def send_without_end(sender):
    for _ in range(1000):  # what fits into buffers is sent without a receiver
        sender.broadcast(torch.zeros(2**20), src=0)


def test_a_broadcast_that_blocks_ends_at_the_limit_if_not_when_it_is_destroyed():
    sender, group = meet(timeout_s=SHORT_S)
    threading.Timer(0.5, sender.destroy).start()
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        send_without_end(sender)
    assert time.monotonic() - began < LIMIT_S
    torch.distributed.destroy_process_group(group)


def test_packs_end_with_the_tensor_that_takes_them_above_the_limit():
    table = [TensorMeta(f"w{n}", "float32", (n,)) for n in (1, 2, 3, 9, 1)]
    for limit, expected in {0: [[1], [2], [3], [9], [1]], 12: [[1, 2, 3], [9], [1]], 99: [[1, 2, 3, 9, 1]]}.items():
        assert [[meta.shape[0] for meta in pack] for pack in packs(table, limit)] == expected
    assert list(packs([], 5)) == []
