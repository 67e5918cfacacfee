"""Weights through an object store: what is published arrives, wherever it is cut, or there is an error. No Ray."""

from __future__ import annotations

import concurrent.futures
import os
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from async_rl.errors import WeightSyncError
from async_rl.weights.object_store import (
    MAX_BUCKET_BYTES,
    MIN_BUCKET_BYTES,
    HostWeights,
    Publisher,
    Staged,
    bucket_bytes,
    rotated,
)
from async_rl.weights.shm_file import TensorMeta, read


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(7, 50, generator=generator),
        "layers.0.norm.weight": torch.randn(5, generator=generator).bfloat16(),
        "layers.0.experts.0.w": torch.randn(3, 1, 2, generator=generator),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "strided": torch.randn(4, 60, generator=generator).T,
    }


TABLE = [TensorMeta(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors().items()]


class Reference:
    """What a store returns: it keeps an object while something refers to it."""

    def __init__(self, array):
        self.array = array


class Store:
    """An object store in this process; ``faults`` say what becomes of the n-th fetch."""

    def __init__(self):
        self.references = weakref.WeakSet()
        self.most = 0
        self.sizes = []
        self.fetched = []
        self.faults = {}

    @property
    def held(self):
        return sum(reference.array.nbytes for reference in self.references)

    def put(self, array):
        reference = Reference(array.copy())
        self.references.add(reference)
        self.sizes.append(array.nbytes)
        self.most = max(self.most, self.held)
        return reference

    def get(self, reference):
        fault = self.faults.get(len(self.fetched))
        self.fetched.append(reference)
        future = concurrent.futures.Future()
        if fault == "lost":
            future.set_exception(RuntimeError("the object is lost\nand much more"))
        elif fault == "corrupt":
            array = reference.array.copy()
            array[len(array) // 2] ^= 1
            future.set_result(array)
        elif fault == "short":
            future.set_result(reference.array[:-1])
        elif fault != "late":
            future.set_result(reference.array)
        self.last = future
        return future


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def host(store):
    host = HostWeights(store.get)
    yield host
    host.close()
    assert memory_files() == 0


def memory_files():
    """Memory files that this process has open."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # that of listdir itself
            continue
    return sum("memfd:async_rl_weights" in link for link in links)


def fetch(host, publication, *, number=0, hosts=1, timeout_s=20.0):
    return host.fetch(publication, host=number, hosts=hosts, timeout_s=timeout_s)


def same(received, sent):
    assert [name for name, _ in received] == list(sent)
    return all(torch.equal(tensor, sent[name]) and tensor.dtype == sent[name].dtype for name, tensor in received)


@pytest.mark.parametrize("size", [1, 64, 100, 333, 4096, 10**6])
def test_what_is_published_is_read_bit_for_bit_wherever_buckets_end(store, host, size):
    publisher = Publisher(TABLE, store.put, size=size)
    for seed in (1, 2, 3):
        publication = publisher.publish(tensors(seed).items())
        ends = [bucket.start + bucket.nbytes for bucket in publication.buckets]
        assert [bucket.start for bucket in publication.buckets[1:]] == ends[:-1]
        assert ends[-1] == publication.nbytes
        assert max(bucket.nbytes for bucket in publication.buckets) <= size
        assert same(read(fetch(host, publication, number=seed % 2, hosts=2), TABLE), tensors(seed))


def test_the_store_holds_one_version_at_a_time(store, host):
    publisher = Publisher(TABLE, store.put, size=256)
    first = publisher.publish(tensors(1).items())
    once = store.held
    fetch(host, first)
    del first
    store.fetched.clear()
    publisher.publish(tensors(2).items())
    assert (store.held, store.most) == (once, once)
    publisher.withdraw()
    assert store.held == 0


def test_a_host_lets_the_store_free_what_it_has_fetched(store, host):
    publisher = Publisher(TABLE, store.put, size=256)
    fetch(host, publisher.publish(tensors().items()))
    store.fetched.clear()
    del store.last
    publisher.withdraw()
    assert store.held == 0


def test_a_bucket_is_small_beside_a_large_model_and_there_are_many_of_a_small_one():
    for nbytes in (0, 1, 10**6, 64 * 2**20, 256 * 2**20, 61 * 10**9, 1_340 * 10**9):
        size = bucket_bytes(nbytes)
        assert size % 64 == 0
        assert MIN_BUCKET_BYTES <= size <= MAX_BUCKET_BYTES
        assert size in (MIN_BUCKET_BYTES, MAX_BUCKET_BYTES) or nbytes // size >= 60


def test_hosts_begin_at_different_buckets_and_fetch_all(store):
    buckets = Publisher(TABLE, store.put, size=100).publish(tensors().items()).buckets
    orders = [rotated(buckets, number, 4) for number in range(4)]
    assert len({order[0].start for order in orders}) == 4
    for order in orders:
        assert sorted(bucket.start for bucket in order) == [bucket.start for bucket in buckets]
    assert rotated(buckets[:1], 3, 4) == buckets[:1]
    assert rotated([], 1, 2) == []


def test_engines_of_one_host_share_what_was_fetched_once(store, host):
    publication = Publisher(TABLE, store.put, size=256).publish(tensors().items())
    announced = fetch(host, publication)
    fetched = len(store.fetched)
    assert fetched == len(publication.buckets) + 1
    assert fetch(host, publication) == announced
    assert len(store.fetched) == fetched


def test_a_host_that_joins_fetches_the_current_version_alone(store, host):
    publisher = Publisher(TABLE, store.put, size=256)
    for seed in (1, 2, 3):
        publisher.publish(tensors(seed).items())
    assert same(read(fetch(host, publisher.current), TABLE), tensors(3))
    assert len(store.fetched) == len(publisher.current.buckets) + 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "late",
            r"in time: \d+ of \d+ buckets are missing after 0\.2 s; raise sync\.timeout_s",
        ),
        ("lost", r"could not be fetched: RuntimeError: the object is lost$"),
        ("corrupt", r"the bucket of \d+ bytes at \d+ of the weight file does not match its checksum"),
        ("short", r"does not match its checksum"),
    ],
)
@pytest.mark.parametrize("when", [0, 2, -1])
def test_invariant_10_a_fault_of_a_bucket_is_an_error_and_a_second_attempt_works(store, host, fault, message, when):
    publisher = Publisher(TABLE, store.put, size=256)
    before = fetch(host, publisher.publish(tensors(1).items()))
    publication = publisher.publish(tensors(2).items())
    count = len(publication.buckets) + 1
    store.faults = {count + when % count: fault}
    with pytest.raises(WeightSyncError, match=message):
        fetch(host, publication, timeout_s=0.2)
    with pytest.raises(WeightSyncError):  # half of the new version is where the old one was
        read(before, TABLE)
    assert same(read(fetch(host, publication), TABLE), tensors(2))
    assert same(read(fetch(host, publisher.publish(tensors(3).items())), TABLE), tensors(3))


def test_a_later_fetch_supersedes_one_that_waits(store, host):
    publisher = Publisher(TABLE, store.put, size=256)
    first = publisher.publish(tensors(1).items())
    store.faults = {1: "late"}
    failed = []

    def abandoned():
        try:
            fetch(host, first)
        except WeightSyncError as error:
            failed.append(str(error))

    get, waiting, late = store.get, threading.Event(), []

    def noted(reference):
        late.append(get(reference))
        if len(late) == 2:
            waiting.set()
        return late[-1]

    host._get = noted
    thread = threading.Thread(target=abandoned)
    thread.start()
    assert waiting.wait(20)
    second = publisher.publish(tensors(2).items())
    announced = fetch(host, second)
    late[1].set_result(np.zeros(1, np.uint8))
    thread.join(20)
    assert failed == ["another transfer of weights to this host has begun"]
    assert same(read(announced, TABLE), tensors(2))
    assert memory_files() == 1


def test_a_model_of_another_size_gets_a_file_of_its_own(store, host):
    fetch(host, Publisher(TABLE, store.put).publish(tensors().items()))
    few = dict(list(tensors().items())[:2])
    publication = Publisher(TABLE[:2], store.put).publish(few.items())
    assert same(read(fetch(host, publication), TABLE[:2]), few)
    assert memory_files() == 1


def test_nothing_appears_in_shared_memory(store, host):
    before = set(os.listdir("/dev/shm"))
    fetch(host, Publisher(TABLE, store.put).publish(tensors().items()))
    assert set(os.listdir("/dev/shm")) <= before


def test_publications_of_two_trainers_are_told_apart(store, host):
    fetch(host, Publisher(TABLE, store.put).publish(tensors(1).items()))
    publication = Publisher(TABLE, store.put).publish(tensors(2).items())
    assert same(read(fetch(host, publication), TABLE), tensors(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("strided"), "yielded 5 tensors, its name table has 6"),
        (lambda t: t.update(scalar=torch.zeros(1)), r"scalar float32\[1\] where its name table has scalar float32\[\]"),
    ],
)
def test_a_source_that_strays_from_its_name_table_publishes_nothing(store, change, message):
    publisher = Publisher(TABLE, store.put)
    publisher.publish(tensors().items())
    changed = tensors()
    change(changed)
    with pytest.raises(WeightSyncError, match=message):
        publisher.publish(changed.items())
    assert publisher.current is None
    assert store.held == 0


def test_another_publication_than_announced_is_refused_by_the_engine(store, host):
    announced = fetch(host, Publisher(TABLE, store.put).publish(tensors().items()))
    with pytest.raises(WeightSyncError, match="holds round"):
        read(replace(announced, round=announced.round + 1), TABLE)


# -- what is gathered when --------------------------------------------------------------------------------------------


def test_a_joining_replica_is_given_what_is_staged():
    staged = Staged()
    staged.connect(["a", "b"])
    assert staged.stage()
    staged.connect(["c"])
    assert not staged.stage()
    staged.connect(["a", "b", "c"])
    staged.outdate()
    assert staged.stage()


def test_replicas_synced_in_turn_are_given_one_version():
    staged = Staged()
    staged.connect(["a", "b"])
    assert [staged.stage(), staged.stage()] == [True, False]


def test_a_second_attempt_gathers_again():
    """Whatever failed on whichever rank: every rank sees the replicas that are connected."""
    staged = Staged()
    staged.connect(["a", "b"])
    assert staged.stage()
    staged.connect(["a"])
    assert staged.stage()
    staged.connect(["c"])
    assert not staged.stage()
    staged.connect(["c"])
    assert staged.stage()


def test_an_update_is_gathered():
    staged = Staged()
    staged.connect(["a"])
    assert staged.stage()
    staged.outdate()
    assert staged.stage()
