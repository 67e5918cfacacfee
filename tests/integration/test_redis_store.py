"""Redis for real: what the queue keeps there, and what is said where it cannot be used."""

import functools
import itertools
import uuid

import numpy as np
import pytest

from async_rl.config.loading import validate
from async_rl.errors import ConfigError
from async_rl.queue import redis_store
from async_rl.queue.actor import QueueActor, begin
from async_rl.queue.journal import FileJournal
from tests.support.queue_parts import Source, make_broker, meta
from tests.support.redis_server import RedisServer


def test_tls_and_password_and_what_a_wrong_one_says(tmp_path):
    with RedisServer(tls=True) as server:
        settings = validate({"model": {"path": "m"}, "data": {"train": "t"}, "queue": server.settings}).queue.redis
        redis_store.check(settings, "run", resume=False)
        store = redis_store.RedisGroups(settings, "run", "w")
        address = store.add("0-1.0", b"abc")
        assert store.read([address, "9-0"]) == {address: b"abc"}
        journal = redis_store.RedisJournal(settings, "run")
        journal.append(["a", "advance", [1]])
        with pytest.raises(ConfigError, match="has the groups of a run 'run'"):
            redis_store.check(settings, "run", resume=False)
        redis_store.check(settings, "run", resume=True)
        redis_store.remove(settings, "run")
        redis_store.check(settings, "run", resume=False)
        (tmp_path / "wrong").write_text("wrong")
        with pytest.raises(ConfigError, match=r"queue\.redis\.url .*(WRONGPASS|invalid)"):
            redis_store.check(settings.model_copy(update={"password_file": tmp_path / "wrong"}), "run", resume=False)
        with pytest.raises(ConfigError, match=r"queue\.redis\.url .*certificate"):
            redis_store.check(settings.model_copy(update={"ca_file": None}), "run", resume=False)


async def test_the_durable_journal_rebuilds_a_broker_like_the_file_does(redis_server, tmp_path):
    settings = validate({"model": {"path": "m"}, "data": {"train": "t"}, "queue": redis_server.settings}).queue.redis
    made = itertools.count()
    name = f"run-{uuid.uuid4().hex[:8]}"
    for open_journal in (
        functools.partial(redis_store.RedisJournal, settings, name),
        functools.partial(FileJournal, tmp_path / "journal", create=True),
    ):
        begin(open_journal(), make_broker(Source(50)))
        actor = QueueActor(make_broker(Source(50)), open_journal)
        tickets = await actor.take("1", "w", 4)
        await actor.put("2", meta(tickets[0]))
        await actor.put("3", meta(tickets[1]))
        leased = await actor.lease("4", "t", 2)
        await actor.ack("5", [leased[0].group_id], 1)
        if next(made):  # a torn frame, of a call that nobody was told about
            with (tmp_path / "journal").open("ab") as file:
                file.write(b"\x40\x00\x00\x00garbage")
        again = QueueActor(make_broker(Source(50)), open_journal)
        assert again._broker.state() == actor._broker.state()
        # Calls whose answers were lost are answered as they were.
        assert [t.group_id for t in await again.take("1", "w", 4)] == [t.group_id for t in tickets[2:]]
        assert await again.put("2", meta(tickets[0])) is True
        assert [m.group_id for m in await again.lease("4", "t", 2)] == [leased[1].group_id]
        await again.ack("5", [leased[0].group_id], 1)
        assert again._broker.state() == actor._broker.state()
        # And once more after everything was written anew in one event.
        again._journal.compact(["", "restore", [again._broker.state(), list(again._answers.items())]])
        third = QueueActor(make_broker(Source(50)), open_journal)
        assert third._broker.state() == actor._broker.state()
        assert await third.put("2", meta(tickets[0])) is True


def test_messages_above_the_servers_limit_are_stored_in_parts_beside_earlier_ones():
    with RedisServer("--proto-max-bulk-len", "1mb") as server:
        settings = validate({"model": {"path": "m"}, "data": {"train": "t"}, "queue": server.settings}).queue.redis
        worker = redis_store.RedisGroups(settings, "run", "w")
        large = np.random.default_rng(0).integers(0, 256, 2 * 2**20 + 5, dtype=np.uint8)
        addresses = [worker.add(f"0-{number}.0", large) for number in range(2)]
        assert [address.count(",") for address in addresses] == [2, 2]
        # As an earlier release wrote it.
        whole = server.client().xadd(worker._key, {"group": "0-2.0", "message": b"abc"}).decode()
        trainer = redis_store.RedisGroups(settings, "run", "trainer")
        trainer.claim([*addresses, whole])
        wanted = {addresses[0]: large.tobytes(), whole: b"abc", addresses[1]: large.tobytes()}
        assert trainer.read([addresses[0], whole, addresses[1]]) == wanted
        assert worker.sweep({*addresses, whole, "1-0"}) == {*addresses, whole}

        server.client().xdel(worker._key, addresses[0].split(",")[1])
        assert trainer.read(addresses[:1]) == {}
        assert worker.sweep({*addresses, whole}) == {addresses[1], whole}, "a message without one of its parts is lost"
        trainer.forget([addresses[1]])
        assert server.client().xlen(worker._key) == 1


def test_sweeping_reads_no_message(redis_server):
    settings = validate({"model": {"path": "m"}, "data": {"train": "t"}, "queue": redis_server.settings}).queue.redis
    store = redis_store.RedisGroups(settings, f"run-{uuid.uuid4().hex[:8]}", "w")
    addresses = [store.add(f"0-{number}.0", bytes(10**6)) for number in range(8)]
    kept = {*addresses[:3], "1-0"}
    client = redis_server.client()
    before = client.info("stats")["total_net_output_bytes"]
    assert store.sweep(kept) == set(addresses[:3])
    assert client.info("stats")["total_net_output_bytes"] - before < 10**5
    assert client.xlen(store._key) == 3

    unclaimed = client.xadd(store._key, {"group": "0-9.0", "message": b"abc"}).decode()
    assert store.sweep({*kept, unclaimed}) == {*addresses[:3], unclaimed}
    assert store.sweep(addresses[:1]) == {addresses[0]}
    assert client.xlen(store._key) == 1
