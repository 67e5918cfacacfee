"""sync.backend nccl with a real SGLang server, whose own endpoints take part, on a CPU over gloo in place of NCCL.

The trainer's end is vLLM's packed producer under our classes, as in ``test_nccl_transfer.py``; CUDA's streams are
stand-ins, groups and broadcasts are real.
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import pytest_asyncio
from safetensors.torch import load_file

from async_rl.errors import EngineDied, WeightSyncError
from async_rl.runtime.addresses import hold_port
from async_rl.weights.canary import make_probe
from async_rl.weights.shm_file import TensorMeta
from tests.integration.engine_conformance import GREEDY, SHORT_PROMPT, reference, token_logprobs
from tests.support import nccl
from tests.support.engine_checkpoint import VOCAB, Pusher, engine_config, make_checkpoint, perturbed, running
from tests.support.needs import NEEDS_SGLANG

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    NEEDS_SGLANG,
]

LIMIT_S = 60.0  # nothing waits for it
SHORT_S = 3.0  # for what ends by it
PACK_BYTES = 100_000  # several packs


@pytest.fixture(scope="module", autouse=True)
def _gloo_on_loopback():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny_moe"), dense=())


@pytest.fixture(scope="module")
def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory):
    config = engine_config(folder, runs=tmp_path_factory.mktemp("runs"), engine="sglang")
    # Refused by the settings, for NCCL needs GPUs.
    return config.model_copy(update={"sync": config.sync.model_copy(update={"backend": "nccl"})})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(config):
    async with running(config) as engine:
        yield engine


@pytest_asyncio.fixture(loop_scope="module")
async def connect(engine, weights):
    """Connects a trainer to the engine, as often as it is called."""
    made = []

    async def _connect(*, limit_s=LIMIT_S, world_size=2, others=()):
        if made and made[-1].sender is not None:
            made[-1].sender.shutdown()
        pusher = Pusher(engine, weights, init_info(0, limit_s, world_size, others))
        pusher.version = engine.version
        made.append(pusher)
        await pusher.connect()
        return pusher

    with nccl.streams_on_cpu():
        yield _connect
        for pusher in made:
            if pusher.sender is not None:
                pusher.sender.shutdown()


def init_info(rank, limit_s, world_size, others=()):
    from async_rl.weights.vllm.nccl import TimedNCCLTrainerInitInfo
    from async_rl.weights.vllm.plugin import register

    register()
    listening = hold_port("127.0.0.1")
    return TimedNCCLTrainerInitInfo(
        rank=rank,
        master_address="127.0.0.1",
        master_port=listening.getsockname()[1],
        listening=listening,
        world_size=world_size,
        packed_buffer_size_bytes=PACK_BYTES,
        timeout_s=limit_s,
        others=list(others),
        torch_backend="gloo",
    )


async def scores(engine):
    return [score.logprobs for score in await engine.score(make_probe(0, VOCAB))]


def assert_same(found, expected):
    """But for what else was computed beside each."""
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


async def test_an_engine_computes_with_what_was_broadcast(engine, connect, weights, folder):
    """Three pushes, each of them by one request for each pack."""
    trainer = await connect()
    before = await scores(engine)
    posted = mock.AsyncMock(side_effect=engine._post)
    with mock.patch.object(engine._broadcasts, "_post", posted):
        for pushed in (perturbed(weights), perturbed(weights, seed=2), weights):
            assert await trainer.push(pushed) == engine.version
            forward = reference(folder, pushed)
            for sequence, found in zip(make_probe(0, VOCAB), await scores(engine), strict=True):
                np.testing.assert_allclose(found, token_logprobs(forward(sequence)[0], sequence), atol=1e-4)
    total = sum(tensor.nbytes for tensor in weights.values())
    assert total / PACK_BYTES / 2 < posted.await_count / 3 < total / PACK_BYTES + 1
    assert_same(await scores(engine), before)
    output = await engine.generate("stamped", SHORT_PROMPT, GREEDY, 4)
    assert set(output.versions.tolist()) == {trainer.version}


async def test_senders_of_two_stages_broadcast_in_turn_within_one_update(engine, connect, weights):
    """Rank 0 has the first half of the tensors, rank 2 the second, each with a group of its own."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from async_rl.weights.vllm.name_table import rows
    from async_rl.weights.vllm.nccl import Endpoint
    from async_rl.weights.vllm.source import StreamedSource

    pushed = perturbed(weights, seed=3)
    names = list(weights)
    halves = [{name: pushed[name] for name in part} for part in (names[: len(names) // 2], names[len(names) // 2 :])]
    info = init_info(2, LIMIT_S, 2)
    table = rows(TensorMeta.of(name, tensor) for name, tensor in halves[1].items())
    client = mock.Mock()  # rank 0 calls the engines
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(
            WeightTransferTrainerFactory.trainer_init, info, client=client, source=StreamedSource(Half(halves[1]))
        )
        pusher = Pusher(engine, halves[0], init_info(0, LIMIT_S, 2, [Endpoint("127.0.0.1", info.master_port, table)]))
        pusher.version = engine.version
        await pusher.connect()
        later = await asyncio.to_thread(second.result)
        await engine.pause("abort")
        sent = pool.submit(later.send_weights)
        await pusher.send(halves[0])
        await asyncio.to_thread(sent.result)
        await engine.resume()
    there = await scores(engine)
    pusher.sender.shutdown()
    later.shutdown()
    alone = await connect()
    await alone.push(weights)
    await alone.push(pushed)
    assert_same(await scores(engine), there)


class Half:
    """The tensors of one stage."""

    def __init__(self, tensors):
        self._tensors = tensors

    def metadata(self):
        from async_rl.models.names import Meta

        return [Meta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()]

    def __iter__(self):
        return iter(self._tensors.items())


async def test_a_sender_that_dies_in_the_middle_leaves_the_engine_paused_until_another_push(engine, connect, weights):
    trainer = await connect()
    await trainer.push(weights)
    before = await scores(engine)
    broadcast, count = trainer.sender.model_update_group.broadcast, iter(range(100))

    def die_at_the_second(tensor, src):
        if next(count) == 1:
            trainer.sender.model_update_group.destroy()
        broadcast(tensor, src)

    await engine.pause("abort")
    with (
        mock.patch.object(trainer.sender.model_update_group, "broadcast", die_at_the_second),
        pytest.raises((WeightSyncError, RuntimeError)),
    ):
        await trainer.send(perturbed(weights))
    assert engine.version != trainer.version
    async with asyncio.timeout(LIMIT_S):
        while engine._sync_failed == "it was not finished":  # its connection breaks
            await asyncio.sleep(0.05)
    with pytest.raises(WeightSyncError, match="the last weight sync failed"):
        await engine.resume()
    other = await connect()
    await other.push(weights)
    assert_same(await scores(engine), before)


async def test_an_engine_that_takes_no_part_ends_the_broadcast_within_the_limit(engine, connect, weights):
    trainer = await connect(limit_s=SHORT_S)
    hang = threading.Event()
    trainer.update_weights = lambda info: hang.wait(LIMIT_S)
    await engine.pause("abort")
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"a weight transfer over NCCL took longer than 3 s"):
        await trainer.send(perturbed(weights))
    hang.set()
    assert time.monotonic() - began < LIMIT_S / 2
    await (await connect()).push(weights)


async def test_a_replica_that_does_not_come_ends_the_connection_and_frees_the_others(engine, connect, weights):
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"not all ranks|Failed to initialize"):
        await connect(limit_s=SHORT_S, world_size=3)
    await engine.ping()  # its scheduler is free again
    assert time.monotonic() - began < LIMIT_S / 2
    await (await connect()).push(weights)


async def test_an_update_of_other_tensors_than_were_agreed_is_refused_by_name(engine, connect, weights):
    trainer = await connect(limit_s=SHORT_S)
    update = trainer.update_weights

    def update_in_another_order(info):
        try:
            update(info | {"names": info["names"][::-1]})
        except WeightSyncError as error:
            trainer.failed(error)  # as the client of a run does, so that the broadcast does not wait

    trainer.update_weights = update_in_another_order
    await engine.pause("abort")
    with pytest.raises(WeightSyncError, match="where the name table has"):
        await trainer.send(weights)
    await (await connect()).push(weights)


async def test_the_death_of_the_server_in_a_transfer_is_its_own(config, weights):
    """Its replica is replaced; the trainer's end is free."""
    async with running(config) as engine:
        with nccl.streams_on_cpu():
            trainer = Pusher(engine, weights, init_info(0, 10 * SHORT_S, 2))
            await trainer.connect()
            update = trainer.update_weights

            def kill_and_update(info):
                engine._server._process.kill()
                update(info)

            trainer.update_weights = kill_and_update
            await engine.pause("abort")
            began = time.monotonic()
            with pytest.raises((EngineDied, WeightSyncError, RuntimeError)):
                await trainer.send(weights)
            assert time.monotonic() - began < LIMIT_S
            with pytest.raises(EngineDied):
                engine.check_alive()
            trainer.sender.shutdown()
