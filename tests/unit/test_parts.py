"""An engine over several hosts, seen from its first: what it tells the others, and what follows when one ends."""

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from async_rl.config.loading import validate
from async_rl.errors import EngineDied, EngineError
from async_rl.rollout.parts import EngineParts
from async_rl.runtime import timeouts

CONFIG = validate(
    {
        "model": {"path": "m"},
        "data": {"train": "t"},
        "rollout": {"tensor_parallel_size": 3, "hosts_per_engine": 3},
        "cluster": {"interface": "lo"},
    }
)


class Actor:
    """The handle of an ``EnginePart``, as far as it is called."""

    def __init__(self, host):
        self.running, self.met, self.closed = Future(), [], False
        self.run = SimpleNamespace(remote=self._run)
        self.weights_host = SimpleNamespace(remote=lambda: answer(host))
        self.shutdown = SimpleNamespace(remote=self._shutdown)

    def _run(self, meeting):
        self.met.append(meeting)
        return SimpleNamespace(future=lambda: self.running)

    async def _shutdown(self):
        self.closed = True
        self.running.set_result(None)


async def answer(value):
    return value


class Engine:
    def __init__(self):
        self.part, self.lost = None, []

    def span(self, part):
        self.part = part

    def lose_part(self, why):
        self.lost.append(why)


@pytest.fixture
def started():
    """Return parts that have started, their actors, and the engine."""
    actors, engine = [Actor("b"), Actor("c")], Engine()
    parts = EngineParts(CONFIG, actors)
    parts.start(engine)
    return parts, actors, engine


async def test_all_parts_meet_at_a_port_of_the_first(started):
    parts, actors, engine = started
    host, port = engine.part.meeting
    assert (engine.part.number, engine.part.address, host) == (0, "127.0.0.1", "127.0.0.1")
    assert port > 0
    assert [actor.met for actor in actors] == [[engine.part.meeting]] * 2
    assert await parts.hosts() == ["b", "c"]


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (lambda running: running.set_result(None), "one of its ranks has ended"),
        (lambda running: running.set_exception(EngineError("no file")), "EngineError: no file"),
    ],
)
def test_a_part_that_ends_ends_the_engine_and_is_named(started, end, why):
    _, actors, engine = started
    end(actors[1].running)
    assert engine.lost == [f"its part on host 3 of 3: {why}"]


async def test_a_weight_sync_that_fails_with_a_part_finds_out_whose_it_was(started):
    parts, actors, _ = started
    await parts.check()

    async def died():
        raise ConnectionError("the actor died")

    actors[0].weights_host.remote = died
    with pytest.raises(EngineDied, match=r"^its part on host 2 of 3: ConnectionError: the actor died"):
        await parts.check()


async def test_at_the_end_the_parts_end_and_nothing_is_lost(started, monkeypatch):
    monkeypatch.setattr(timeouts, "ANSWER_S", 0.05)
    parts, actors, engine = started
    actors[0].shutdown.remote = asyncio.Event().wait  # it hangs
    await parts.shutdown()
    assert actors[1].closed
    assert engine.lost == []


def test_an_engine_that_cannot_span_hosts_is_refused():
    with pytest.raises(EngineError, match=r"object cannot span hosts; set rollout\.hosts_per_engine to 1"):
        EngineParts(CONFIG, [Actor("b")]).start(object())
    EngineParts(CONFIG, []).start(object())  # most engines are on one host
