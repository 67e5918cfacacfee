"""The folder of one run: settings, metrics, samples, summary, logs, checkpoints, kept trajectories.

Owns names, layout and the form of what is written; knows ``config`` and ``errors``, nothing of what the
records mean. Lines are flushed as they are written, so a killed run leaves everything up to its last step.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TextIO

from async_rl.config import RunConfig
from async_rl.config_file import to_yaml
from async_rl.errors import ConfigError

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
SUMMARY = "summary.json"
TRAJECTORY_SUFFIX = ".group"
# Legal within a JSON string, yet many readers (str.splitlines among them) would end a JSONL line there.
_LINE_BREAKS = {ord(char): f"\\u{ord(char):04x}" for char in "\u0085\u2028\u2029"}
# A lone surrogate, which a dataset may hold, has no UTF-8; its escape is what JSON has for it.
_ERRORS = "backslashreplace"
_FOLDERS = ("logs", "checkpoints", "prometheus/targets", "trajectories")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Standard JSON: NaN and infinities, which it lacks, become null; numpy scalars become numbers."""
    text = json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)
    return text.translate(_LINE_BREAKS)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy scalars and arrays, without importing numpy
        return _plain(value.tolist())
    return str(value)


class RunFolder:
    """Creates and writes one run's folder. One writer: the process that drives the run."""

    def __init__(self, config: RunConfig) -> None:
        """Raises ConfigError when the folder holds a run already or cannot be made."""
        self.path = config.run_dir.absolute()
        self._metrics: TextIO | None = None
        self._samples: TextIO | None = None
        self._kept = deque[Path]()
        self._keep = config.debug.dump_trajectories
        try:
            if self.path.is_dir() and any(self.path.iterdir()):
                raise ConfigError(
                    f"name: {config.name!r} is taken, {self.path} holds a run already; "
                    "give another --name, or move that folder away"
                )
            for folder in _FOLDERS:
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            (self.path / CONFIG).write_text(to_yaml(config))
        except OSError as error:
            raise ConfigError(
                f"runs: cannot make the run folder {self.path} ({error.strerror}); "
                "set --runs to a folder you can write to"
            ) from None

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def targets(self) -> Path:
        return self.path / "prometheus" / "targets"

    @property
    def trajectories(self) -> Path:
        return self.path / "trajectories"

    def write_step(self, row: Mapping[str, Any]) -> None:
        """Append one training step's row to metrics.jsonl."""
        if self._metrics is None:
            self._metrics = (self.path / METRICS).open("a", encoding="utf-8", errors=_ERRORS)
        _append(self._metrics, row)

    def write_sample(self, sample: Mapping[str, Any]) -> None:
        """Append one readable trajectory to samples.jsonl."""
        if self._samples is None:
            self._samples = (self.path / SAMPLES).open("a", encoding="utf-8", errors=_ERRORS)
        _append(self._samples, sample)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json at once or not at all."""
        write_atomically(self.path / SUMMARY, (to_json(summary, indent=2) + "\n").encode(errors=_ERRORS))

    def write_group(self, payload: bytes | memoryview, group_id: str) -> None:
        """Keep a trained group in wire format; only the last debug.dump_trajectories stay."""
        if self._keep == 0:
            return
        # Group ids come from dataset cursors ("0-17.0"), but nothing that reaches the file system is trusted.
        name = re.sub(r"[^\w.-]", "_", group_id).lstrip(".") or "group"
        path = self.trajectories / f"{name}{TRAJECTORY_SUFFIX}"
        write_atomically(path, payload)
        if path in self._kept:
            self._kept.remove(path)
        self._kept.append(path)
        while len(self._kept) > self._keep:
            self._kept.popleft().unlink(missing_ok=True)

    def close(self) -> None:
        """Close the open files. May be called twice."""
        for stream in (self._metrics, self._samples):
            if stream is not None:
                stream.close()
        self._metrics = self._samples = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_atomically(path: Path, payload: bytes | memoryview) -> None:
    """Write a file so that a reader sees the old content or the new one, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _append(stream: TextIO, row: Mapping[str, Any]) -> None:
    stream.write(to_json(row) + "\n")
    stream.flush()
