"""Weights through an object store: what is published arrives, wherever it is cut, or there is an error. No Ray."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from async_rl.errors import WeightSyncError
from async_rl.weights.buckets import (
    MAX_BUCKET_BYTES,
    MIN_BUCKET_BYTES,
    Bucket,
    bucket_bytes,
    rotated,
    shares,
)
from async_rl.weights.object_store import HostWeights, Publisher, Staged
from async_rl.weights.shm_file import TensorMeta, read
from tests.support.object_stores import Peers, Store, memory_files


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


TABLE = [TensorMeta.of(name, tensor) for name, tensor in tensors().items()]


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def host(store):
    host = HostWeights(store.get)
    yield host
    host.close()
    assert memory_files() == 0


def fetch(host, publication, *, number=0, hosts=1, timeout_s=20.0):
    return host.fetch(publication, host=number, hosts=hosts, timeout_s=timeout_s)


def same(received, sent):
    assert [name for name, _ in received] == list(sent)
    return all(torch.equal(tensor, sent[name]) and tensor.dtype == sent[name].dtype for name, tensor in received)


@pytest.mark.parametrize("size", [7, 64, 100, 333, 4096, 10**6])
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


@pytest.mark.parametrize(("count", "hosts"), [(0, 2), (1, 3), (8, 1), (8, 2), (9, 4), (64, 7)])
def test_each_bucket_is_of_one_host_and_no_two_hosts_ask_one_peer_at_a_time(count, hosts):
    buckets = [Bucket(start, 1, 0, None) for start in range(count)]
    found = [shares(buckets, number, hosts) for number in range(hosts)]
    assert sorted(bucket.start for own, _ in found for bucket in own) == list(range(count))
    for own, others in found:
        assert sorted(bucket.start for bucket in [*own, *(bucket for _, bucket in others)]) == list(range(count))
        assert all(bucket in found[owner][0] for owner, bucket in others)
    whole = count // hosts * (hosts - 1)  # of groups with a bucket of each host
    for asked in zip(*([owner for owner, _ in others][:whole] for _, others in found), strict=True):
        assert len(set(asked)) == hosts


@pytest.fixture
def peers():
    """Three hosts, whose fetches from the store are counted apart."""
    stores = [Store() for _ in range(3)]
    peers = Peers(3, stores)
    peers.stores = stores
    yield peers
    peers.close()
    assert memory_files() == 0


def test_the_store_brings_each_bucket_to_one_host_which_serves_it_to_the_others(store, peers):
    publisher = Publisher(TABLE, store.put, size=100)
    for seed in (1, 2, 3):
        publication = publisher.publish(tensors(seed).items())
        for announced in peers.fetch(publication).values():
            assert same(read(announced, TABLE), tensors(seed))
        buckets = {id(bucket.reference): bucket.start for bucket in publication.buckets}
        brought = [buckets[id(r)] for each in peers.stores for r in each.fetched if id(r) in buckets]
        assert sorted(brought) == sorted(buckets.values())
        assert sorted(start for served in peers.served for start in served) == sorted([*buckets.values()] * 2)
        for each in peers.stores:
            each.fetched.clear()
            each.last = None
        peers.served = [[] for _ in peers.served]
    held = store.held
    publication = None
    publisher.withdraw()
    assert held > 0 == store.held  # no host keeps a reference


@pytest.mark.parametrize("fault", ["lost", "corrupt"])
def test_what_a_peer_does_not_deliver_comes_from_the_store(store, peers, fault):
    publication = Publisher(TABLE, store.put, size=100).publish(tensors(1).items())
    if fault == "lost":
        peers.dead = {1}
    else:
        peers.hosts[1].read = lambda round_, start: np.zeros(7, np.uint8)
    announced = peers.fetch(publication)
    assert len(announced) == (2 if fault == "lost" else 3)
    for each in announced.values():
        assert same(read(each, TABLE), tensors(1))


def test_a_peer_whose_own_fetch_failed_does_not_keep_the_others_waiting(store, peers):
    publication = Publisher(TABLE, store.put, size=100).publish(tensors(1).items())
    peers.stores[1].faults = {1: "late"}
    calls = peers.begin(publication, {1: 1.0})
    with pytest.raises(WeightSyncError, match="in time"):
        calls[1].result(30)
    for number in (0, 2):
        assert same(read(calls[number].result(15), TABLE), tensors(1))
    missing = [bucket.start for bucket in shares(publication.buckets, 1, 3)[0]][1]
    with pytest.raises(WeightSyncError, match="could not fetch the weights"):
        peers.hosts[1].available(publication.round, missing).result(5)


def test_a_host_forgets_who_waits_no_longer(store, host):
    for start in range(5):
        host.available(123, start).cancel()
    fetch(host, Publisher(TABLE, store.put).publish(tensors().items()))
    assert host._wanted == []


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
        fetch(host, publication, timeout_s=0.2 if fault == "late" else 20.0)
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
    thread.join(20)
    assert failed == ["the transfer of weights to this host was ended: another has begun, or a part failed"]
    assert same(read(announced, TABLE), tensors(2))
    assert memory_files() == 1


def test_a_model_of_another_size_gets_a_file_of_its_own(store, host):
    fetch(host, Publisher(TABLE, store.put).publish(tensors().items()))
    few = dict(list(tensors().items())[:2])
    publication = Publisher(TABLE[:2], store.put).publish(few.items())
    assert same(read(fetch(host, publication), TABLE[:2]), few)
    assert memory_files() == 1


def test_nothing_appears_in_shared_memory(store, host):
    before = shared_files()
    fetch(host, Publisher(TABLE, store.put).publish(tensors().items()))
    assert shared_files() <= before


def shared_files():
    """The named files, without semaphores, which other processes of this machine make and remove."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


def test_publications_of_two_trainers_are_distinct(store, host):
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
