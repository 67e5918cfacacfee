"""What a reader of finished groups does when some of their messages are lost. Ray is a stand-in."""

import pickle
from types import SimpleNamespace

import pytest
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    NodeDiedError,
    ObjectReconstructionFailedError,
    ObjectStoreFullError,
    OwnerDiedError,
)

from async_rl.errors import PayloadLost
from async_rl.queue import fetcher as fetcher_module
from async_rl.queue.fetcher import Fetcher
from async_rl.runtime import timeouts

LOST = ObjectReconstructionFailedError("00")


class Store:
    """The object stores of a cluster: a value for each reference, an error in its place, or nothing at all."""

    def __init__(self, **values):
        self.values, self.read, self.waits = values, [], []

    def get(self, references, timeout):
        assert timeout == timeouts.PAYLOAD_S
        wanted = references if isinstance(references, list) else [references]
        for reference in wanted:
            if isinstance(found := self.values.get(reference), Exception):
                raise found
        if any(reference not in self.values for reference in wanted):
            raise GetTimeoutError
        self.read += wanted
        found = [self.values[reference] for reference in wanted]
        return found if isinstance(references, list) else found[0]

    def wait(self, references, num_returns, timeout):
        assert (num_returns, timeout) == (1, timeouts.PAYLOAD_S)
        self.waits.append(len(references))
        ready = [reference for reference in references if reference in self.values][:1]
        return ready, [reference for reference in references if reference not in ready]


@pytest.fixture
def reader(monkeypatch):
    def make(**values):
        monkeypatch.setattr(fetcher_module, "ray", store := Store(**values))
        return Fetcher(SimpleNamespace()), store

    return make


def payloads(*names):
    return {f"group {name}": [name] for name in names}


def test_what_is_there_is_read_at_once(reader):
    subject, store = reader(a=b"1", b=b"2")
    assert subject.messages(payloads("b", "a")) == {"group b": b"2", "group a": b"1"}
    assert (store.read, store.waits) == (["b", "a"], [])
    assert subject.messages({}) == {}


@pytest.mark.parametrize(
    "error",
    [
        LOST,
        OwnerDiedError("00", None, ""),
        ActorDiedError(),  # in the place of a message of a stream whose worker had not ended when its host died
        NodeDiedError("its task's"),
    ],
)
def test_lost_groups_are_named_and_the_others_kept(reader, error):
    subject, store = reader(a=b"1", b=error, c=b"3", d=error)
    assert subject.hold(payloads("a", "b", "c", "d")) == ["group b", "group d"]
    assert store.read == ["a", "c"]
    assert subject.messages(payloads("a", "c")) == {"group a": b"1", "group c": b"3"}
    assert store.read == ["a", "c"], "read once"


def test_what_never_comes_is_lost_and_what_comes_late_is_not(reader):
    subject, store = reader(a=b"1", c=b"3")
    assert subject.hold(payloads("a", "b", "c", "d")) == ["group b", "group d"]
    assert store.waits == [4, 3, 2], "given up after the first wait that brought nothing"


def test_a_fault_that_is_no_loss_is_raised(reader):
    subject, _ = reader(a=ObjectStoreFullError("full"))
    with pytest.raises(ObjectStoreFullError):
        subject.hold(payloads("a"))


def test_held_messages_are_let_go_once_they_are_asked_for_or_no_longer_wanted(reader):
    subject, store = reader(a=b"1", b=b"2", c=b"3")
    subject.hold(payloads("a", "b"))
    subject.hold(payloads("b", "c"))
    assert store.read == ["a", "b", "c"]
    assert set(subject._held) == {"group b", "group c"}
    subject.messages(payloads("b"))
    assert set(subject._held) == {"group c"}


def test_the_error_names_the_groups_in_another_process_too(reader):
    subject, _ = reader(a=b"1", b=LOST)
    with pytest.raises(PayloadLost, match=r"1 finished groups are lost.*: group b$") as caught:
        subject.messages(payloads("a", "b"))
    assert pickle.loads(pickle.dumps(caught.value)).group_ids == ("group b",)
    assert str(PayloadLost([str(i) for i in range(9)])).endswith("0, 1, 2, 3, 4, ...")


def test_a_message_that_redis_has_no_more_is_lost(reader):
    subject, _ = reader(a=b"1")
    subject._groups = SimpleNamespace(read=lambda addresses: {x: b"redis" for x in addresses if x != "2-0"})
    stored = {"group b": "1-0", "group c": "2-0"}
    assert subject.hold(payloads("a") | stored) == ["group c"]
    assert subject.messages(payloads("a") | {"group b": "1-0"}) == {"group a": b"1", "group b": b"redis"}


def test_an_excerpt_of_a_lost_group_is_none(reader, monkeypatch):
    """One group is on another host, whose task fails, and one on this host."""
    subject, store = reader(a=LOST, task=LOST)
    store.get_runtime_context = lambda: SimpleNamespace(get_node_id=lambda: "here")
    places = {"a": {"node_ids": ["here"]}, "b": {"node_ids": ["there"]}}
    store.experimental = SimpleNamespace(get_object_locations=lambda _: places)
    monkeypatch.setattr(fetcher_module, "_EXCERPT", SimpleNamespace(remote=lambda *_: "task"))
    for name in ("a", "b"):
        with pytest.raises(PayloadLost, match=f"group {name}"):
            subject.excerpts([(f"group {name}", [name], 0)])
