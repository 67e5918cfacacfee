"""A Redis server that accepts connections and never answers, or takes smaller messages than are sent."""

import contextlib
import socket
import time

import numpy as np
import pytest

from async_rl.config.loading import validate
from async_rl.errors import ConfigError, QueueError
from async_rl.queue import redis_store


@pytest.fixture
def silent(monkeypatch):
    """The settings of a server that accepts and is silent, and time limits of half a second instead of a minute."""
    monkeypatch.setattr(redis_store, "_GIVE_UP_S", 0.4)
    monkeypatch.setattr(redis_store, "_TIMEOUT_S", 0.1)
    monkeypatch.setattr(redis_store, "_PING_S", 0.4)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0), backlog=1000)) as server:
        url = f"redis://127.0.0.1:{server.getsockname()[1]}/0"
        tree = {"model": {"path": "m"}, "data": {"train": "t"}, "queue": {"backend": "redis", "redis": {"url": url}}}
        yield validate(tree).queue.redis


@pytest.mark.parametrize(
    "call",
    [
        lambda settings: redis_store.RedisJournal(settings, "run").append(["a", "advance", [1]]),
        lambda settings: next(redis_store.RedisJournal(settings, "run").replay()),
        lambda settings: redis_store.RedisJournal(settings, "run").compact(["a", "restore", []]),
        lambda settings: redis_store.RedisGroups(settings, "run", "w"),
    ],
)
def test_a_silent_server_is_given_up_in_time_whatever_an_attempt_takes(silent, call):
    began = time.monotonic()
    with pytest.raises(QueueError, match=r"queue\.redis\.url redis://127\.0\.0\.1:\d+/0: Timeout"):
        call(silent)
    # A connection and a command have their minute each; the machine may be busy.
    assert 0.35 < time.monotonic() - began < 20


def test_doctor_gives_a_silent_server_up(silent):
    with pytest.raises(ConfigError, match=r"queue\.redis\.url .*Timeout"):
        redis_store.ping(silent)


class TakesFourBytes:
    """A client of a server that takes four bytes in a field."""

    def __init__(self):
        self.entries = []
        self.claimed = []

    def xgroup_create(self, *_, **__):
        """Create nothing."""

    def config_get(self, name):
        return {name: "4"}

    def xadd(self, key, fields):
        assert len(fields["message"]) <= 4, "the server would close the connection in the middle of it"
        self.entries.append(fields["message"])
        return f"{len(self.entries)}-0".encode()

    def xclaim(self, key, group, consumer, idle, ids, **_):
        self.claimed += ids


@pytest.mark.parametrize(
    "message", [b"", b"1234", b"12345", bytes(range(12))], ids=["empty", "whole", "two parts", "three full parts"]
)
def test_a_message_that_the_server_does_not_take_at_once_is_stored_in_parts(monkeypatch, silent, message):
    client = TakesFourBytes()
    monkeypatch.setattr(redis_store, "connect", lambda *_: client)
    address = redis_store.RedisGroups(silent, "run", "w").add("0-1.0", np.frombuffer(message, dtype=np.uint8))
    assert b"".join(client.entries) == message
    assert len(client.entries) == max(1, -(-len(message) // 4))
    assert address == ",".join(client.claimed) == ",".join(f"{n}-0" for n in range(1, len(client.entries) + 1))
