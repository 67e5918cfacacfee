"""The real vLLM engine receives weights through Ray's object store, in float32, on CPU."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import ray

from async_rl.errors import WeightSyncError
from async_rl.weights import ray_store
from async_rl.weights.canary import make_probe
from async_rl.weights.object_store import HostWeights, Publisher, Staged
from async_rl.weights.shm_file import TensorMeta
from tests.support.engine_checkpoint import VOCAB, Pusher, engine_config, make_checkpoint, perturbed, running

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


class HostPusher(Pusher):
    """Announces to the engine what this host has fetched from the store."""

    def __init__(self, engine, weights):
        from async_rl.weights.vllm.object_store import ObjectStoreTrainerInitInfo

        table = [TensorMeta(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in weights.items()]
        self.staged, self.host, self.fault = Staged(), HostWeights(self._get), None
        self.publisher = Publisher(table, ray_store.put, size=100_000)  # tensors span buckets, and buckets tensors
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

    def fetch_weights(self, publication):
        return asdict(self.host.fetch(publication, host=0, hosts=1, timeout_s=60))


@pytest.fixture
def store():
    ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=128 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


async def logprobs(engine, probe):
    return [score.logprobs for score in await engine.score(probe)]


async def test_weights_from_the_object_store_are_those_that_were_pushed(store, tmp_path):
    """Three pushes of changed weights, and one more after a fault: the engine computes what shm has it compute."""
    from safetensors.torch import load_file

    folder = make_checkpoint(tmp_path)
    weights = load_file(folder / "model.safetensors")
    probe = make_probe(0, VOCAB)
    versions = [weights, perturbed(weights, seed=1), perturbed(weights, seed=2)]
    async with running(engine_config(folder, backend="object_store")) as engine:
        pusher = Pusher(engine, weights)  # by shm, which engines receive in the same way
        await pusher.connect()
        expected = []
        for version in versions:
            await pusher.push(version)
            expected.append(await logprobs(engine, probe))
        pusher.sender.shutdown()
        pusher = HostPusher(engine, weights)
        await pusher.connect()
        for index in (1, 2, 0):
            await pusher.push(versions[index])
            for a, b in zip(await logprobs(engine, probe), expected[index], strict=True):
                np.testing.assert_array_equal(a, b)
        assert np.abs(expected[0][0] - expected[1][0]).max() > 0.1
        pusher.fault = WeightSyncError("the store has lost a bucket")
        await engine.pause("abort")
        with pytest.raises(WeightSyncError, match="has lost a bucket"):
            await pusher.send(versions[1])
        await engine.resume()  # nothing has reached it
        np.testing.assert_array_equal((await logprobs(engine, probe))[0], expected[0][0])
        pusher.fault = None
        await pusher.push(versions[1])
        np.testing.assert_array_equal((await logprobs(engine, probe))[0], expected[1][0])
        pusher.host.close()
