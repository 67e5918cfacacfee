"""The folder of one run: settings, metrics, samples, summary, logs, checkpoints, kept trajectories.

Owns the names, the layout and the format of the files. Does not know what the records mean. Lines are flushed as they
are written, so that a killed run leaves everything up to its last step.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TextIO

from async_rl.config.loading import to_yaml
from async_rl.config.schema import RunConfig
from async_rl.errors import ConfigError
from async_rl.runtime.rolling import ERRORS, RollingLines

FORMAT = 1
"""Format of the files in a run folder; increased when a reader of the old ones could not read the new ones."""

CONFIG = "config.yaml"
FORMAT_FILE = "format"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
EVALS = "evals.jsonl"
EVAL_SAMPLES = "eval_samples.jsonl"
TRAINED = "trained.jsonl"
JOURNAL = "queue.journal"
LOCK = "lock"
REWOUND = "rewound"
SUMMARY = "summary.json"
TIMELINE = "timeline"
TARGETS = "prometheus/targets"
ALL_TARGETS = ".prometheus"
"""Folder next to the run folders with the target files of all runs once more, <process>@<run>.json, because Prometheus
looks for files in one folder, and not in each folder of a folder."""

TRAJECTORY_SUFFIX = ".group"
# Legal within a JSON string, but many readers (str.splitlines among them) would end a JSONL line there.
_LINE_BREAKS = {ord(char): f"\\u{ord(char):04x}" for char in "\u0085\u2028\u2029"}
_LINE = json.JSONEncoder(allow_nan=False, ensure_ascii=False)
# Some thousands of steps; a part is compressed within a second.
_TRAINED_BYTES = 16 * 2**20
# samples.jsonl and so many older parts share metrics.samples_bytes.
_SAMPLE_PARTS = 3
_BY_STEP = (METRICS, TRAINED, SAMPLES, EVALS, EVAL_SAMPLES)
_FOLDERS = ("logs", "checkpoints", TARGETS, "trajectories")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Encode ``value`` as standard JSON: NaN and infinities become null, numpy scalars become numbers."""
    encoder = _LINE if indent is None else json.JSONEncoder(indent=indent, allow_nan=False, ensure_ascii=False)
    try:
        text = encoder.encode(value)
    except (TypeError, ValueError):  # rare, and several times as slow
        text = encoder.encode(_plain(value))
    return text if text.isascii() else text.translate(_LINE_BREAKS)


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
    """Creates and writes one run's folder. The driver is its only writer."""

    def __init__(self, config: RunConfig, *, resume: bool = False) -> None:
        """Create the folder, or with ``resume`` open that of an earlier run.

        Raises ConfigError if it has a run that is not to be resumed, if that run has not ended, or if the folder cannot
        be created.
        """
        self.path = config.run_dir.absolute()
        names = (*_BY_STEP, *(f"{REWOUND}-{name}" for name in _BY_STEP))
        self._lines = {name: self._rolling(name, config) for name in names}
        self._keep = config.debug.dump_trajectories
        try:
            if not resume and self.path.is_dir() and any(self.path.iterdir()):
                raise ConfigError(
                    f"name: {config.name!r} is taken, {self.path} already has a run; "
                    "give another --name, or move that folder away"
                )
            for folder in _FOLDERS:
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            self._lock = self._locked(config)
            self._kept = deque(sorted(self.trajectories.glob(f"*{TRAJECTORY_SUFFIX}"), key=_written))
            for target in (*self.targets.iterdir(), *(self.path.parent / ALL_TARGETS).glob(f"*@{self.path.name}.json")):
                target.unlink()  # left by a process that was killed
            (self.path / SUMMARY).unlink(missing_ok=True)  # of the run that is resumed: it has not ended after all
            (self.path / FORMAT_FILE).write_text(f"{FORMAT}\n")
            (self.path / CONFIG).write_text(to_yaml(config))
        except OSError as error:
            raise ConfigError(
                f"runs: cannot make the run folder {self.path} ({error.strerror}); "
                "set --runs to a folder you can write to"
            ) from None

    def _locked(self, config: RunConfig) -> TextIO:
        """Open a file that is locked while this process lives, so that no two processes write the same run."""
        lock = (self.path / LOCK).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ConfigError(
                f"name: the run {config.name!r} in {self.path} has not ended; wait for it, or give another --name"
            ) from None
        return lock

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def targets(self) -> Path:
        return self.path / TARGETS

    @property
    def trajectories(self) -> Path:
        return self.path / "trajectories"

    @property
    def journal(self) -> Path:
        return self.path / JOURNAL

    def write_step(self, row: Mapping[str, Any]) -> None:
        """Append one training step's row to metrics.jsonl."""
        self._lines[METRICS].append(to_json(row))

    def write_trained(self, row: Mapping[str, Any]) -> None:
        """Append the groups of one training step to trained.jsonl."""
        self._lines[TRAINED].append(to_json(row))

    def write_sample(self, sample: Mapping[str, Any]) -> None:
        """Append one readable trajectory to samples.jsonl."""
        self._lines[SAMPLES].append(to_json(sample))

    def write_eval(self, line: Mapping[str, Any]) -> None:
        """Append the results of an evaluation set to evals.jsonl."""
        self._lines[EVALS].append(to_json(line))

    def write_eval_sample(self, sample: Mapping[str, Any]) -> None:
        """Append one readable response of an evaluation to eval_samples.jsonl."""
        self._lines[EVAL_SAMPLES].append(to_json(sample))

    def evals(self) -> list[dict[str, Any]]:
        """Return the lines of evals.jsonl, oldest first, without one that is being written or was cut off."""
        try:
            text = (self.path / EVALS).read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def rewind(self, step: int) -> None:
        """Move the lines of steps after ``step`` to rewound-<name>, because they will be trained again."""
        for name in _BY_STEP:
            self._lines[name].move_after(step, self._lines[f"{REWOUND}-{name}"])

    def _rolling(self, name: str, config: RunConfig) -> RollingLines:
        """Return the file of this name, whose size is bounded as its lines allow."""
        path = self.path / name
        if name.endswith(TRAINED):
            return RollingLines(path, max_bytes=_TRAINED_BYTES)  # what was trained must never be forgotten
        if name.endswith(SAMPLES):
            most = config.metrics.samples_bytes // (1 + _SAMPLE_PARTS)
            return RollingLines(path, max_bytes=max(1, most), keep=_SAMPLE_PARTS)
        return RollingLines(path)  # readers want one file of all steps: a few kB each

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json atomically."""
        write_atomically(self.path / SUMMARY, (to_json(summary, indent=2) + "\n").encode(errors=ERRORS))

    def write_group(self, payload: bytes | memoryview, group_id: str) -> None:
        """Write a trained group in wire format; only the last debug.dump_trajectories are kept."""
        if self._keep == 0:
            return
        # Group ids come from dataset cursors ("0-17.0"), but are not trusted as file names.
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
        for lines in self._lines.values():
            lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def format_of(path: Path) -> int | None:
    """Return the format of the run folder ``path``; None if its file is missing or unreadable."""
    try:
        return int((path / FORMAT_FILE).read_text())
    except (OSError, ValueError):
        return None


def write_atomically(path: Path, payload: bytes | memoryview) -> None:
    """Write a file so that a reader sees either the old content or the new one, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _written(path: Path) -> float:
    return path.stat().st_mtime
