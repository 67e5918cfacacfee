"""A Redis server that accepts connections and never answers, or takes smaller messages than are sent."""

import contextlib
import socket
import time

import pytest

from async_rl.config.loading import validate
from async_rl.doctor import inputs
from async_rl.errors import ConfigError, QueueError
from async_rl.queue import redis_store
from tests.support.model_folders import QWEN3_30B_A3B, write_config


@pytest.fixture
def silent(monkeypatch):
    """The settings of a server that accepts and is silent, and time limits of a second instead of a minute."""
    monkeypatch.setattr(redis_store, "_GIVE_UP_S", 1.0)
    monkeypatch.setattr(redis_store, "_TIMEOUT_S", 0.2)
    monkeypatch.setattr(redis_store, "_PING_S", 1.0)
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
    assert 0.9 < time.monotonic() - began < 20


def test_doctor_gives_a_silent_server_up(silent):
    with pytest.raises(ConfigError, match=r"queue\.redis\.url .*Timeout"):
        redis_store.ping(silent)


class Accepts:
    """A client of a server that takes four bytes in a field."""

    def xgroup_create(self, *_, **__):
        """Create nothing."""

    def config_get(self, name):
        return {name: "4"}


def test_a_message_that_the_server_does_not_take_is_refused_before_it_is_sent(monkeypatch, silent):
    monkeypatch.setattr(redis_store, "connect", lambda *_: Accepts())
    with pytest.raises(QueueError, match=r"group 0-1\.0: its message has 5 bytes, above the 4 .*proto-max-bulk-len"):
        redis_store.RedisGroups(silent, "run", "w").add("0-1.0", b"12345")


def test_doctor_says_that_groups_may_outgrow_the_server(tmp_path):
    tree = {
        "model": {"path": str(write_config(tmp_path / "model", QWEN3_30B_A3B))},
        "data": {"train": "t"},
        "rollout": {"n": 64, "max_response_tokens": 32_000},
    }
    (check,) = inputs._largest_message(validate(tree), 512 * 2**20)
    assert check.status == "warn"
    assert "proto-max-bulk-len" in check.fix
    assert list(inputs._largest_message(validate(tree), 2**30)) == []
