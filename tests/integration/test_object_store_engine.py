"""The real vLLM engine receives weights through Ray's object store, in float32, on CPU."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import numpy as np
import pytest

from async_rl.errors import WeightSyncError
from async_rl.weights import ray_store
from async_rl.weights.canary import make_probe
from async_rl.weights.object_store import HostWeights, Publisher, Staged
from async_rl.weights.shm_file import TensorMeta
from tests.support.engine_checkpoint import VOCAB, Pusher, engine_config, make_checkpoint, perturbed, running
from tests.support.own_cluster import own_cluster

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

BUCKET_BYTES = 100_000  # tensors span buckets, and buckets tensors


class HostPusher(Pusher):
    """Announces to the engine what this host has fetched from the store."""

    def __init__(self, engine, weights):
        from async_rl.weights.vllm.object_store import ObjectStoreTrainerInitInfo

        table = [TensorMeta.of(name, tensor) for name, tensor in weights.items()]
        self.staged, self.host, self.fault = Staged(), HostWeights(self._get), None
        self.publisher = Publisher(table, ray_store.put, size=BUCKET_BYTES)
        super().__init__(
            engine, weights, ObjectStoreTrainerInitInfo(rank=0, staged=self.staged, publisher=self.publisher)
        )

    def _get(self, reference):
        if self.fault is not None:
            raise self.fault
        return ray_store.get(reference)

    async def send(self, weights):
        self.staged.outdate()
        await super().send(weights)

    def fetch_weights(self, offer):
        return asdict(self.host.fetch(offer(self.host.round), host=0, hosts=1, timeout_s=60))


@pytest.fixture
def store():
    with own_cluster(num_cpus=1, object_store_memory=128 * 2**20, include_dashboard=False) as cluster:
        cluster.connect()
        yield


async def logprobs(engine, probe):
    return [score.logprobs for score in await engine.score(probe)]


async def check(engine, probe, expected):
    for a, b in zip(await logprobs(engine, probe), expected, strict=True):
        np.testing.assert_array_equal(a, b)


async def test_an_engine_computes_with_weights_from_the_object_store_what_it_computes_with_those_of_shm(
    store, tmp_path
):
    """Three pushes of other weights, one that fails, and one more: bit for bit."""
    from safetensors.torch import load_file

    folder = make_checkpoint(tmp_path)
    weights = load_file(folder / "model.safetensors")
    probe = make_probe(0, VOCAB)
    versions = [weights, perturbed(weights, seed=1), perturbed(weights, seed=2)]
    async with running(engine_config(folder, backend="object_store")) as engine:
        pusher = Pusher(engine, weights)
        await pusher.connect()
        expected = []
        for version in versions:
            await pusher.push(version)
            expected.append(await logprobs(engine, probe))
        assert np.abs(expected[0][0] - expected[1][0]).max() > 0.1
        await asyncio.to_thread(pusher.sender.shutdown)

        pusher = HostPusher(engine, weights)
        await pusher.connect()
        for index in (1, 2, 0):
            await pusher.push(versions[index])
            await check(engine, probe, expected[index])
            assert len(pusher.publisher.current.buckets) > 10

        pusher.fault = WeightSyncError("the store has lost a bucket")
        await engine.pause("abort")
        with pytest.raises(WeightSyncError, match="has lost a bucket"):
            await pusher.send(versions[1])
        await engine.resume()
        await check(engine, probe, expected[0])  # nothing has reached it

        pusher.fault = None
        await pusher.push(versions[1])
        await check(engine, probe, expected[1])
        await asyncio.to_thread(pusher.sender.shutdown)
        pusher.publisher.withdraw()
        pusher.host.close()
