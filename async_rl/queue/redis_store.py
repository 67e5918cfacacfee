"""Groups and the queue's journal in Redis Streams, for groups that outlive the cluster (queue.backend redis).

    async_rl:<run>:groups    stream: one entry per finished group, its message in wire format
    async_rl:<run>:journal   stream: the queue's decisions (``journal``)

A worker adds its entry before the queue hears of the group. A lease claims the entry for the consumer group
"trainers" (XCLAIM), so that XPENDING shows each consumer's leases and their ages. Trained and dropped groups are
acknowledged and deleted. A crash between two such calls may leave an entry that no group of the queue refers to:
``sweep`` deletes it.

While the server cannot be reached, every call is retried for about a minute; the journal recognizes a call that was
written twice by its id. Knows only Redis; imported only where the backend is used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, cast

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from async_rl.config.schema import RedisSection
from async_rl.errors import ConfigError, QueueError
from async_rl.queue.journal import Event, pack, unpack

# About a minute in all, enough for the server to restart.
_RETRIES = 40
_BACKOFF = ExponentialBackoff(cap=2.0, base=0.05)
_TIMEOUT_S = 30.0
_CONSUMERS = "trainers"
_PAGE = 16


def connect(settings: RedisSection) -> redis.Redis:
    """Return a client of the server. Raises ConfigError when the password file cannot be read."""
    options: dict[str, Any] = {}
    if settings.password_file is not None:
        try:
            options["password"] = settings.password_file.read_text().strip()
        except OSError as error:
            raise ConfigError(
                f"queue.redis.password_file {settings.password_file}: {error.strerror}; set it to a readable file"
            ) from None
    if settings.username is not None:
        options["username"] = settings.username
    if settings.ca_file is not None:
        options["ssl_ca_certs"] = str(settings.ca_file)
    client: redis.Redis = redis.Redis.from_url(
        settings.url,
        retry=Retry(_BACKOFF, _RETRIES),
        retry_on_error=[redis.ConnectionError, redis.TimeoutError, redis.exceptions.BusyLoadingError],
        socket_timeout=_TIMEOUT_S,
        socket_connect_timeout=_TIMEOUT_S,
        **options,
    )
    return client


def ping(settings: RedisSection, run: str = "") -> bool:
    """Return whether the server has data of ``run``. Raises ConfigError unless it can be reached and used."""
    probe = connect(settings)
    probe.set_retry(Retry(_BACKOFF, 3))
    try:
        probe.ping()
        return bool(probe.exists(_key(run, "journal")))
    except redis.RedisError as error:
        raise ConfigError(f"queue.redis.url {settings.url}: {error}") from None
    finally:
        probe.close()


def check(settings: RedisSection, run: str, *, resume: bool) -> None:
    """Raise ConfigError unless the server can be used and, without ``resume``, has no data of a run of this name."""
    if ping(settings, run) and not resume:
        raise ConfigError(
            f"queue.redis.url {settings.url}: has the groups of a run {run!r}; continue it (--resume auto), set "
            f"another --name, or delete the keys {_key(run, '*')}"
        )


class RedisGroups:
    """The messages of finished groups in the server, each addressed by the id of its stream entry."""

    def __init__(self, settings: RedisSection, run: str, consumer: str) -> None:
        self._client = connect(settings)
        self._key = _key(run, "groups")
        self._consumer = consumer
        try:
            self._client.xgroup_create(self._key, _CONSUMERS, id="0", mkstream=True)
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def add(self, group_id: str, message: Any) -> str:
        """Store a message; return its address."""
        fields: dict[Any, Any] = {"group": group_id, "message": memoryview(message).tobytes()}
        return _text(self._client.xadd(self._key, fields))

    def read(self, addresses: Sequence[str]) -> list[bytes]:
        """Return the messages at these addresses. Raises QueueError when one is missing."""
        pipeline = self._client.pipeline(transaction=False)
        for address in addresses:
            pipeline.xrange(self._key, address, address)
        messages = []
        for address, entries in zip(addresses, pipeline.execute(), strict=True):
            if not entries:
                raise QueueError(f"redis: {self._key} has no entry {address}; another client may have deleted it")
            messages.append(entries[0][1][b"message"])
        return messages

    def claim(self, addresses: Sequence[str]) -> None:
        """Mark messages as leased by this consumer, even if another had leased them."""
        self._client.xclaim(self._key, _CONSUMERS, self._consumer, 0, list(addresses), force=True, justid=True)

    def forget(self, addresses: Sequence[str]) -> None:
        """Acknowledge and delete the messages of trained or dropped groups."""
        pipeline = self._client.pipeline(transaction=True)
        pipeline.xack(self._key, _CONSUMERS, *addresses)
        pipeline.xdel(self._key, *addresses)
        pipeline.execute()

    def sweep(self, keep: Collection[str]) -> set[str]:
        """Delete every entry that is not in ``keep``; return the addresses of those in ``keep`` that exist."""
        there: set[str] = set()
        start = "-"
        while page := self._client.xrange(self._key, start, "+", count=_PAGE):
            addresses = [_text(address) for address, _ in page]
            there.update(address for address in addresses if address in keep)
            if gone := [address for address in addresses if address not in keep]:
                self.forget(gone)
            start = f"({addresses[-1]}"
        return there

    def close(self) -> None:
        self._client.close()


class RedisJournal:
    """The queue's journal in a stream of the server."""

    def __init__(self, settings: RedisSection, run: str) -> None:
        self._client = connect(settings)
        self._key = _key(run, "journal")
        self._bytes = 0

    def __str__(self) -> str:
        return f"Redis stream {self._key}"

    def replay(self) -> Iterator[Event]:
        start = "-"
        while page := self._client.xrange(self._key, start, "+", count=1000):
            for _, fields in page:
                packed = cast(dict[bytes, bytes], fields)[b"event"]
                self._bytes += len(packed)
                yield unpack(packed)
            start = f"({_text(page[-1][0])}"

    def append(self, event: Event) -> None:
        packed = pack(event)
        self._client.xadd(self._key, {"event": packed})
        self._bytes += len(packed)

    def compact(self, event: Event) -> None:
        packed = pack(event)
        aside = f"{self._key}:new"
        pipeline = self._client.pipeline(transaction=True)
        pipeline.delete(aside)
        pipeline.xadd(aside, {"event": packed})
        pipeline.rename(aside, self._key)
        pipeline.execute()
        self._bytes = len(packed)

    def size(self) -> int:
        return self._bytes

    def close(self) -> None:
        self._client.close()


def remove(settings: RedisSection, run: str) -> None:
    """Delete all data of a run from the server."""
    client = connect(settings)
    client.delete(_key(run, "groups"), _key(run, "journal"), _key(run, "journal:new"))
    client.close()


def _key(run: str, what: str) -> str:
    return f"async_rl:{run}:{what}"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
