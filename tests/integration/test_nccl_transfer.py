"""Both ends of sync.backend nccl, vLLM's own classes under ours, on stand-ins for NCCL and CUDA's streams.

Who takes part, what ends when, what is sent and what is refused.
"""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from vllm.distributed import utils
from vllm.distributed.device_communicators import pynccl
from vllm.distributed.weight_transfer import packed_tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from async_rl.config.loading import validate
from async_rl.errors import WeightSyncError
from async_rl.weights import sglang_group
from async_rl.weights.shm_file import TensorMeta
from async_rl.weights.vllm import sender
from async_rl.weights.vllm.name_table import rows
from async_rl.weights.vllm.nccl import TimedNCCLTrainerInitInfo
from async_rl.weights.vllm.plugin import BACKENDS, register
from tests.support import nccl
from tests.support.loopbacks import ELSEWHERE, LOOPBACKS, is_held, is_open
from tests.support.model_folders import SMALLEST, write_config

pytestmark = pytest.mark.slow

LIMIT_S = 60.0  # nothing waits for it
SHORT_S = 0.5  # for what ends by it
STATELESS_PROCESS_GROUP = utils.StatelessProcessGroup


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loaded = {}

    def load_weights(self, weights):
        self.loaded.update({name: tensor.clone() for name, tensor in weights})


METAS = [ParamMeta(f"w{i}", torch.float32, (i + 1, 2)) for i in range(3)]
BYTES = sum(meta.shape[0] * meta.shape[1] * 4 for meta in METAS)


@pytest.fixture(scope="module", autouse=True)
def _checkpoint(tmp_path_factory):
    """What the engines of this file have loaded: three tensors, in the folder of a model that is supported."""
    Replica.folder = write_config(tmp_path_factory.mktemp("engines") / "model", SMALLEST)
    save_file({meta.name: torch.zeros(meta.shape) for meta in METAS}, Replica.folder / "model.safetensors")


class Replica:
    """An engine of some ranks, each in a thread, as a rollout actor has it."""

    folder = None

    def __init__(self, ranks=1):
        self.models = [Model() for _ in range(ranks)]
        self.dead = threading.Event()
        config = SimpleNamespace(backend=BACKENDS["nccl"])
        self.engines = [
            WeightTransferEngineFactory.create_engine(
                config,
                SimpleNamespace(
                    model_config=SimpleNamespace(model=str(self.folder)),
                    parallel_config=SimpleNamespace(data_parallel_index=0, world_size=ranks, rank=rank),
                ),
                torch.device("cpu"),
                model,
            )
            for rank, model in enumerate(self.models)
        ]

    def call(self, method, *arguments):
        if self.dead.is_set():
            raise RuntimeError("the actor died")
        with ThreadPoolExecutor(len(self.engines)) as pool:
            list(pool.map(lambda engine: getattr(engine, method)(*arguments), self.engines))


class Handle:
    """The Ray actor of a replica; a call returns a future."""

    pool = ThreadPoolExecutor(32)

    def __init__(self, replica):
        self.replica, self.calls = replica, []

    def __getattr__(self, method):
        return SimpleNamespace(remote=lambda *arguments: self.pool.submit(self._answer, method, *arguments))

    def _answer(self, method, request=None):
        self.calls.append(method)
        if method == "init_weight_transfer_engine":
            info = self.replica.engines[0].parse_init_info(request.init_info)
            self.replica.call("init_transfer_engine", info)
        elif method == "update_weights":
            self.replica.call("update_weights", request.update_info)


def ray_get(futures, timeout=None):
    """Raises at the first failure, as Ray does."""
    for future in as_completed(futures, timeout):
        future.result()
    return [future.result() for future in futures]


RAY = SimpleNamespace(
    get=ray_get,
    wait=lambda futures, num_returns, timeout, fetch_local: wait(futures, timeout),
)


class Source(WeightSource):
    """Three tensors, whose value the trainer changes; counts those gathered."""

    def __init__(self):
        self.value, self.gathered = 1.0, 0

    def metadata(self):
        return list(METAS)

    def __iter__(self):
        for meta in self.metadata():
            self.gathered += 1
            yield meta.name, nccl.made(torch.full(meta.shape, self.value))


class AllAtOnce(Source):
    """Makes all tensors before it yields the first, as gathering does with those of one message."""

    def __iter__(self):
        self.streams = {nccl.Stream.now()}
        yield from list(super().__iter__())
        self.streams.add(nccl.Stream.now())


@pytest.fixture(autouse=True)
def _stand_ins():
    register()
    with nccl.on_cpu(), mock.patch.object(sender, "ray", RAY):
        yield


@pytest.fixture
def connect():
    """Connects a trainer to replicas; a port for each connection."""
    senders, ports = [], itertools.count()

    def _connect(replicas, source, *, rank=0, ranks=1, world_size=None, limit_s=LIMIT_S):
        info = TimedNCCLTrainerInitInfo(
            rank=rank,
            master_address="127.0.0.1",
            master_port=next(ports),
            world_size=world_size or 1 + len(replicas) * ranks,
            packed_buffer_size_bytes=8,  # several broadcasts
            timeout_s=limit_s,
        )
        client = sender.NcclSyncClient([Handle(replica) for replica in replicas], limit_s, ranks=ranks)
        senders.append(WeightTransferTrainerFactory.trainer_init(info, client=client, source=source))
        return senders[-1]

    yield _connect
    for each in senders:
        each.shutdown()


class StageSource(Source):
    """What the first rank of one of two stages has: two tensors, or the last one."""

    def __init__(self, rank):
        super().__init__()
        self._metas = {0: METAS[:2], 2: METAS[2:]}
        self._rank = rank

    def metadata(self):
        return self._metas[self._rank]

    def tables(self):
        return {rank: rows(TensorMeta.of(m.name, m) for m in metas) for rank, metas in self._metas.items()}


class Stages:
    """The two senders of a trainer with a pipeline, on ranks 0 and 2 of four, each in a thread."""

    def __init__(self, config):
        self.sources = {rank: StageSource(rank) for rank in (0, 2)}
        self.senders = {
            rank: sender.WeightSender(config, rank, source=source, host=lambda: "127.0.0.1")
            for rank, source in self.sources.items()
        }
        self._rank, self._said, self._barrier = threading.local(), {}, threading.Barrier(2)

    def call(self, method, *arguments, ranks=(0, 2)):
        """Call these ranks at once, and return what each raised."""
        with (
            mock.patch.object(torch.distributed, "get_world_size", return_value=4),
            mock.patch.object(torch.distributed, "all_gather_object", self._all_gather),
            ThreadPoolExecutor(2) as pool,
        ):
            futures = [pool.submit(self._call, rank, method, arguments) for rank in ranks]
        return [future.exception() for future in futures]

    def _call(self, rank, method, arguments):
        self._rank.now = rank
        getattr(self.senders[rank], method)(*arguments)

    def _all_gather(self, found, mine):
        self._said[self._rank.now] = mine
        self._barrier.wait(LIMIT_S)
        for rank, said in self._said.items():
            found[rank] = said


def settings(rollout=None, **sync):
    """The settings of a run whose weights travel over NCCL."""
    tree = {"model": {"path": "m"}, "data": {"train": "t"}, "rollout": rollout or {}}
    return validate(tree | {"sync": {"backend": "nccl", **sync}})


def received(replica):
    return [{name: set(tensor.flatten().tolist()) for name, tensor in model.loaded.items()} for model in replica.models]


def all_are(value):
    return {f"w{i}": {value} for i in range(3)}


def test_the_replicas_that_are_connected_receive_the_weights(connect):
    replicas, source = [Replica(ranks=2), Replica(ranks=2)], Source()
    trainer = connect(replicas, source, ranks=2)
    for value in (1.0, 2.0):
        source.value = value
        trainer.send_weights()
        assert [received(replica) for replica in replicas] == [[all_are(value)] * 2] * 2


def test_after_the_death_of_a_replica_the_others_are_connected_without_it(connect):
    replicas, source = [Replica(), Replica()], Source()
    first = connect(replicas, source)
    first.send_weights()
    replicas[0].dead.set()
    first.shutdown()
    source.value = 3.0
    connect(replicas[1:], source).send_weights()
    assert received(replicas[1]) == [all_are(3.0)]
    assert received(replicas[0]) == [all_are(1.0)]


@pytest.mark.parametrize("kind", ["tensor_parallel_size", "data_parallel_size"])
def test_a_run_counts_the_ranks_of_the_replicas_that_it_connects(kind):
    """Two of the three that the settings name, then the last one alone, which is the first there."""
    config = settings(rollout={"replicas": 3, kind: 2})
    replicas, source = [Replica(ranks=2) for _ in range(3)], Source()
    trainer = sender.WeightSender(config, 0, source=source, host=lambda: "127.0.0.1")
    handles = [Handle(replica) for replica in replicas]
    trainer.connect(handles[1:])
    trainer.stage()
    trainer.send(7)
    source.value = 2.0
    trainer.connect(handles[2:])
    trainer.send(8)
    trainer.close()
    assert [received(replica) for replica in replicas] == [[{}] * 2, [all_are(1.0)] * 2, [all_are(2.0)] * 2]
    assert handles[2].calls[-2:] == ["finish_weight_update", "update_weight_version"]


def places_of(communicators):
    """Return (rank, world size) of each, in the order of ranks."""
    return sorted((communicator.group.rank, communicator.group.world_size) for communicator in communicators)


def test_ranks_follow_one_another_also_after_a_loss(connect):
    replicas, source = [Replica(ranks=2), Replica(ranks=2)], Source()
    connect(replicas, source, ranks=2)
    assert places_of(nccl.Communicator.made) == [(rank, 5) for rank in range(5)]
    replicas[0].dead.set()
    connect(replicas[1:], source, ranks=2).send_weights()
    assert places_of(nccl.Communicator.made[5:]) == [(rank, 3) for rank in range(3)]
    assert received(replicas[1]) == [all_are(1.0)] * 2


def test_a_transfer_broadcasts_each_byte_once_in_the_order_of_the_name_table(connect):
    replicas, source = [Replica(), Replica()], Source()
    trainer = connect(replicas, source)
    trainer.send_weights()
    meeting = trainer.model_update_group.group.meeting
    assert sum(tensor.nbytes for tensor in meeting.sent) == BYTES
    assert len(meeting.sent) > 1
    for replica in replicas:
        assert list(replica.models[0].loaded) == [meta.name for meta in METAS]


def test_packs_for_sglangs_engines_are_those_of_vllms_producer():
    tensors = [(meta.name, torch.zeros(meta.shape)) for meta in METAS]
    table = [TensorMeta.of(name, tensor) for name, tensor in tensors]
    for limit in (24, 30, BYTES - 1, BYTES):
        left, produced = iter(tensors), []
        while (chunk := packed_tensor.pack_tensors(left, lambda item: item[1], limit)) is not None:
            produced.append(chunk.names)
        assert [[meta.name for meta in pack] for pack in sglang_group.packs(table, limit)] == produced


def test_tensors_made_together_are_safe_under_each_of_the_streams_that_pack_them(connect):
    """They are made under the stream that the parameters were written under; see ``nccl.check_handed_out``."""
    replica, source = Replica(), AllAtOnce()
    trainer = connect([replica], source)
    for value in (1.0, 2.0):
        source.value = value
        trainer.send_weights()
        assert received(replica) == [all_are(value)]
        assert source.streams == {nccl.Stream.now()}


def test_without_a_stream_of_its_own_gathering_is_not_safe(connect):
    """vLLM's producer still changes streams. When this fails, it waits by itself, and ``under_own_stream`` can go."""
    trainer = connect([Replica()], AllAtOnce(), limit_s=5 * SHORT_S)
    with (
        mock.patch("async_rl.weights.vllm.nccl.under_own_stream", lambda tensors, _: tensors),
        pytest.raises(AssertionError, match="may not be there yet"),
    ):
        trainer.send_weights()


@pytest.mark.parametrize(
    ("metas", "message"),
    [
        (METAS[:2], r"lacks 1 tensors, first w2"),
        ([*METAS, ParamMeta("w9", torch.float32, (1,))], "has, unlike the checkpoint, 1 tensors, first w9"),
        ([ParamMeta("w0", torch.float32, (2, 2)), *METAS[1:]], r"tensor w0: \[2, 2\] in the trainer, \[1, 2\] in"),
    ],
)
def test_an_engine_refuses_another_name_table_than_its_checkpoints(connect, metas, message):
    """At the connection, before any of its weights is touched."""
    source = Source()
    source.metadata = lambda: metas
    with pytest.raises(WeightSyncError, match=message):
        connect([Replica()], source, limit_s=SHORT_S)


@pytest.mark.parametrize(
    "change", [{"names": ["w0", "w2", "w1"]}, {"shapes": [[1, 2], [2, 2], [2, 3]]}, {"dtype_names": ["float16"] * 3}]
)
def test_an_engine_refuses_an_update_of_other_tensors_than_were_agreed(connect, change):
    replica, source = Replica(), Source()
    trainer = connect([replica], source, limit_s=5 * SHORT_S)
    call = trainer.client.update_weights
    trainer.client.update_weights = lambda update: call(update | change)
    with pytest.raises(WeightSyncError, match="where the name table has"):
        trainer.send_weights()
    assert received(replica) == [{}]


@pytest.fixture
def stages():
    """A trainer whose stages send, to which replicas are connected by their handles."""
    made = Stages(settings(timeout_s=10 * SHORT_S, senders="stages"))
    yield made
    made.call("close")


def test_stages_send_in_turn_within_one_update(stages):
    replicas = [Replica(ranks=1), Replica(ranks=1)]
    handles = [Handle(replica) for replica in replicas]
    for connected in (handles, handles[1:]):  # one is lost
        assert stages.call("connect", connected) == [None, None]
        for value in (1.0, 2.0):
            for source in stages.sources.values():
                source.value = value
            assert stages.call("send", 7) == [None, None]
            for handle in connected:
                assert received(handle.replica) == [all_are(value)]
                assert list(handle.replica.models[0].loaded) == [meta.name for meta in METAS]
                update = ["start_weight_update", *["update_weights"] * 2, "finish_weight_update"]
                assert handle.calls[-5:] == [*update, "update_weight_version"]
    # A communicator of each sender with all that were connected.
    assert places_of(nccl.Communicator.made[:6]) == sorted([(0, 3), (1, 3), (2, 3)] * 2)
    assert places_of(nccl.Communicator.made[6:]) == sorted([(0, 2), (1, 2)] * 2)


def test_a_replica_that_dies_while_a_later_stage_sends_ends_all_within_the_limit(stages):
    replica = Replica()
    handle = Handle(replica)
    stages.call("connect", [handle])
    answer, updates = handle._answer, []

    def die_at_the_second(method, request=None):
        updates.append(method)
        if updates.count("update_weights") == 2:
            replica.dead.set()
        return answer(method, request)

    handle._answer = die_at_the_second
    began = time.monotonic()
    first, second = stages.call("send", 7)
    assert time.monotonic() - began < LIMIT_S / 2
    assert "the actor died" in str(first)
    assert "a weight transfer over NCCL took longer than 2.5 s" in str(second)
    assert [source.gathered for source in stages.sources.values()] == [2, 1]
    again = Handle(Replica())
    assert stages.call("connect", [again]) == [None, None]
    assert stages.call("send", 8) == [None, None]
    assert received(again.replica) == [all_are(1.0)]


def test_a_stage_that_does_not_come_ends_the_connection_of_the_others(stages):
    handle, comes = Handle(Replica()), stages.senders[2].connect
    stages.senders[2].connect = lambda handles: None  # after the exchange of addresses
    stages._barrier, stages._said[2] = threading.Barrier(1), ("127.0.0.1", 12345)
    first, _ = stages.call("connect", [handle])
    assert "did not meet for NCCL within 2.5 s" in str(first)
    stages.senders[2].connect, stages._barrier = comes, threading.Barrier(2)
    assert stages.call("connect", [handle]) == [None, None]
    assert stages.call("send", 8) == [None, None]
    assert received(handle.replica) == [all_are(1.0)]


@pytest.fixture
def _real_store():
    """Ranks meet in vLLM's own store; their communicator does nothing."""

    def communicator(group, device):
        return SimpleNamespace(group=group, destroy=lambda: None)

    with (
        mock.patch.object(utils, "StatelessProcessGroup", STATELESS_PROCESS_GROUP),
        mock.patch.object(pynccl, "PyNcclCommunicator", communicator),
    ):
        yield


class Probing(Handle):
    """The actor of a replica that looks at the trainer's port when it is asked to come there."""

    def _answer(self, method, request=None):
        if method == "init_weight_transfer_engine":
            self.host, self.port = request.init_info["master_address"], request.init_info["master_port"]
            self.held = is_held(self.host, self.port)
            self.open_elsewhere = is_open(ELSEWHERE, self.port)
        super()._answer(method, request)


@pytest.mark.usefixtures("_real_store")
@pytest.mark.parametrize("host", LOOPBACKS)
def test_engines_come_to_a_port_that_the_trainer_holds_and_that_is_closed_at_other_addresses(host):
    trainer = sender.WeightSender(settings(), 0, source=Source(), host=lambda: host)
    handle = Probing(Replica())
    for _ in range(2):  # each connection has a port of its own
        trainer.connect([handle])
        assert (handle.host, handle.held, handle.open_elsewhere) == (host, True, False)
    trainer.close()


@pytest.mark.usefixtures("_real_store")
def test_a_meeting_that_was_given_up_frees_its_port():
    handle = Probing(Replica())
    handle.replica.dead.set()
    trainer = sender.WeightSender(settings(timeout_s=2 * SHORT_S), 0, source=Source(), host=lambda: "127.0.0.1")
    with pytest.raises(RuntimeError, match="the actor died"):
        trainer.connect([handle])
    assert handle.held
    end = time.monotonic() + LIMIT_S
    while is_held(handle.host, handle.port):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_replica_that_does_not_come_ends_the_connection_and_another_attempt_works(connect):
    replicas, source = [Replica(), Replica()], Source()
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"did not meet for NCCL within 0\.5 s, half of sync\.timeout_s"):
        connect(replicas[:1], source, world_size=3, limit_s=SHORT_S)
    assert time.monotonic() - began < LIMIT_S / 2
    connect(replicas, source).send_weights()
    assert received(replicas[0]) == received(replicas[1]) == [all_are(1.0)]


def test_a_replica_that_dies_at_the_connection_is_named_by_its_own_error(connect):
    replicas, source = [Replica(), Replica()], Source()
    replicas[0].dead.set()
    with pytest.raises(RuntimeError, match="the actor died"):
        connect(replicas, source, limit_s=SHORT_S)
    connect(replicas[1:], source).send_weights()
    assert received(replicas[1]) == [all_are(1.0)]


def test_a_replica_that_dies_in_a_transfer_ends_the_broadcast_and_the_gathering(connect):
    """The trainer learns of it from the call of the replica, not from NCCL."""
    replicas, source = [Replica(), Replica()], Source()
    trainer = connect(replicas, source)
    replicas[0].dead.set()
    with pytest.raises(RuntimeError, match="the actor died"):
        trainer.send_weights()
    assert source.gathered == 3  # as often as on the ranks that do not send, or they would wait
    assert trainer.client.all_handles[1].calls[-1] == "update_weights"  # not finished
    source.value = 5.0
    connect(replicas[1:], source).send_weights()
    assert received(replicas[1]) == [all_are(5.0)]


def test_a_broadcast_that_blocks_ends_within_the_limit_on_both_sides(connect):
    """A replica takes no part, and does not die either."""
    replicas, source = [Replica(), Replica()], Source()
    trainer = connect(replicas, source, limit_s=5 * SHORT_S)
    hang = threading.Event()
    replicas[0].engines[0].update_weights = lambda _: hang.wait(LIMIT_S)
    threading.Timer(10 * SHORT_S, hang.set).start()
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"a weight transfer over NCCL took longer than 2\.5 s"):
        trainer.send_weights()
    assert time.monotonic() - began < LIMIT_S / 2
    assert source.gathered == 3
    # The healthy one has not taken what was in its buffers for weights.
    assert received(replicas[1]) in ([{}], [{"w0": {1.0}}], [{"w0": {1.0}, "w1": {1.0}}])
    del replicas[0].engines[0].update_weights
    source.value = 7.0
    connect(replicas, source).send_weights()
    assert received(replicas[0]) == received(replicas[1]) == [all_are(7.0)]


def test_an_engine_whose_transfer_was_aborted_says_so():
    """vLLM skips the broadcasts of an aborted communicator, and would load what its buffers hold."""
    replica = Replica()
    engine = replica.engines[0]
    info = {"master_address": "127.0.0.1", "master_port": 0, "rank_offset": 1, "world_size": 2, "packed": True}
    info["table"] = [[meta.name, "float32", list(meta.shape)] for meta in METAS]
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(nccl.Group.create, host="127.0.0.1", port=0, rank=0, world_size=2)
        engine.init_transfer_engine(engine.parse_init_info(info | {"timeout_s": 4 * SHORT_S}))
        other.result()
    shapes = [list(meta.shape) for meta in METAS]
    update = {"names": [meta.name for meta in METAS], "dtype_names": ["float32"] * 3, "shapes": shapes}
    with pytest.raises(WeightSyncError, match="over NCCL took longer"):
        engine.update_weights(update)
    with pytest.raises(WeightSyncError, match="over NCCL took longer"):  # not that it has received anything
        engine.update_weights(update)


def test_every_communicator_is_destroyed(connect):
    replicas, source = [Replica(), Replica()], Source()
    for _ in range(3):
        trainer = connect(replicas, source)
        trainer.send_weights()
        trainer.shutdown()
    for replica in replicas:
        replica.call("shutdown")
    assert len(nccl.Communicator.made) == 9
    assert all(communicator.disabled for communicator in nccl.Communicator.made)


def test_ranks_that_do_not_send_only_gather(connect):
    source = Source()
    connect([], source, rank=1).send_weights()
    assert source.gathered == 3
