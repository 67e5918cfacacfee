"""Reads a run folder, while it is written or long after: settings, steps, events, and the summary.

A line without its end is being written, or was when the writer was killed. It is left for the next ``refresh``.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol

import yaml

from async_rl.errors import RunFolderError
from async_rl.metrics.events import in_words
from async_rl.observe.rows import Row
from async_rl.runtime import logs, runfolder

# What the log has in every line, and no part of the event's words.
_NO_FIELDS = frozenset({"event", "run", "role", "version", "logger", "level", "timestamp", "exception"})


class Sink(Protocol):
    """Takes the lines of a file one by one; a list keeps them all."""

    def append(self, line: dict[str, Any], /) -> None: ...
    def clear(self) -> None: ...


class Lines:
    """A file of JSON lines that may still grow, be cut, and be rolled: what was in it before is then in older files."""

    def __init__(self, files: Callable[[], Sequence[Path]], sink: Sink) -> None:
        """``files`` returns the files that exist, oldest first."""
        self._files = files
        self._sink = sink
        self._inode = self._position = self._number = 0
        self._last = b""  # line before the position

    def read(self) -> None:
        """Append the lines that were finished since the last call to the sink.

        Where lines that were read are gone (training was rewound to a checkpoint), clears the sink and appends all
        lines. Raises RunFolderError for a line that is not a JSON object, which no interruption explains.
        """
        files = self._files()
        at = next((index for index, path in enumerate(files) if self._reached(path)), None)
        if at is None:
            self._inode = 0
            self._sink.clear()
        for path in files[at or 0 :]:
            try:
                stream = path.open("rb")
            except FileNotFoundError:
                return  # rolled at this moment
            with stream:
                self._read(stream)

    def _reached(self, path: Path) -> bool:
        """Return whether ``path`` is the file that was read last, and still has what was read of it."""
        try:
            if path.stat().st_ino != self._inode:
                return False
            with path.open("rb") as stream:
                stream.seek(self._position - len(self._last))
                return stream.read(len(self._last)) == self._last
        except FileNotFoundError:
            return False

    def _read(self, stream: BinaryIO) -> None:
        inode = os.fstat(stream.fileno()).st_ino
        if inode != self._inode:
            self._inode, self._position, self._number, self._last = inode, 0, 0, b""
        stream.seek(self._position)
        # Line by line: the file of a long run is larger than what is kept of it.
        for line in _finished(stream):
            self._position += len(line)
            self._number += 1
            self._last = line
            self._sink.append(self._object(line[:-1], stream.name))

    def _object(self, line: bytes, name: str) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise RunFolderError(f"{name}:{self._number} is not a JSON object: {line[:60]!r} (the file may be damaged)")
        return value


def _finished(stream: IO[bytes]) -> Iterator[bytes]:
    return itertools.takewhile(lambda line: line.endswith(b"\n"), stream)


@dataclass(frozen=True, slots=True)
class Event:
    """A line of the driver's log."""

    time: float
    """Seconds since 1970; 0.0 if the line has no valid time."""
    level: str
    name: str
    """The constant name of the event; prose in the logs of earlier versions."""
    text: str
    """The event in words."""


class _Events:
    """Turns the lines of the driver's log into events."""

    def __init__(self, events: list[Event]) -> None:
        self._events = events

    def append(self, line: dict[str, Any], /) -> None:
        name = str(line.get("event", ""))
        fields = {key: value for key, value in line.items() if key not in _NO_FIELDS}
        self._events.append(Event(_seconds(line.get("timestamp")), line.get("level", ""), name, in_words(name, fields)))

    def clear(self) -> None:
        self._events.clear()


@dataclass(slots=True)
class History:
    """One run so far; ``refresh`` reads what was added."""

    path: Path
    name: str
    settings: dict[str, Any]
    into: InitVar[Sink | None] = None
    rows: list[Row] = field(default_factory=list)
    """All steps; empty where ``into`` takes them."""
    events: list[Event] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    """summary.json, once the run has ended by itself."""
    running: bool = False
    """Whether its driver runs on this machine."""
    _metrics: Lines = field(init=False)
    _log: Lines = field(init=False)

    def __post_init__(self, into: Sink | None) -> None:
        metrics, log = self.path / runfolder.METRICS, self.path / "logs" / "pipeline.jsonl"
        self._metrics = Lines(lambda: [metrics] if metrics.exists() else [], self.rows if into is None else into)
        self._log = Lines(lambda: logs.files(log), _Events(self.events))

    @property
    def steps(self) -> int:
        """Number of training steps after which the run ends."""
        return int(self.settings["trainer"]["steps"])

    def refresh(self) -> None:
        """Read what was added to the folder. Raises RunFolderError."""
        running = _is_locked(self.path / runfolder.LOCK)
        self._metrics.read()
        self._log.read()
        try:
            self.summary = json.loads((self.path / runfolder.SUMMARY).read_bytes())
        except FileNotFoundError:
            self.summary = None
        except ValueError as error:
            raise RunFolderError(f"{self.path / runfolder.SUMMARY} is not JSON: {error}") from None
        # The lock was read first: a run that ended in between has its summary now.
        self.running = running and self.summary is None


def read(path: Path, into: Sink | None = None) -> History:
    """Return the run in the folder ``path``.

    into: takes its rows, now and at each refresh, instead of ``History.rows``. Raises RunFolderError where there is no
    run, or one of another format.
    """
    if not path.is_dir():
        known = sorted(config.parent.name for config in path.parent.glob(f"*/{runfolder.CONFIG}"))
        hint = f"; {path.parent} has {', '.join(known[:8])}" if known else ""
        raise RunFolderError(f"there is no run folder {path}{hint}")
    try:
        settings = yaml.safe_load((path / runfolder.CONFIG).read_text())
        name = settings["name"]
        int(settings["trainer"]["steps"])
    except FileNotFoundError:
        raise RunFolderError(f"{path} is no run folder: it has no {runfolder.CONFIG}") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{path / runfolder.CONFIG} is not what a run writes: {error!r}") from None
    found = runfolder.format_of(path)
    if found != runfolder.FORMAT:
        raise RunFolderError(
            f"{path} is a run folder of format {found}, and this version reads {runfolder.FORMAT}; "
            "use the version of async-rl that wrote it"
        )
    history = History(path, str(name), settings, into)
    history.refresh()
    return history


def _is_locked(path: Path) -> bool:
    """Return whether the run's driver holds its lock, which the kernel releases with the process.

    Reads the kernel's list of locks: trying to take the lock would hold it for a moment, in which the run could not be
    resumed.
    """
    try:
        inode = str(path.stat().st_ino)
        locks = Path("/proc/locks").read_text()
    except OSError:
        return False
    # 1: FLOCK  ADVISORY  WRITE 4711 fd:01:271828 0 EOF
    held = (line.split() for line in locks.splitlines())
    return any(fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode for fields in held)


def _seconds(timestamp: Any) -> float:
    try:
        return datetime.datetime.fromisoformat(timestamp).timestamp()
    except (TypeError, ValueError):
        return 0.0
