"""The spans of one process, which say what it did when, as lines of JSON in the run folder, for ``async-rl report``.

    timeline/<role>.jsonl     the latest spans; timeline/<role>.1.jsonl: those before, if there are more

    {"what": "call",  "at": 1.8e9, "s": 0.21, "trajectory": "0-17.0/3", "tokens": 31, "end": "abort"}    rollout-<i>
    {"what": "pause", "at": 1.8e9, "s": 0.09}                                                            rollout-<i>
    {"what": "update", "at": 1.8e9, "s": 0.31, "step": 12}                                               pipeline

A call is one engine call of one response; a weight sync ends it ("abort"), or the policy does ("stop", "length"). A
pause is the time that a replica is paused for a weight sync or a checkpoint. The driver's spans are the phases of its
training loop: "start", "groups" while it waits for them, "update", "push", "evaluation", "checkpoint", "restart", and
"other" between them.

Files are bounded, so that a run of any length keeps its latest spans. A span reaches the file with the first one that
ends a second later, or at the end. Where a file cannot be written, for want of room for example, no further spans are:
a run can do without them. Knows ``runfolder``, which says where the files are.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import structlog

from async_rl.runtime.runfolder import TIMELINE

log = structlog.get_logger(__name__)

_FLUSH_S = 1.0
# A rollout worker writes hundreds of spans a second, in addition to its tokens: json takes six times as long.
_to_json = msgspec.json.Encoder().encode


class Timeline:
    """The spans of one process. ``at`` is in seconds since 1970, ``s`` in seconds."""

    def __init__(self, run_dir: Path, role: str, max_bytes: int) -> None:
        """Open the files, which together take at most ``max_bytes``; 0 writes nothing."""
        self._path = run_dir / TIMELINE / f"{role}.jsonl"
        self._limit = max_bytes // 2
        self._stream: BinaryIO | None = None
        self._waiting: list[dict[str, Any]] = []
        self._written = 0
        self._flushed = 0.0
        if max_bytes:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._open()

    def add(self, what: str, seconds: float, **fields: Any) -> None:
        """Add a span that ends now and took ``seconds``."""
        if self._stream is None:
            return
        now = time.time()
        self._waiting.append({"what": what, "at": now - seconds, "s": seconds, **fields})
        if now - self._flushed > _FLUSH_S:
            self._flushed = now
            self._write(self._stream)

    def close(self) -> None:
        """Write the spans that wait and close the file. May be called twice."""
        if self._stream is not None:
            self._write(self._stream)
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _write(self, stream: BinaryIO) -> None:
        """Write all waiting spans at once: one by one, amid other work, a line takes several times as long."""
        try:
            for span in self._waiting:
                self._written += stream.write(_to_json(span) + b"\n")
                if self._written > self._limit:
                    stream.close()
                    os.replace(self._path, self._path.with_suffix(".1.jsonl"))
                    stream = self._open()
            stream.flush()
        except OSError as error:
            self._stream = None
            with contextlib.suppress(OSError):  # it would write the rest
                stream.close()
            log.warning("timeline_ended", path=str(self._path), reason=error.strerror)
        self._waiting.clear()

    def _open(self) -> BinaryIO:
        self._stream = self._path.open("ab")
        self._written = self._stream.tell()
        return self._stream
