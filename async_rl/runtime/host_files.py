"""The files of a run on a host that does not have the run folder, as the driver's host asks for them. See ``spool``.

A process of its own on each such host serves them: it reads what is added to logs and timelines, sends and takes files
of checkpoints in chunks, and removes the spool in the end. It keeps nothing in memory between two calls, so it may be
restarted at any moment. Names are paths relative to the run folder. Does not know who asks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from async_rl.config.schema import RunConfig
from async_rl.runtime import manifest, shipping, spool
from async_rl.runtime.manifest import Entries, FileEntry
from async_rl.runtime.shipping import Position, Shipment

Chunk = npt.NDArray[np.uint8]

# Of the added lines that are read at a time: a few seconds of the busiest host.
_READ_BYTES = 4 * 2**20


class HostFiles:
    """The spool of the host at this address. Its methods may be called by several threads at a time."""

    def __init__(self, config: RunConfig, address: str) -> None:
        """``config``: the settings as the driver has them."""
        self._paths = spool.on_host(config, address)
        self._folder = self._paths.config.run_dir

    def read(self, positions: Mapping[str, Position], *, ended: bool = False) -> Shipment:
        """Return what was added to logs and timelines after ``positions``; see ``shipping.read``."""
        return shipping.read(self._folder, positions, most=_READ_BYTES, ended=ended)

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the sizes of all files in a folder and below, by path relative to it."""
        top = self._folder / folder
        files = (path for path in sorted(top.rglob("*")) if path.is_file())
        return {path.relative_to(top).as_posix(): path.stat().st_size for path in files}

    def entries(self, folder: str, names: Iterable[str]) -> Entries:
        """Return size and checksum of files whose writer has taken none."""
        return manifest.entries_of(self._folder / folder, names)

    def chunk(self, name: str, offset: int, length: int) -> Chunk:
        """Return ``length`` bytes of a file from ``offset``. Raises OSError where there are fewer."""
        data = np.fromfile(self._folder / name, dtype=np.uint8, count=length, offset=offset)
        if len(data) != length:
            raise OSError(0, f"{name} has {len(data)} bytes from {offset}, and {length} were asked for")
        return data

    def receive(self, name: str, offset: int, chunk: Chunk) -> None:
        """Write a chunk of a file at ``offset``; chunks may come in any order, and twice. Raises OSError."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            view = chunk.data
            while view:
                written = os.pwrite(descriptor, view, offset)
                view, offset = view[written:], offset + written
        finally:
            os.close(descriptor)

    def complete(self, folder: str, entries: Mapping[str, FileEntry]) -> str | None:
        """Compare received files with their entries, and write the manifest of a folder of them.

        Returns what is wrong with the first that is not as it was sent, and then writes none.
        """
        top = self._folder / folder
        if (damage := manifest.find_altered(top, entries)) is None:
            manifest.write(top, entries)
        return damage

    def clear(self) -> None:
        """Remove all checkpoints, whole ones and parts."""
        shutil.rmtree(self._folder / "checkpoints", ignore_errors=True)

    def remove(self) -> None:
        """Remove the spool."""
        spool.remove(self._paths)
