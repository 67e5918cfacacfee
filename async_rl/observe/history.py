"""What a run folder says, read while it is written or long after: settings, steps, events, and how it ended.

A line without its end is one that is being written, or was when the writer was killed: it is left for the next look.
"""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from async_rl import runfolder
from async_rl.errors import RunFolderError
from async_rl.observe.rows import Row


class Lines:
    """A file of JSON lines that may still grow."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = self._position = 0
        self._number = 0

    def new(self) -> tuple[list[Any], bool]:
        """The lines that were finished since the last call; and whether they are all lines from the first on, because
        the file is another one now (training went back to a checkpoint).

        Raises RunFolderError for a line that is no JSON object, which no interruption explains.
        """
        try:
            with self._path.open("rb") as stream:
                inode = os.fstat(stream.fileno()).st_ino
                anew = inode != self._inode or stream.seek(0, 2) < self._position
                if anew:
                    self._inode, self._position, self._number = inode, 0, 0
                stream.seek(self._position)
                whole = stream.read()
        except FileNotFoundError:
            return [], False
        whole = whole[: whole.rfind(b"\n") + 1]
        self._position += len(whole)
        found = []
        for line in whole.split(b"\n")[:-1]:
            self._number += 1
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if not isinstance(value, dict):
                raise RunFolderError(f"{self._path}:{self._number} is no JSON object: {line[:60]!r}; is it damaged?")
            found.append(value)
        return found, anew


@dataclass(frozen=True, slots=True)
class Event:
    """A line of the pipeline's log. time: seconds since 1970."""

    time: float
    level: str
    text: str


@dataclass(slots=True)
class History:
    """One run, as far as it has come; ``refresh`` reads what was added."""

    path: Path
    name: str
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    """summary.json, of a run that has ended by itself."""
    running: bool = False
    """Whether the process that drives it lives on this machine."""
    _metrics: Lines = field(init=False)
    _log: Lines = field(init=False)

    def __post_init__(self) -> None:
        self._metrics = Lines(self.path / runfolder.METRICS)
        self._log = Lines(self.path / "logs" / "pipeline.jsonl")

    @property
    def steps(self) -> int:
        """Training steps that it is to have."""
        return int(self.settings["trainer"]["steps"])

    def refresh(self) -> None:
        """Raises RunFolderError."""
        running = _is_locked(self.path / runfolder.LOCK)
        rows, anew = self._metrics.new()
        self.rows = [] if anew else self.rows
        self.rows += rows
        lines, anew = self._log.new()
        events = [Event(_seconds(line.get("timestamp")), line.get("level", ""), _text(line)) for line in lines]
        self.events = [] if anew else self.events
        self.events += events
        try:
            self.summary = json.loads((self.path / runfolder.SUMMARY).read_bytes())
        except FileNotFoundError:
            self.summary = None
        except ValueError as error:
            raise RunFolderError(f"{self.path / runfolder.SUMMARY} is no JSON: {error}") from None
        # Looked at first: a run that ended in between has its summary now.
        self.running = running and self.summary is None


def read(path: Path) -> History:
    """The run in the folder ``path``. Raises RunFolderError where there is none, or one of another format."""
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
    history = History(path, str(name), settings)
    history.refresh()
    return history


def _is_locked(path: Path) -> bool:
    """Whether the writer of the run holds its lock, which ends with its process. Asked of the kernel: who tries to take
    the lock has it for a moment, in which the run could not be gone on with."""
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


def _text(line: dict[str, Any]) -> str:
    known = {"event", "run", "role", "version", "logger", "level", "timestamp", "exception"}
    rest = " ".join(f"{key}={value}" for key, value in line.items() if key not in known)
    return f"{line.get('event', '')}{' ' if rest else ''}{rest}"
