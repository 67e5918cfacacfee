"""Adds what other hosts have written to the logs, timelines and targets of a run folder. ``shipping`` reads it there.

A stream is appended to the file of its name, also where processes on several hosts have written one in turn, and that
file is rolled as its own writer rolls it. So nothing grows with the length of a run.

    shipped.json   {"10.0.0.2": {"logs/rollout-0.jsonl": [<a Position>], ...}, ...}   up to where each host was read

The positions are kept in a file, so that neither another start of this process nor one of the run adds lines twice.
Does not know how the bytes came here.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from async_rl.runtime import logs
from async_rl.runtime.runfolder import ALL_TARGETS, TARGETS, TIMELINE, write_atomically
from async_rl.runtime.shipping import FOLDERS, Piece, Position, Shipment

SHIPPED = "shipped.json"


class Arrivals:
    """What has come of each host. Only one thread at a time may use it."""

    def __init__(self, run_dir: Path, *, timeline_bytes: int) -> None:
        """timeline_bytes: most bytes of the timeline of one process."""
        self._run_dir = run_dir
        # Bytes at which a file is full, and how many older ones are kept.
        self._limits = {"logs": (logs.MAX_BYTES, logs.OLDER_FILES), TIMELINE: (timeline_bytes // 2, 1)}
        self._positions = _positions(run_dir / SHIPPED)
        self._saved = json.dumps(self._positions)
        self._targets: dict[str, dict[str, bytes]] = {}

    def positions(self, host: str) -> Mapping[str, Position]:
        """Return up to where each stream of a host is here."""
        return self._positions.get(host, {})

    def take(self, host: str, shipment: Shipment) -> list[str]:
        """Add a shipment of a host. Returns the streams in which something is missing.

        Raises OSError if the run folder cannot be written; what is added by then is not asked for again.
        """
        known = self._positions.setdefault(host, {})
        for piece in shipment.pieces:
            if piece.position != known.get(piece.stream):  # an answer that was given twice
                known[piece.stream] = self._append(piece)
        self._announce(host, shipment.targets)
        self.save()
        return [piece.stream for piece in shipment.pieces if piece.gap]

    def save(self) -> None:
        """Write the positions to their file, if they have changed."""
        if (positions := json.dumps(self._positions)) != self._saved:
            write_atomically(self._run_dir / SHIPPED, positions.encode())
            self._saved = positions

    def withdraw(self, host: str) -> None:
        """Remove the target files of a host that is gone."""
        self._announce(host, {})

    def forget(self, host: str) -> None:
        """Forget the positions of a host whose files are removed."""
        self._positions.pop(host, None)

    def _append(self, piece: Piece) -> Position:
        """Append to a file. Returns the position after what is written: if the disk gets full that is a part."""
        folder, _, name = piece.stream.partition("/")
        if folder not in FOLDERS or "/" in name:
            raise ValueError(f"{piece.stream!r} is no stream of a run folder")
        most, keep = self._limits[folder]
        path = self._run_dir / folder / name
        path.parent.mkdir(exist_ok=True)
        size = path.stat().st_size if path.exists() else 0
        if size and size + len(piece.data) > most:
            _roll(path, keep)
        with path.open("ab", buffering=0) as file:
            written = file.write(piece.data)
        missing = len(piece.data) - written
        return piece.position._replace(offset=piece.position.offset - missing)

    def _announce(self, host: str, targets: Mapping[str, bytes]) -> None:
        """Write and remove target files as the host has done since the last time."""
        known = self._targets.setdefault(host, {})
        for name, content in targets.items():
            if known.get(name) != content:
                for path in self._target_files(name):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(path, content)
                known[name] = content
        for name in known.keys() - targets.keys():
            for path in self._target_files(name):
                # A process that moved to another host has its own by now.
                with contextlib.suppress(FileNotFoundError):
                    if path.read_bytes() == known[name]:
                        path.unlink()
            del known[name]

    def _target_files(self, name: str) -> tuple[Path, Path]:
        process, run = name.removesuffix(".json"), self._run_dir.name
        return self._run_dir / TARGETS / name, self._run_dir.parent / ALL_TARGETS / f"{process}@{run}.json"


def _positions(path: Path) -> dict[str, dict[str, Position]]:
    try:
        table = json.loads(path.read_text())
        return {host: {stream: Position(*at) for stream, at in streams.items()} for host, streams in table.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError):  # damaged: then some lines are added twice
        return {}


def _roll(path: Path, keep: int) -> None:
    """Make room for a new file at ``path``: it becomes the newest of the older ones, of which ``keep`` are kept."""
    for number in range(keep - 1, 0, -1):
        with contextlib.suppress(FileNotFoundError):
            os.replace(logs.older(path, number), logs.older(path, number + 1))
    os.replace(path, logs.older(path, 1))
