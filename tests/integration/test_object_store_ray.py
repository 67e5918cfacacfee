"""Weights through Ray's object store between three nodes, as actors of a run send and receive them; no engine."""

from __future__ import annotations

import asyncio
import sys
import time

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from async_rl.config.loading import validate
from async_rl.errors import WeightSyncError
from async_rl.models.names import Meta
from async_rl.rollout.actor import RolloutActor
from async_rl.rollout.parts import EngineParts
from async_rl.runtime.failures import unwrap_ray_error
from async_rl.weights.shm_file import Announcement, TensorMeta, read
from async_rl.weights.vllm.source import StreamedSource

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROWS = 300_000  # 6 MB in all
BUCKETS = 6
SHAPES = {"embed": (ROWS, 2), "norm": (3,), "scalar": (), "head": (ROWS * 3, 1)}
STORE_BYTES = 80 * 2**20
LIMIT_S = 300.0  # nothing waits for it; a process starts slowly on a busy machine


def weights(value):
    return {name: torch.full(shape, value) for name, shape in SHAPES.items()}


class Named:
    """The trainer's weights, all of one value but those in a thousandth of a tensor."""

    def __init__(self):
        self.value, self.few, self.gathered = 0.0, None, 0

    def metadata(self):
        return [Meta(name, torch.float32, shape) for name, shape in SHAPES.items()]

    def __iter__(self):
        self.gathered += 1
        tensors = weights(self.value)
        if self.few is not None:
            tensors["embed"][::1000] = self.few
        return iter(tensors.items())


class Trainer:
    """Rank 0, as ``TrainerWorker`` has it."""

    def __init__(self, timeout_s, full_every=1):
        from async_rl.weights.vllm.sender import WeightSender

        self.weights = Named()
        config = validate(
            {
                "model": {"path": "m"},
                "data": {"train": "t"},
                "sync": {
                    "backend": "object_store",
                    "timeout_s": timeout_s,
                    "delta": {"full_every": full_every},
                },
            }
        )
        self.sender = WeightSender(config, 0, source=StreamedSource(self.weights), host=lambda: "127.0.0.1")

    def connect(self, receivers, limit_s=LIMIT_S):
        """Connect to receivers that are new or reset."""
        self.sender._limit_s = limit_s
        self.sender.connect(receivers)

    def forget(self):
        """Begin a test: nothing has been gathered."""
        self.sender.outdate()
        self.weights.gathered = 0

    def push(self, value, only=None):
        """Update the weights unless they have this value, and send them; how often they have been gathered."""
        if value != self.weights.value:
            self.weights.value = value
            self.sender.outdate()
        self.sender.stage()
        self.sender.send(int(value), only)
        return self.weights.gathered

    def push_few(self, value):
        """Update a few of the weights and send all; what has been put into the store since the start, by kind."""
        self.weights.few = value
        self.sender.outdate()
        self.push(self.weights.value)
        return dict(self.sender.published.publications), dict(self.sender.published.nbytes)

    def close(self):
        self.sender.close()


class Engine:
    """What a rollout worker calls; it loads weights by reading them."""

    def __init__(self):
        self.table, self.values, self.version, self.delay_s, self.fails = None, None, 0, 0.0, False

    async def init_weight_transfer_engine(self, request):
        self.table = [TensorMeta(name, dtype, tuple(shape)) for name, dtype, shape in request.init_info["table"]]

    async def start_weight_update(self): ...

    async def update_weights(self, request):
        if self.fails:
            raise WeightSyncError("this engine fails")
        tensors = dict(read(Announcement(**request.update_info), self.table))
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == SHAPES
        await asyncio.sleep(self.delay_s)
        self.values = {value for tensor in tensors.values() for value in tensor.unique().tolist()}

    async def finish_weight_update(self): ...

    async def update_weight_version(self, version):
        self.version = int(version)


class Receiver(RolloutActor):
    """A rollout worker of which only the part that receives weights is there."""

    def __init__(self):
        from async_rl.weights import ray_store
        from async_rl.weights.object_store import HostWeights

        self._pending_engine_call = None
        self._fetched = HostWeights(self._get)
        self._parts, self._hosts = EngineParts(None, []), []
        self._really_get = ray_store.get
        self.reset_now()

    def reset_now(self):
        self._engine, self.fetched, self.asked, self.fault = Engine(), 0, 0, None

    async def reset(self):
        self.reset_now()

    def _get(self, reference):
        self.fetched += 1
        self.asked += 1
        if self.fault == "never" and self.asked % 3 == 0:
            import concurrent.futures

            return concurrent.futures.Future()
        return self._really_get(reference)

    async def set(self, **values):
        for name, value in values.items():
            setattr(self if name == "fault" else self._engine, name, value)

    async def state(self):
        """Version, values of its weights, buckets that it has fetched since it was asked last, call that is pending."""
        fetched, self.fetched = self.fetched, 0
        return self._engine.version, self._engine.values, fetched, self._pending_engine_call


@pytest.fixture(scope="module")
def nodes():
    """The ids of three nodes, the first with the driver."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": STORE_BYTES}, connect=False
    )
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
        ray.init(address=cluster.address, log_to_driver=False)
        head = ray.get_runtime_context().get_node_id()
        yield [head, *(node["NodeID"] for node in ray.nodes() if node["NodeID"] != head)]
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def trainer(nodes):
    """Rank 0, on the first node."""
    actor = start(Trainer, nodes[0], 2 * LIMIT_S)
    yield actor
    ray.kill(actor)


@pytest.fixture(scope="module")
def fleet(nodes):
    """Two receivers on each of the first two nodes and one on the third."""
    actors = [start(Receiver, nodes[node], max_concurrency=100) for node in (0, 0, 1, 1, 2)]
    yield actors
    for actor in actors:
        ray.kill(actor)


@pytest.fixture
def receivers(fleet):
    """The receivers, as they were when they started."""
    ray.get([receiver.reset.remote() for receiver in fleet], timeout=LIMIT_S)
    return list(fleet)


def start(kind, node, *arguments, **options):
    affinity = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(kind).options(num_cpus=0, scheduling_strategy=affinity, **options).remote(*arguments)


def states(actors):
    return [ray.get(actor.state.remote(), timeout=LIMIT_S) for actor in actors]


def call(method, *arguments):
    return ray.get(method.remote(*arguments), timeout=2 * LIMIT_S)


def begin(trainer, receivers, *limit_s):
    """Connect a trainer that has sent nothing."""
    call(trainer.forget)
    call(trainer.connect, receivers, *limit_s)


def test_each_host_fetches_each_bucket_once_for_all_of_its_engines(trainer, receivers):
    begin(trainer, receivers)
    for value in (1.0, 2.0, 3.0):
        assert call(trainer.push, value) == value
        found = states(receivers)
        assert [(version, values) for version, values, _, _ in found] == [(int(value), {value})] * 5
        whole, *counts = [fetched for _, _, fetched, _ in found]
        assert whole == BUCKETS + 1  # with the file's head
        # The store brings each bucket to one of the other hosts, which serves it to the other.
        assert counts == [0, BUCKETS // 2 + 1, 0, BUCKETS // 2 + 1]


def test_a_replica_that_joins_is_sent_the_current_version_alone(trainer, receivers):
    *first, last = receivers
    begin(trainer, first)
    call(trainer.push, 1.0)
    assert call(trainer.push, 2.0) == 2
    states(first)
    call(trainer.connect, [last])
    assert call(trainer.push, 2.0) == 2  # gathered no more often
    assert states([last])[0][:2] == (2, {2.0})
    assert [fetched for _, _, fetched, _ in states(first)] == [0] * 4
    call(trainer.connect, receivers)
    assert call(trainer.push, 3.0) == 3
    assert {values.pop() for _, values, _, _ in states(receivers)} == {3.0}


def test_replicas_synced_in_turn_are_sent_one_version(trainer, receivers):
    begin(trainer, receivers)
    for only in range(5):
        assert call(trainer.push, 4.0, only) == 1
        assert [version for version, *_ in states(receivers)] == [4] * (only + 1) + [0] * (4 - only)


def test_a_bucket_that_does_not_come_in_time_is_an_error_and_a_second_attempt_works(trainer, receivers):
    begin(trainer, receivers)
    call(trainer.push, 1.0)
    call(trainer.connect, receivers, 6.0)
    ray.get(receivers[2].set.remote(fault="never"))
    with pytest.raises(
        WeightSyncError, match=r"in time: \d+ of \d+ buckets are missing after 6 s; raise sync\.timeout_s"
    ):
        call(trainer.push, 2.0)
    found = states(receivers)
    assert [(version, values) for version, values, *_ in found] == [(1, {1.0})] * 5  # no engine was touched
    assert {pending for *_, pending in found} == {None}  # and none is to blame
    ray.get(receivers[2].set.remote(fault=None))
    call(trainer.connect, receivers)
    assert call(trainer.push, 2.0) == 3  # gathered again
    assert [values for _, values, *_ in states(receivers)] == [{2.0}] * 5


def test_when_an_engine_fails_those_that_still_load_are_waited_for(trainer, receivers):
    begin(trainer, receivers)
    ray.get([receiver.set.remote(delay_s=2.0) for receiver in receivers[:4]])
    ray.get(receivers[4].set.remote(fails=True))
    with pytest.raises(WeightSyncError, match="this engine fails"):
        call(trainer.push, 1.0)
    found = states(receivers)
    assert [pending for *_, pending in found] == [None] * 5
    assert [values for _, values, *_ in found] == [{1.0}] * 4 + [None]


def test_the_death_of_the_worker_that_fetches_for_its_host_costs_one_attempt(nodes, trainer, receivers):
    """The host's other worker fetches from then on."""
    first, other, elsewhere = start(Receiver, nodes[1], max_concurrency=100), receivers[2], receivers[4]
    begin(trainer, [first, other, elsewhere])
    call(trainer.push, 1.0)
    assert states([first, other])[1][2] == 0
    ray.get(first.set.remote(fault="never"))
    push = trainer.push.remote(2.0)
    deadline = time.monotonic() + LIMIT_S
    while states([first])[0][3] != "fetch_weights":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ray.kill(first)
    with pytest.raises(RayError) as error:
        ray.get(push, timeout=LIMIT_S)
    assert isinstance(unwrap_ray_error(error.value), RayActorError)
    assert [version for version, *_ in states([other, elsewhere])] == [1, 1]
    call(trainer.connect, [other, elsewhere])
    call(trainer.push, 2.0)
    assert [(version, values) for version, values, *_ in states([other, elsewhere])] == [(2, {2.0})] * 2


def test_hosts_take_what_has_changed_of_the_weights_that_they_have(nodes, receivers):
    """Those that join and second attempts take all weights."""
    trainer = start(Trainer, nodes[0], 2 * LIMIT_S, 100)
    *first, last = receivers
    begin(trainer, first)
    call(trainer.push, 1.0)
    assert [fetched for _, _, fetched, _ in states(first)] == [BUCKETS + 1, 0, BUCKETS + 1, 0]
    for few in (2.0, 3.0):
        made, nbytes = call(trainer.push_few, few)
        found = states(first)
        assert [values for _, values, *_ in found] == [{1.0, few}] * 4
        assert [fetched for _, _, fetched, _ in found] == [2, 0, 2, 0]  # one bucket, and the file's head
    assert made == {"full": 1, "delta": 2}
    assert nbytes["delta"] < 0.01 * nbytes["full"]

    call(trainer.connect, [last])  # it joins
    assert call(trainer.push, 1.0) == 3  # gathered no more often
    assert states([last])[0][1:3] == ({1.0, 3.0}, BUCKETS + 1)
    call(trainer.connect, receivers)
    assert call(trainer.push_few, 4.0)[0] == {"full": 2, "delta": 3}
    found = states(receivers)
    assert [values for _, values, *_ in found] == [{1.0, 4.0}] * 5
    assert sorted(fetched for _, _, fetched, _ in found) == [0, 0, 1, 2, 2]  # one of two hosts has it from the other

    call(trainer.connect, receivers)  # as after a transfer that failed
    call(trainer.push, 1.0)
    assert [values for _, values, *_ in states(receivers)] == [{1.0, 4.0}] * 5
    assert call(trainer.push_few, 5.0)[0] == {"full": 3, "delta": 4}
    assert [values for _, values, *_ in states(receivers)] == [{1.0, 5.0}] * 5
    ray.kill(trainer)

    restarted = start(Trainer, nodes[0], 2 * LIMIT_S, 100)
    begin(restarted, receivers)
    assert call(restarted.push_few, 6.0)[0] == {"full": 1}
    assert [values for _, values, *_ in states(receivers)] == [{0.0, 6.0}] * 5
    ray.kill(restarted)
