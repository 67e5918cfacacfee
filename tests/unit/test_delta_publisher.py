"""Weights as deltas from the trainer to hosts: each host has the published bits, whatever it had before. No Ray."""

from __future__ import annotations

import gc
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from async_rl.errors import WeightSyncError
from async_rl.weights.delta_publisher import DeltaPublisher
from async_rl.weights.object_store import HostWeights, Publisher, Staged
from async_rl.weights.shm_file import TensorMeta, read
from tests.support.object_stores import Peers, Store, memory_files

SHAPES = {
    "embed": ((40, 32), torch.bfloat16),
    "norm": ((5,), torch.bfloat16),
    "bias": ((17,), torch.float32),
    "experts.0": ((3, 200), torch.bfloat16),
    "scaled": ((30,), torch.float8_e4m3fn),
    "empty": ((0, 4), torch.bfloat16),
    "scalar": ((), torch.float32),
}
TABLE = [TensorMeta(name, str(dtype).removeprefix("torch."), shape) for name, (shape, dtype) in SHAPES.items()]
NBYTES = sum(meta.nbytes for meta in TABLE)


class Model:
    """Weights of any bits, among them NaNs, of which updates change a share."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.bits = {meta.name: self.rng.integers(0, 256, meta.nbytes, dtype=np.uint8) for meta in TABLE}

    def update(self, share=0.01):
        for meta in TABLE:
            if not meta.nbytes:
                continue
            width = SHAPES[meta.name][1].itemsize
            elements = self.bits[meta.name].reshape(-1, width)
            chosen = self.rng.random(len(elements)) < share
            elements[chosen] ^= self.rng.integers(0, 256, (int(chosen.sum()), width), dtype=np.uint8)
        return self

    def items(self):
        for name, (shape, dtype) in SHAPES.items():
            flat = torch.from_numpy(self.bits[name].copy())
            yield name, flat.view(dtype).reshape(shape) if len(flat) else torch.empty(shape, dtype=dtype)


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def host(store):
    gc.disable()  # what a host frees, it frees at once
    try:
        host = HostWeights(store.get)
        yield host
        host.close()
        assert memory_files() == 0
    finally:
        gc.enable()


def publisher_of(store, *, every=100, ratio=1.0, size=None, block=256):
    return DeltaPublisher(TABLE, store.put, full_every=every, max_ratio=ratio, size=size, block=block)


def fetch(host, publisher, **options):
    """Have the host fetch what it is offered; return what the trainer takes it to have fetched."""
    offered = publisher.for_host(host.round)
    announced = host.fetch(offered, host=0, hosts=1, timeout_s=20.0, **options)
    return ("full" if offered.base is None else "delta"), announced


def has(announced, model):
    """Whether the file has exactly these bits; ``read`` also compares each tensor with its digest."""
    found = dict(read(announced, TABLE))
    return all(bits(found[name]) == model.bits[name].tobytes() for name in SHAPES)


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@given(
    st.lists(st.sampled_from([0.0, 0.001, 0.02, 0.3, 1.0]), min_size=1, max_size=5),
    st.sampled_from([None, 64, 700]),
    st.sampled_from([8, 64, 2**20]),
    st.integers(1, 4),
    st.integers(0, 2**32),
)
def test_what_a_host_has_after_any_updates_is_equal_bit_for_bit(shares, size, block, every, seed):
    store, model = Store(), Model(seed)
    publisher, host = publisher_of(store, every=every, size=size, block=block), HostWeights(store.get)
    plain, other = Publisher(TABLE, store.put, size=size), HostWeights(store.get)
    try:
        kinds = []
        for share in [0.0, *shares]:
            model.update(share)
            publisher.publish(model.items())
            kind, announced = fetch(host, publisher)
            kinds.append(kind)
            assert has(announced, model)
            full = other.fetch(plain.publish(model.items()), host=0, hosts=1, timeout_s=20.0)
            for (name, one), (_, two) in zip(read(announced, TABLE), read(full, TABLE), strict=True):
                assert bits(one) == bits(two), name
        assert kinds[0] == "full"
        # Where a delta was too large, the count begins again.
        assert all("full" in kinds[begin : begin + every] for begin in range(len(kinds) - every + 1))
    finally:
        host.close()
        other.close()


def test_one_of_so_many_has_all_weights(store, host):
    model, publisher = Model(), publisher_of(store, every=3)
    kinds = []
    for _ in range(7):
        publisher.publish(model.update().items())
        kind, announced = fetch(host, publisher)
        assert has(announced, model)
        kinds.append(kind)
    assert kinds == ["full", "delta", "delta", "full", "delta", "delta", "full"]
    assert publisher.totals.publications == {"full": 3, "delta": 4}
    assert publisher.totals.nbytes["full"] > 3 * NBYTES
    assert publisher.totals.changed == pytest.approx(0.01, abs=0.01)


def test_a_delta_is_small_and_so_is_what_the_store_holds(store, host):
    model, publisher = Model(), publisher_of(store)
    publisher.publish(model.items())
    fetch(host, publisher)
    whole = store.held
    head = publisher.current.head.nbytes
    store.fetched.clear()
    del store.last
    publisher.publish(model.update(0.005).items())
    assert 0 < store.held - head < 0.2 * (whole - head)
    assert publisher.totals.nbytes["delta"] == store.held
    assert fetch(host, publisher)[0] == "delta"
    assert sum(reference.array.nbytes for reference in store.fetched) == store.held
    publisher.withdraw()
    store.fetched.clear()
    del store.last
    assert store.held == 0


def test_weights_that_have_not_changed_take_a_head_alone(store, host):
    model, publisher = Model(), publisher_of(store)
    publisher.publish(model.items())
    fetch(host, publisher)
    assert publisher.publish(model.items()).buckets == []
    kind, announced = fetch(host, publisher)
    assert kind == "delta"
    assert has(announced, model)
    assert publisher.totals.changed == 0.0


@pytest.mark.parametrize(("ratio", "kind"), [(0.5, "full"), (1.0, "delta")])
def test_a_delta_that_is_too_large_gives_way_to_all_weights(store, host, ratio, kind):
    model, publisher = Model(), publisher_of(store, ratio=ratio)
    publisher.publish(model.items())
    fetch(host, publisher)
    publisher.publish(model.update(0.45).items())
    found, announced = fetch(host, publisher)
    assert found == kind
    assert has(announced, model)
    assert publisher.totals.changed == pytest.approx(0.45, abs=0.1)
    publisher.publish(model.update(0.01).items())
    assert fetch(host, publisher)[0] == "delta"


# -- which weights a host has -----------------------------------------------------------------------------------------


def test_a_host_that_joins_takes_all_weights_and_the_others_what_has_changed(store, host):
    model, publisher, joining = Model(), publisher_of(store), HostWeights(store.get)
    for _ in range(3):
        publisher.publish(model.update().items())
        fetch(host, publisher)
    found = [fetch(each, publisher) for each in (joining, host)]
    assert [kind for kind, _ in found] == ["full", "delta"]
    assert all(has(announced, model) for _, announced in found)
    assert publisher.current.base is not None
    assert publisher.for_host(0) is publisher.for_host(0)  # those that join together share it
    publisher.publish(model.update().items())
    found = [fetch(each, publisher) for each in (joining, host)]
    assert [kind for kind, _ in found] == ["delta", "delta"]
    assert all(has(announced, model) for _, announced in found)
    joining.close()


def test_a_host_that_missed_one_takes_all_weights(store, host):
    model, publisher = Model(), publisher_of(store)
    publisher.publish(model.items())
    fetch(host, publisher)
    publisher.publish(model.update().items())
    publisher.publish(model.update().items())
    kind, announced = fetch(host, publisher)
    assert kind == "full"
    assert has(announced, model)


def test_a_trainer_that_was_restarted_sends_all_weights(store, host):
    """For example rewound to a checkpoint: what the host has is of no use to it."""
    model, publisher = Model(), publisher_of(store)
    for _ in range(2):
        publisher.publish(model.update().items())
        fetch(host, publisher)
    rewound, restarted = Model(), publisher_of(store)
    for kind in ("full", "delta"):
        restarted.publish(rewound.update().items())
        found, announced = fetch(host, restarted)
        assert found == kind
        assert has(announced, rewound)


def test_weights_that_go_back_are_a_delta_like_any_other(store, host):
    model, publisher = Model(), publisher_of(store)
    early = dict(Model().items())
    for weights in (model, model.update(), early, model):
        publisher.publish(weights.items())
        kind, announced = fetch(host, publisher)
    assert kind == "delta"
    assert has(announced, model)


def test_a_second_attempt_sends_all_weights(store, host):
    model, publisher, staged = Model(), publisher_of(store), Staged()
    staged.connect(["a", "b"])
    kinds = []
    for event in ("first", "update", "again", "join", "joined", "update"):
        if event == "join":
            staged.connect(["c"])
        elif event in ("again", "joined"):
            staged.connect(["a", "b"])
        if event in ("update", "joined"):
            model.update()
            staged.outdate()
        if staged.stage():
            publisher.publish(model.items(), full=staged.repeated)
        kinds.append(fetch(host, publisher)[0])
    assert kinds == ["full", "delta", "full", "full", "delta", "delta"]


def test_a_delta_to_other_weights_than_a_host_has_is_refused_and_leaves_them(store, host):
    model, publisher = Model(), publisher_of(store)
    publisher.publish(model.items())
    before = Model()
    _, announced = fetch(host, publisher)
    publisher.publish(model.update().items())
    publication = publisher.publish(model.update().items())
    with pytest.raises(WeightSyncError, match=rf"delta to round {publication.base}, but this host has {host.round}"):
        host.fetch(publication, host=0, hosts=1, timeout_s=20.0)
    assert has(announced, before)
    host.close()
    with pytest.raises(WeightSyncError, match="but this host has 0"):
        host.fetch(publication, host=0, hosts=1, timeout_s=20.0)


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["late", "lost", "corrupt", "short"])
@pytest.mark.parametrize("when", [0, 2, -1])
def test_invariant_10_after_a_fault_within_a_delta_a_host_takes_all_weights(store, host, fault, when):
    model, publisher = Model(), publisher_of(store, size=64)
    publisher.publish(model.items())
    _, before = fetch(host, publisher)
    publication = publisher.publish(model.update(0.05).items())
    store.faults = {len(store.fetched) + when % (len(publication.buckets) + 1): fault}
    with pytest.raises(WeightSyncError):
        host.fetch(publication, host=0, hosts=1, timeout_s=0.2 if fault == "late" else 20.0)
    with pytest.raises(WeightSyncError):  # half of it is applied
        read(before, TABLE)
    assert host.round == 0
    kind, announced = fetch(host, publisher)
    assert kind == "full"
    assert has(announced, model)
    publisher.publish(model.update().items())
    kind, announced = fetch(host, publisher)
    assert kind == "delta"
    assert has(announced, model)


def test_a_publication_that_fails_is_no_base(store, host):
    model, publisher = Model(), publisher_of(store)
    publisher.publish(model.items())
    fetch(host, publisher)
    model.update(0.5)
    with pytest.raises(WeightSyncError, match="yielded 3 tensors"):
        publisher.publish(itertools.islice(model.items(), 3))
    with pytest.raises(WeightSyncError, match="no weights are in the object store"):
        publisher.for_host(host.round)
    publisher.publish(model.items())
    kind, announced = fetch(host, publisher)
    assert kind == "full"
    assert has(announced, model)


def test_an_engine_refuses_a_file_that_a_delta_has_made_wrong(store, host):
    """If ever the weights of a host were not those of their round: the digests are of what the trainer sent."""
    model, publisher = Model(), publisher_of(store)
    publisher.publish(model.items())
    _, announced = fetch(host, publisher)
    host._file.write(bytes([host._file.read(announced.nbytes - 64, 1)[0] ^ 1]), announced.nbytes - 64)
    publisher.publish(model.items())
    _, announced = fetch(host, publisher)
    with pytest.raises(WeightSyncError, match="does not match its checksum"):
        read(announced, TABLE)


# -- hosts that serve each other --------------------------------------------------------------------------------------


@pytest.fixture
def peers():
    peers = Peers(3, [Store() for _ in range(3)])
    yield peers
    peers.close()
    assert memory_files() == 0


def test_the_store_brings_each_bucket_of_a_delta_to_one_host(store, peers):
    model, publisher = Model(), publisher_of(store, size=32)
    peers.fetch(publisher.publish(model.items()))
    for _ in range(3):
        for each in peers.hosts:
            each._get.__self__.fetched.clear()
        peers.served = [[] for _ in peers.served]
        publication = publisher.publish(model.update(0.05).items())
        assert publication.base is not None
        assert len(publication.buckets) > 6
        for announced in peers.fetch(publication).values():
            assert has(announced, model)
        starts = {id(bucket.reference): bucket.start for bucket in publication.buckets}
        brought = [starts[id(r)] for each in peers.hosts for r in each._get.__self__.fetched if id(r) in starts]
        assert sorted(brought) == sorted(starts.values())
        assert sorted(start for served in peers.served for start in served) == sorted([*starts.values()] * 2)


def test_what_a_peer_does_not_deliver_of_a_delta_comes_from_the_store(store, peers):
    model, publisher = Model(), publisher_of(store, size=32)
    peers.fetch(publisher.publish(model.items()))
    peers.dead = {1}
    found = peers.fetch(publisher.publish(model.update(0.05).items()))
    assert len(found) == 2
    assert all(has(announced, model) for announced in found.values())
