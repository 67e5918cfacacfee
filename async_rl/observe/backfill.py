"""Converts a run's metrics.jsonl into the samples that Prometheus would have scraped, for runs that it did not scrape.

Most columns of a row have the names of metrics; the exceptions are listed here. Counters and histograms add up over the
rows. Metrics that no row has (the bounds of the queue, memory, restarts) are left out. Knows ``declared``, rows, and
promtool.
"""

from __future__ import annotations

import bisect
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from async_rl.errors import ResourceError, RunFolderError
from async_rl.metrics.declared import METRICS
from async_rl.metrics.spec import MetricSpec
from async_rl.observe import history, prometheus
from async_rl.observe.history import History
from async_rl.observe.rows import Row

_BY_STALENESS = "_by_staleness"
_RENAMED = {"groups": "groups_trained_total"}
# Gauges whose only label has one value.
_ONE_LABEL = {"extreme_token_fraction": ("tau", "2")}

Labels = tuple[tuple[str, str], ...]
Sample = tuple[int, str, Labels, float]
"""Milliseconds since 1970, suffix of the name, bound of a bucket, value."""


def backfill(path: Path, data: Path) -> Path:
    """Put the run in ``path`` into the storage of a Prometheus, ``data``, which is returned.

    Raises RunFolderError for a run without steps, ResourceError where promtool is missing or refuses.
    """
    promtool = prometheus.program("promtool")
    run = history.read(path)
    if not run.rows:
        raise RunFolderError(f"{path} has no training step yet, so there is nothing to show")
    data.mkdir(parents=True, exist_ok=True)
    text = data / "metrics.txt"
    try:
        with text.open("w", encoding="utf-8") as stream:
            stream.writelines(openmetrics(run))
        made = subprocess.run(
            [promtool, "tsdb", "create-blocks-from", "openmetrics", str(text), str(data)],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        text.unlink()
    if made.returncode != 0:
        raise ResourceError(f"promtool could not take {path / 'metrics.jsonl'}: {made.stderr.strip()[-300:]}")
    return data


def openmetrics(run: History) -> Iterator[str]:
    """Lines of OpenMetrics text, family by family, each sample with the time of its step.

    Raises RunFolderError for rows without a time.
    """
    series = _Series(run)
    for row in run.rows:
        series.add(row)
    for name in sorted(series.samples):
        spec = METRICS[name]
        yield f"# TYPE {spec.full_name.removesuffix('_total')} {spec.kind}\n"
        for labels, samples in sorted(series.samples[name].items()):
            for time, suffix, bound, value in samples:
                inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in (*labels, *bound))
                yield f"{spec.full_name}{suffix}{{{inside}}} {value!r} {time // 1000}.{time % 1000:03d}\n"
    yield "# EOF\n"


class _Series:
    """The samples of a run by name and labels, in the order of its rows; those of a histogram step by step."""

    def __init__(self, run: History) -> None:
        self._path = run.path
        self._labels: Labels = (("run", run.name), ("role", "pipeline"), ("replica", "0"))
        self._totals: dict[Any, float] = defaultdict(float)
        self._time: int | None = None
        self._push: tuple[Any, Any] | None = None
        self.samples: dict[str, dict[Labels, list[Sample]]] = defaultdict(lambda: defaultdict(list))

    def add(self, row: Row) -> None:
        if not isinstance(row.get("time"), int | float):
            raise RunFolderError(
                f"{self._path}: step {row.get('step')} has no time, so it cannot be put into Prometheus"
            )
        # Prometheus distinguishes whole milliseconds only, and two steps may end in the same one.
        time = round(row["time"] * 1000)
        if self._time is None:
            self._begin(row, time)
        else:
            self._time = max(time, self._time + 1)
        push = (row.get("policy_version"), row.get("sync_seconds"))
        if push == self._push:
            # With async_training.trigger_parameter_sync_step several steps follow one weight sync, and each names it.
            row = {key: value for key, value in row.items() if key != "sync_seconds"}
        self._push = push
        self._count(METRICS["training_steps_total"], {}, 1.0)
        for key, value in row.items():
            if value is not None:
                self._take(key, value)
        for replica, version in (row.get("replica_versions") or {}).items():
            if version is not None:
                labels = (self._labels[0], ("role", "rollout"), ("replica", str(replica)))
                self._put("policy_version", labels, float(version))

    def _begin(self, row: Row, time: int) -> None:
        """Start counters whose labels are known at 0 when the run starts, so that the first count is a rise."""
        self._time = time - max(1, round((row.get("elapsed_s") or 0.0) * 1000))
        for spec in filter(None, map(_spec, row)):
            if spec.kind == "counter":
                for value in spec.values:
                    self._count(spec, {spec.labels[0]: value}, 0.0)
        self._time = time

    def _take(self, key: str, value: Any) -> None:
        spec = _spec(key)
        if spec is None:
            return
        name = spec.name
        # A split by the metric's label, or one number.
        parts: Mapping[Any, Any] = value if isinstance(value, Mapping) else {None: value}
        if spec.kind == "histogram" and not spec.labels and isinstance(value, Mapping):
            for observed, count in parts.items():
                if count is not None:
                    self._observe(spec, {}, float(observed), float(count), write=False)
            self._write_histogram(spec, {})
            return
        for part, number in parts.items():
            if number is None:
                continue
            labels = {} if part is None else {spec.labels[0]: str(part)}
            if name in _ONE_LABEL:
                labels = dict([_ONE_LABEL[name]])
            if spec.kind == "gauge":
                self._put(name, self._with(labels), float(number))
            elif spec.kind == "counter":
                self._count(spec, labels, float(number))
            else:
                self._observe(spec, labels, float(number), 1.0)

    def _count(self, spec: MetricSpec, labels: Mapping[str, str], amount: float) -> None:
        key = (spec.name, tuple(labels.items()))
        self._totals[key] += amount
        self._put(spec.name, self._with(labels), self._totals[key])

    def _observe(
        self, spec: MetricSpec, labels: Mapping[str, str], value: float, count: float, *, write: bool = True
    ) -> None:
        at = bisect.bisect_left(spec.buckets, value)
        own = tuple(labels.items())
        self._totals[spec.name, own, at] += count
        self._totals[spec.name, own, "sum"] += value * count
        if write:
            self._write_histogram(spec, labels)

    def _write_histogram(self, spec: MetricSpec, labels: Mapping[str, str]) -> None:
        own, total = tuple(labels.items()), 0.0
        for at, bound in enumerate((*spec.buckets, float("inf"))):
            total += self._totals[spec.name, own, at]
            le = "+Inf" if bound == float("inf") else repr(bound)
            self._put(spec.name, self._with(labels), total, "_bucket", (("le", le),))
        self._put(spec.name, self._with(labels), total, "_count")
        self._put(spec.name, self._with(labels), self._totals[spec.name, own, "sum"], "_sum")

    def _with(self, labels: Mapping[str, str]) -> Labels:
        return (*self._labels, *labels.items())

    def _put(self, name: str, labels: Labels, value: float, suffix: str = "", bound: Labels = ()) -> None:
        assert self._time is not None
        self.samples[name][labels].append((self._time, suffix, bound, value))


def _spec(key: str) -> MetricSpec | None:
    """Return the metric that a row has under ``key``, or None if the key is no metric's."""
    names = (_RENAMED.get(key, key), f"{key}_total", key.removesuffix(_BY_STALENESS))
    return next((METRICS[name] for name in names if name in METRICS), None)


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
