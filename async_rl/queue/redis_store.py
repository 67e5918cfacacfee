"""Groups and the queue's journal in Redis Streams, for groups that outlive the cluster (queue.backend redis).

    async_rl:<run>:groups    stream: one entry per finished group, its message in wire format; several, each with a part
                             of the message, for one that is larger than what the server takes at once
    async_rl:<run>:journal   stream: the queue's decisions (``journal``)

A worker adds its entries before the queue hears of the group, and claims them in the consumer group "trainers"
(XCLAIM); a lease claims them for the consumer that leases. So XPENDING shows each consumer's entries and their ages,
without their messages. Trained and dropped groups are acknowledged and deleted. A crash between two such calls may
leave an entry that no group of the queue refers to: ``sweep`` deletes it.

While the server cannot be reached or does not answer, every call is retried for about a minute, and then raises
QueueError; the journal recognizes a call that was written twice by its id. Knows only Redis; imported only where the
backend is used.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from async_rl.config.operation import RedisSection
from async_rl.errors import ConfigError, QueueError
from async_rl.queue.journal import Event, pack, unpack

# How long a call is repeated: enough for the server to restart. One attempt may wait for an answer as long as
# _TIMEOUT_S, the last one too.
_GIVE_UP_S = 60.0
_TIMEOUT_S = 15.0
# The same for the question whether there is a server at all.
_PING_S = 5.0
_BACKOFF = ExponentialBackoff(cap=2.0, base=0.05)
_CONSUMERS = "trainers"
_PAGE = 1000  # ids or events of the journal, never messages
# What a server takes in one field unless it is configured otherwise, and what a stream holds in one entry.
_PROTO_MAX_BULK_BYTES = 512 * 2**20
_MAX_ENTRY_BYTES = 2**30 - 2**10
_SEPARATOR = ","  # between the ids in an address
_T = TypeVar("_T")


class _RetryInTime(Retry):
    """Retries for a time instead of a number of times, however long each attempt takes.

    The client calls it from within itself, to connect for a command; the time is that of the outermost call.
    """

    __hash__ = Retry.__hash__

    def __init__(self, give_up_s: float) -> None:
        super().__init__(_BACKOFF, -1)
        self._give_up_s = give_up_s
        self._until: float | None = None

    def call_with_retry(
        self,
        do: Callable[[], _T],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,  # noqa: FBT001 - the client's own signature
    ) -> _T:
        outermost = self._until is None
        if self._until is None:
            self._until = time.monotonic() + self._give_up_s
        until = self._until

        def in_time(error: Exception) -> bool:
            return time.monotonic() < until and (is_retryable is None or is_retryable(error))

        try:
            result: _T = super().call_with_retry(do, fail, in_time, with_failure_count)
            return result
        finally:
            if outermost:
                self._until = None


def connect(settings: RedisSection, give_up_s: float | None = None) -> redis.Redis:
    """Return a client of the server, which repeats a call for so long. Raises ConfigError for the password file."""
    give_up_s = _GIVE_UP_S if give_up_s is None else give_up_s
    timeout_s = min(_TIMEOUT_S, give_up_s)
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
        retry=_RetryInTime(give_up_s),
        retry_on_error=[redis.ConnectionError, redis.TimeoutError, redis.exceptions.BusyLoadingError],
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        **options,
    )
    return client


def ping(settings: RedisSection, run: str = "") -> bool:
    """Return whether the server has data of ``run``. Raises ConfigError unless it can be reached and used."""
    probe = connect(settings, _PING_S)
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


def _max_part_bytes(client: redis.Redis) -> int:
    """Return how much of a message the server takes in one entry; it closes a connection that brings more."""
    try:
        found = cast(dict[str, str], client.config_get("proto-max-bulk-len"))
    except redis.ResponseError:  # CONFIG may be forbidden to this user
        found = {}
    return min(int(found.get("proto-max-bulk-len", _PROTO_MAX_BULK_BYTES)), _MAX_ENTRY_BYTES)


@contextlib.contextmanager
def _errors(settings: RedisSection) -> Iterator[None]:
    """Raise QueueError for what the client raises when it has given up."""
    try:
        yield
    except redis.RedisError as error:
        raise QueueError(
            f"redis at queue.redis.url {settings.url}: {error}; calls are repeated for {_GIVE_UP_S:g} s while the "
            "server does not answer. Make it answer and continue the run with --resume auto"
        ) from error


class RedisGroups:
    """The messages of finished groups in the server, each addressed by the id of its stream entry.

    The address of a message in several entries has their ids in order, with a comma between two.

    Raises QueueError when the server refuses a call, or does not answer for about a minute.
    """

    def __init__(self, settings: RedisSection, run: str, consumer: str) -> None:
        self._settings = settings
        self._client = connect(settings)
        self._key = _key(run, "groups")
        self._consumer = consumer
        self._max_bytes: int | None = None
        with _errors(settings):
            try:
                self._client.xgroup_create(self._key, _CONSUMERS, id="0", mkstream=True)
            except redis.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    def add(self, group_id: str, message: Any) -> str:
        """Store a message; return its address."""
        whole = memoryview(message).cast("B")
        ids = []
        with _errors(self._settings):
            if self._max_bytes is None:
                self._max_bytes = _max_part_bytes(self._client)
            for start in range(0, max(1, len(whole)), self._max_bytes):
                part = bytes(whole[start : start + self._max_bytes])
                fields: dict[Any, Any] = {"group": group_id, "message": part}
                ids.append(_text(self._client.xadd(self._key, fields)))
        address = _SEPARATOR.join(ids)
        self.claim([address])
        return address

    def read(self, addresses: Sequence[str]) -> dict[str, bytes]:
        """Return the messages at these addresses, by address, without those that another client has deleted."""
        pipeline = self._client.pipeline(transaction=False)
        for entry_id in _ids(addresses):
            pipeline.xrange(self._key, entry_id, entry_id)
        with _errors(self._settings):
            answers = pipeline.execute()
        entries = zip(_ids(addresses), answers, strict=True)
        parts: dict[str, bytes] = {entry_id: entry[0][1][b"message"] for entry_id, entry in entries if entry}
        found = {address: _ids([address]) for address in addresses}
        return {
            address: b"".join(parts[entry_id] for entry_id in ids)
            for address, ids in found.items()
            if parts.keys() >= set(ids)
        }

    def claim(self, addresses: Sequence[str]) -> None:
        """Mark messages as this consumer's, even if they were another's."""
        with _errors(self._settings):
            self._client.xclaim(self._key, _CONSUMERS, self._consumer, 0, [*_ids(addresses)], force=True, justid=True)

    def forget(self, addresses: Sequence[str]) -> None:
        """Acknowledge and delete the messages of trained or dropped groups."""
        ids = _ids(addresses)
        pipeline = self._client.pipeline(transaction=True)
        pipeline.xack(self._key, _CONSUMERS, *ids)
        pipeline.xdel(self._key, *ids)
        with _errors(self._settings):
            pipeline.execute()

    def sweep(self, keep: Collection[str]) -> set[str]:
        """Delete every entry but those of the messages in ``keep``; return the addresses of these that are whole.

        Reads ids alone: the messages of a run may take more than the memory that there is.
        """
        there = self._entry_ids()
        whole = {address for address in keep if there.issuperset(_ids([address]))}
        gone = sorted(there.difference(_ids(whole)))
        for start in range(0, len(gone), _PAGE):
            self.forget(gone[start : start + _PAGE])
        return whole

    def _entry_ids(self) -> set[str]:
        """Return the ids of all entries."""
        with _errors(self._settings):
            claimed: set[str] = set()
            start = "-"
            while page := self._client.xpending_range(self._key, _CONSUMERS, start, "+", _PAGE):
                ids = [_text(entry["message_id"]) for entry in page]
                claimed.update(ids)
                start = f"({ids[-1]}"
            if self._client.xlen(self._key) == len(claimed):
                return claimed
            # An entry was never claimed, because its worker died before or was of an earlier release; or another
            # client deleted one. Only the entries themselves tell, one at a time.
            there: set[str] = set()
            start = "-"
            while entries := self._client.xrange(self._key, start, "+", count=1):
                entry_id = _text(entries[0][0])
                there.add(entry_id)
                start = f"({entry_id}"
            return there

    def close(self) -> None:
        self._client.close()


class RedisJournal:
    """The queue's journal in a stream of the server.

    Raises QueueError when the server refuses a call, or does not answer for about a minute.
    """

    def __init__(self, settings: RedisSection, run: str) -> None:
        self._settings = settings
        self._client = connect(settings)
        self._key = _key(run, "journal")
        self._bytes = 0

    def __str__(self) -> str:
        return f"Redis stream {self._key}"

    def replay(self) -> Iterator[Event]:
        start = "-"
        while page := self._page(start):
            for _, fields in page:
                packed = cast(dict[bytes, bytes], fields)[b"event"]
                self._bytes += len(packed)
                yield unpack(packed)
            start = f"({_text(page[-1][0])}"

    def _page(self, start: str) -> Any:
        with _errors(self._settings):
            return self._client.xrange(self._key, start, "+", count=_PAGE)

    def append(self, event: Event) -> None:
        packed = pack(event)
        with _errors(self._settings):
            self._client.xadd(self._key, {"event": packed})
        self._bytes += len(packed)

    def compact(self, event: Event) -> None:
        packed = pack(event)
        aside = f"{self._key}:new"
        pipeline = self._client.pipeline(transaction=True)
        pipeline.delete(aside)
        pipeline.xadd(aside, {"event": packed})
        pipeline.rename(aside, self._key)
        with _errors(self._settings):
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


def _ids(addresses: Iterable[str]) -> list[Any]:
    """Return the ids of the entries at these addresses."""
    return [entry_id for address in addresses for entry_id in address.split(_SEPARATOR)]


def _key(run: str, what: str) -> str:
    return f"async_rl:{run}:{what}"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
