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

    places, here = {}, "here"

    def get_runtime_context(self):
        return SimpleNamespace(get_node_id=lambda: self.here)

    @property
    def experimental(self):
        return SimpleNamespace(
            get_object_locations=lambda references: {
                reference: {"node_ids": self.places[reference]} for reference in references if reference in self.places
            }
        )


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
    store.places = {"a": ["here"], "b": ["there"]}
    monkeypatch.setattr(fetcher_module, "_EXCERPT", SimpleNamespace(remote=lambda *_: "task"))
    for name in ("a", "b"):
        with pytest.raises(PayloadLost, match=f"group {name}"):
            subject.excerpts([(f"group {name}", [name], 0)])


COPIES = {"group a": ["a", "a2"], "group b": ["b", "b2"], "group c": ["c"]}


@pytest.mark.parametrize(
    ("places", "read"),
    [
        ({"a": ["x"], "a2": ["y"], "b": ["x"], "b2": ["y"], "c": ["x"]}, ["a", "b", "c"]),
        ({"a": ["x"], "a2": ["here"], "b": ["x", "here"], "b2": ["here"]}, ["a2", "b", "c"]),
        ({"a2": ["y"], "b": ["x"]}, ["a2", "b", "c"]),  # what no host has any more comes last
        ({}, ["a", "b", "c"]),
    ],
)
def test_of_a_message_with_copies_the_nearest_one_is_read_and_no_other(reader, places, read):
    subject, store = reader(**{name: name.encode() for name in ("a", "a2", "b", "b2", "c")})
    store.places = places
    assert list(subject.messages(COPIES).values()) == [name.encode() for name in read]
    assert store.read == read


@pytest.mark.parametrize("first", [LOST, ActorDiedError(), None])
def test_the_other_copy_is_read_where_the_first_is_lost_or_does_not_come(reader, first):
    values = {"a": b"1", "a2": b"1", "b": first, "b2": b"2", "c": LOST}
    subject, store = reader(**{name: value for name, value in values.items() if value is not None})
    store.places = {"a": ["x"], "a2": ["y"], "b": ["x"], "b2": ["y"]}
    assert subject.hold(COPIES) == ["group c"]
    assert store.read == ["a", "b2"], "no second copy of a message that is there"
    assert subject.messages({"group b": ["b", "b2"]}) == {"group b": b"2"}


def test_a_group_is_lost_with_its_last_copy(reader):
    subject, _ = reader(a=LOST, a2=LOST, b=b"2", b2=b"2", c=b"3")
    assert subject.hold(COPIES) == ["group a"]
    with pytest.raises(PayloadLost, match="group a"):
        subject.messages(COPIES)


def test_an_excerpt_is_taken_from_another_copy_where_the_first_is_lost(reader, monkeypatch):
    subject, store = reader(**{"a2": b"here", "task of b": LOST, "task of b2": "excerpt of b2"})
    store.places = {"a2": ["here"], "b": ["x"], "b2": ["y"]}
    monkeypatch.setattr(fetcher_module, "_EXCERPT", SimpleNamespace(remote=lambda name, _: f"task of {name}"))
    monkeypatch.setattr(fetcher_module, "_excerpt", lambda message, index: f"excerpt of {message.decode()}")
    chosen = [("group a", ["a", "a2"], 0), ("group b", ["b", "b2"], 0)]
    assert subject.excerpts(chosen) == ["excerpt of here", "excerpt of b2"]
