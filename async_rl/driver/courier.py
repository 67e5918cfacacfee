"""Brings the files of a run to its folder, which the driver's host alone has (cluster.shared_fs false).

                     host_files of host 2 ──┐   what is added to logs and timelines, every few seconds
    run folder ◄──► Courier                 ├─  files of a checkpoint, when its parts are written, and of the export
                     host_files of host 3 ──┘   files of a checkpoint that is restored, the other way

The courier is a process of its own on the driver's host, so that no byte passes through the driver. It starts one
process, ``runtime.host_files``, on each host where the run has or had a process. Files travel through Ray's object
store in chunks, a few at a time. Trouble with logs is logged and tried again, and ends no run; what follows when a file
of a checkpoint does not come is decided by ``driver.checkpoint``.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import structlog
import xxhash
from ray._private.state import actors  # an interface for developers, of no public module
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from async_rl.config.schema import RunConfig
from async_rl.driver.host_watch import hosts_alive
from async_rl.driver.run_state import FOLDER as OWN_FILES
from async_rl.errors import CheckpointDamaged, CheckpointError
from async_rl.runtime import logs, manifest, timeouts
from async_rl.runtime.arrivals import Arrivals
from async_rl.runtime.failures import brief, unwrap_ray_error
from async_rl.runtime.host_files import Chunk, HostFiles
from async_rl.runtime.manifest import ChecksummedFile, Entries, FileEntry

log = structlog.get_logger(__name__)

# How often logs and timelines are read, and how often the hosts of the run are looked up.
_PERIOD_S, _LOOK_S = 2.0, 5.0
CHUNK_BYTES = 16 * 2**20
# Files that travel at a time, and chunks of each: one is written while the other comes. Together 128 MiB of the store.
_STREAMS, _AHEAD = 4, 2
_HOST_THREADS = 8
# In the place of the address of one host.
_ALL = "all"
# How long a host has at the end of a run for what it has not sent yet.
_LAST_S = 20.0


class Collected(NamedTuple):
    """What came of the files that were asked for."""

    missing: list[str]
    """Those that no host has that is up."""
    lost_hosts: list[str]
    """Hosts of the run that are gone."""


class _Host(NamedTuple):
    node_id: str
    files: Any
    """Its ``HostFiles``, as an actor."""


class Courier:
    """What is done on the driver's host. Its methods may be called by several threads at a time."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._arrivals = Arrivals(config.run_dir, timeline_bytes=config.metrics.timeline_bytes)
        self._hosts: dict[str, _Host] = {}  # by address
        self._lost: set[str] = set()  # also those that came back, without what they had
        self._looking, self._adding = threading.Lock(), threading.Lock()
        self._looked = -math.inf
        self._asked: dict[str, Any] = {}  # answers that hosts owe to ``_read_all``
        self._troubled: set[str] = set()  # hosts whose trouble is logged already
        self._ending = threading.Event()
        self._reading = threading.Thread(target=self._read_until_end, name="reading", daemon=True)

    # -- logs and timelines -------------------------------------------------------------------------------------

    def begin_reading(self) -> None:
        """Read the logs and timelines of all hosts from now on, in a thread, until ``finish``."""
        self._reading.start()

    def _read_until_end(self) -> None:
        more = False
        while not self._ending.wait(0 if more else _PERIOD_S):
            try:
                if time.monotonic() - self._looked > _LOOK_S:
                    self._look()
                more = self._read_all()
                self._troubled.discard(_ALL)
            except Exception as error:  # noqa: BLE001 - whatever it is, the next attempt may succeed
                more = False
                self._note(_ALL, "hosts_not_read", error)

    def _read_all(self, *, ended: bool = False) -> bool:
        """Add what hosts answer within a period. Returns whether one has more than that."""
        for address in set(self._asked).difference(self._hosts):
            del self._asked[address]
        for address, host in list(self._hosts.items()):
            if address not in self._asked:
                self._asked[address] = host.files.read.remote(self._arrivals.positions(address), ended=ended)
        if not self._asked:
            return False
        ray.wait(list(self._asked.values()), num_returns=len(self._asked), timeout=_PERIOD_S)
        answered = [address for address, answer in self._asked.items() if _is_ready(answer)]
        more = [self._take(address, self._asked.pop(address)) for address in answered]
        return any(more)

    def _take(self, address: str, answer: Any) -> bool:
        """Add the answer of a host to the run folder. Returns whether the host has more."""
        try:
            shipment = ray.get(answer, timeout=_LAST_S)
            with self._adding:
                missing = self._arrivals.take(address, shipment)
            for stream in missing:
                log.warning("lines_missing", host=address, stream=stream, reason="removed before they were read")
        except RayError as error:
            self._note(address, "host_not_read", error)
            return False
        except OSError as error:  # a full disk
            self._note(address, "lines_not_written", error, setting="runs", folder=str(self._config.run_dir))
            return False
        self._troubled.discard(address)
        return bool(shipment.more)

    def _note(self, address: str, event: str, error: Exception, **fields: str) -> None:
        """Log what went wrong with a host, once until it is over."""
        if address not in self._troubled:
            self._troubled.add(address)
            log.warning(event, host=address, reason=brief(error), **fields)

    # -- hosts --------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Find the hosts on which the run has or had a process; start what reads their files."""
        with self._looking:
            self._looked = time.monotonic()
            alive = hosts_alive()
            for address, node_id in _places():
                if address == self._config.cluster.run_host or node_id not in alive:
                    continue
                if address not in self._hosts:
                    self._hosts[address] = _Host(node_id, self._start(address, node_id))
            for address, host in list(self._hosts.items()):
                if host.node_id not in alive:
                    del self._hosts[address]
                    self._lost.add(address)
                    with self._adding:
                        self._arrivals.withdraw(address)
                    log.warning("host_lost", host=address, reason="what it had not sent is lost with it")

    def _start(self, address: str, node_id: str) -> Any:
        options = {
            "num_cpus": 0,
            "max_concurrency": _HOST_THREADS,
            "max_restarts": -1,
            "max_task_retries": 2,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
        }
        return ray.remote(HostFiles).options(**options).remote(self._config, address)

    # -- files that come ----------------------------------------------------------------------------------------

    def collect(self, folder: Path, entries: Entries | None = None) -> Collected:
        """Bring files of ``folder`` here from the hosts that have them, then remove them there.

        entries: the files that must be in the folder; those that are here already stay. None for all files that the
        hosts have of it. Raises CheckpointError for one that cannot be written, or is not as its writer left it.
        """
        self._look()
        hosts, name = dict(self._hosts), self._name(folder)
        sizes = _answers({address: host.files.sizes.remote(name) for address, host in hosts.items()})
        places = {file: address for address, found in sizes.items() for file in found}
        if entries is None:
            wanted = self._their_entries(hosts, name, sizes)
        else:
            wanted = {file: entry for file, entry in entries.items() if not _is_here(folder / file, entry)}

        def fetch(file: str) -> bool:
            return file in places and self._fetch(hosts[places[file]], places[file], folder, file, wanted[file])

        with ThreadPoolExecutor(_STREAMS, thread_name_prefix="fetch") as streams:
            came = dict(zip(wanted, streams.map(fetch, wanted), strict=True))
        self._look()
        self.clear()
        return Collected([file for file, here in came.items() if not here], sorted(self._lost))

    def _their_entries(self, hosts: Mapping[str, _Host], name: str, sizes: Mapping[str, Mapping[str, int]]) -> Entries:
        calls = {address: hosts[address].files.entries.remote(name, list(found)) for address, found in sizes.items()}
        return {file: entry for found in _answers(calls).values() for file, entry in found.items()}

    def _fetch(self, host: _Host, address: str, folder: Path, file: str, entry: FileEntry) -> bool:
        """Bring one file here. Returns False if its host is lost. Raises CheckpointError."""
        path, name = folder / file, f"{self._name(folder)}/{file}"
        for attempt in (1, 2):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with ChecksummedFile(path) as stream:
                    for chunk in _chunks(lambda at, size: host.files.chunk.remote(name, at, size), entry.bytes):
                        stream.write(chunk.data)
            except RayTaskError as error:
                raise CheckpointError(f"{folder}: {file} cannot be read on {address}: {brief(error)}") from None
            except RayError as error:  # a chunk that is lost, or the host
                log.warning("file_not_fetched", host=address, file=name, attempt=attempt, reason=brief(error))
                if attempt == 2:
                    return False
                continue
            except OSError as error:
                raise CheckpointError(
                    f"{folder}: {file} of {address} cannot be written on the driver's host ({error.strerror}); make "
                    "room there, or set `runs` to a folder that has it"
                ) from None
            if stream.entry == entry:
                return True
            log.warning("file_damaged", host=address, file=name, attempt=attempt)
        raise CheckpointError(
            f"{folder}: {file} of {address} came with checksum {stream.entry.xxh3} and {stream.entry.bytes} bytes, and "
            f"was written with {entry.xxh3} and {entry.bytes}; check the disk at cluster.local_dir there"
        )

    # -- files that go ------------------------------------------------------------------------------------------

    def deliver(self, checkpoint: Path, addresses: Collection[str]) -> str | None:
        """Send the trainer's files of a checkpoint to these hosts; the files of all others are compared here.

        Returns a host that is lost; None if there is none. Raises CheckpointDamaged, and CheckpointError where one
        cannot write them.
        """
        self._look()
        others = [address for address in addresses if address != self._config.cluster.run_host]
        if gone := [address for address in others if address not in self._hosts]:
            return gone[0]
        if not others:
            return None  # the ranks compare the files themselves
        hosts = {address: self._hosts[address] for address in others}
        entries = manifest.read(checkpoint)
        own = {file: entry for file, entry in entries.items() if file.startswith(f"{OWN_FILES}/")}
        if (damage := manifest.find_altered(checkpoint, own)) is not None:
            raise CheckpointDamaged(str(checkpoint), damage)
        sent = {file: entry for file, entry in entries.items() if file not in own}
        name = self._name(checkpoint)
        if lost := _call_all(hosts, name, lambda host: host.files.clear.remote()):
            return lost
        with ThreadPoolExecutor(_STREAMS, thread_name_prefix="send") as streams:
            for lost in streams.map(lambda file: self._send(hosts, checkpoint, file, sent[file]), sent):
                if lost is not None:
                    return lost
        return _call_all(hosts, name, lambda host: host.files.complete.remote(name, sent))

    def _send(self, hosts: Mapping[str, _Host], checkpoint: Path, file: str, entry: FileEntry) -> str | None:
        """Send one file to all hosts, which get each chunk from whichever has it. Returns a host that is lost."""
        name, digest = f"{self._name(checkpoint)}/{file}", xxhash.xxh3_64()
        for offset, size in _ranges(entry.bytes):
            try:
                chunk = np.fromfile(checkpoint / file, dtype=np.uint8, count=size, offset=offset)
            except OSError as error:
                raise CheckpointDamaged(str(checkpoint), f"{file}: {error.strerror}") from None
            digest.update(chunk.data)
            reference = ray.put(chunk)

            def receive(host: _Host, at: int = offset, sent: Any = reference) -> Any:
                return host.files.receive.remote(name, at, sent)

            if (lost := _call_all(hosts, name, receive)) is not None:
                return lost
        if digest.hexdigest() != entry.xxh3:
            raise CheckpointDamaged(str(checkpoint), f"{file} has another checksum than when it was written")
        return None

    def clear(self) -> None:
        """Have every host remove what it has of checkpoints."""
        _answers({address: host.files.clear.remote() for address, host in dict(self._hosts).items()})

    def read_message(self, path: Path) -> tuple[Chunk, int]:
        """Return the message in a file of the run folder, and its size; see ``queued_groups.load``. Raises OSError."""
        message = np.fromfile(path, dtype=np.uint8)
        return message, message.nbytes

    # -- the end ------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Bring the last lines of all hosts, also those that a dead process left, and remove their spools."""
        self._ending.set()
        if self._reading.is_alive():
            self._reading.join(_LAST_S)
        self._look()
        for address, answer in list(self._asked.items()):  # of questions before the end
            self._take(address, answer)
        self._asked.clear()
        deadline = time.monotonic() + _LAST_S
        while (self._read_all(ended=True) or self._asked) and time.monotonic() < deadline:
            continue
        for address in _answers({a: host.files.remove.remote() for a, host in self._hosts.items()}):
            self._arrivals.forget(address)
        for address in self._hosts:
            self._arrivals.withdraw(address)
        self._arrivals.save()

    def _name(self, path: Path) -> str:
        return path.relative_to(self._config.run_dir).as_posix()


class CourierProcess(Courier):
    """``Courier`` in a process of its own, with its log."""

    def __init__(self, config: RunConfig) -> None:
        logs.configure(config.run_dir, "courier", console=False)
        super().__init__(config)
        self.begin_reading()


def _places() -> Iterator[tuple[str, str]]:
    """Yield address and node of each process that this run has or had."""
    mine = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    for actor in actors(job_id=mine).values():
        if actor["Address"]["NodeID"]:
            yield actor["Address"]["IPAddress"], actor["Address"]["NodeID"]


def _is_ready(reference: Any) -> bool:
    return bool(ray.wait([reference], timeout=0)[0])


def _is_here(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.bytes


def _answers(calls: Mapping[str, Any]) -> dict[str, Any]:
    """Return what hosts answer, by address; hosts that are lost, which Ray finds out, are left out."""
    answers = {}
    for address, call in calls.items():
        try:
            answers[address] = ray.get(call)
        except RayTaskError:
            raise
        except RayError as error:
            log.warning("host_does_not_answer", host=address, reason=brief(error))
    return answers


def _call_all(hosts: Mapping[str, _Host], what: str, call: Callable[[_Host], Any]) -> str | None:
    """Make a call on each host at once. Returns one that is lost. Raises CheckpointError where one cannot write."""
    calls = {address: call(host) for address, host in hosts.items()}
    for address, answer in calls.items():
        try:
            if (damage := ray.get(answer)) is not None:
                raise CheckpointError(f"{what} did not reach {address}: {damage}; check the disk at cluster.local_dir")
        except RayTaskError as error:
            cause = unwrap_ray_error(error)
            if not isinstance(cause, OSError):
                raise
            raise CheckpointError(
                f"{what} cannot be written on {address} ({cause.strerror}); make room there, or set cluster.local_dir "
                "to a folder that has it"
            ) from None
        except RayError as error:
            log.warning("host_does_not_answer", host=address, reason=brief(error))
            return address
    return None


def _ranges(size: int) -> Iterable[tuple[int, int]]:
    """Return offset and length of each chunk of a file; an empty file has one."""
    return ((offset, min(CHUNK_BYTES, size - offset)) for offset in range(0, max(1, size), CHUNK_BYTES))


def _chunks(ask: Callable[[int, int], Any], size: int) -> Iterator[Chunk]:
    """Yield the chunks of a file in order; ``ask`` returns a reference to one, and a few are asked for ahead."""
    coming: deque[Any] = deque()
    for offset, length in _ranges(size):
        coming.append(ask(offset, length))
        if len(coming) == _AHEAD:
            yield ray.get(coming.popleft(), timeout=timeouts.PAYLOAD_S)
    while coming:
        yield ray.get(coming.popleft(), timeout=timeouts.PAYLOAD_S)
