"""The metrics of one process: counted in memory, served over HTTP, announced to Prometheus.

Each process has its own registry, port and target file (no multiprocess mode: that loses labels and Info metrics).
Values are kept here rather than in prometheus_client's own classes, which cannot do three things: add n equal
observations at once (token staleness comes as a histogram per step), replace all labels of a family at once (a
staleness that no longer occurs must vanish, not freeze), and have a family's whole together with its labelled parts.
prometheus_client does the exposition format and the HTTP server.

Knows ``declared`` and ``errors``, not where the values come from.
"""

from __future__ import annotations

import bisect
import errno
import itertools
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import structlog
from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    start_http_server,
)
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from async_rl.config.schema import RunConfig
from async_rl.errors import ResourceError
from async_rl.metrics.declared import METRICS
from async_rl.metrics.spec import MetricSpec
from async_rl.runtime.addresses import WILDCARDS, address_towards, with_port
from async_rl.runtime.runfolder import ALL_TARGETS, TARGETS, write_atomically

LabelValues = tuple[str, ...]

MAX_SERIES = 100
"""Most series of one metric in one process. Labels have a handful of values. A label that takes ever new ones (a reason
with an id in it) would fill Prometheus' memory, so further series count as OTHER."""

OTHER = "other"

_PORTS_TRIED = 64


log = structlog.get_logger(__name__)


class UndeclaredMetric(ValueError):
    """A metric, label or operation is not in ``declared``, which is a defect of the caller."""


class _Histogram:
    __slots__ = ("counts", "total")

    def __init__(self, buckets: int) -> None:
        self.counts = [0.0] * (buckets + 1)  # the last one is +Inf
        self.total = 0.0


class _Store(Collector):
    """The values of every declared metric of this process; a prometheus_client collector."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.numbers: dict[str, dict[LabelValues, float]] = {}
        self.histograms: dict[str, dict[LabelValues, _Histogram]] = {}

    def collect(self) -> Iterator[Metric]:
        with self.lock:
            numbers = {name: dict(series) for name, series in self.numbers.items()}
            histograms = {
                name: {labels: (list(h.counts), h.total) for labels, h in series.items()}
                for name, series in self.histograms.items()
            }
        for name, series in numbers.items():
            spec = METRICS[name]
            family = Metric(spec.full_name.removesuffix("_total"), spec.help, spec.kind)
            for labels, value in series.items():
                family.add_sample(spec.full_name, dict(zip(spec.labels, labels, strict=False)), value)
            yield family
        for name, observed in histograms.items():
            spec = METRICS[name]
            family = Metric(spec.full_name, spec.help, spec.kind)
            for labels, (counts, total) in observed.items():
                _add_histogram(family, spec, dict(zip(spec.labels, labels, strict=False)), counts, total)
            yield family


class _Foreign(Collector):
    """Metrics that are kept elsewhere, and that a function returns."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()

    def describe(self) -> Iterator[Metric]:
        return iter(())  # else registering would collect, before there is anything


def _add_histogram(family: Metric, spec: MetricSpec, labels: dict[str, str], counts: list[float], total: float) -> None:
    cumulative = 0.0
    for bound, count in zip((*spec.buckets, float("inf")), counts, strict=True):
        cumulative += count
        le = "+Inf" if bound == float("inf") else repr(bound)
        family.add_sample(f"{spec.full_name}_bucket", {**labels, "le": le}, cumulative)
    family.add_sample(f"{spec.full_name}_count", labels, cumulative)
    family.add_sample(f"{spec.full_name}_sum", labels, total)


class Metrics:
    """The metrics of one process of a run. Thread-safe; a call is a dictionary update.

    role is "pipeline", "rollout", "queue", ...; replica distinguishes several processes of one role.
    """

    def __init__(self, role: str, run: str = "run", replica: int = 0) -> None:
        self.role, self.run, self.replica = role, run, replica
        self.registry = CollectorRegistry()
        self._store = _Store()
        self.registry.register(self._store)
        ProcessCollector(registry=self.registry)  # process_resident_memory_bytes and the like
        self._server: Any = None
        self._thread: threading.Thread | None = None
        self._targets: list[Path] = []

    def include(self, prefix: str) -> None:
        """Serve also a library's own metrics whose names begin with ``prefix``, without their creation times."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.include_from(lambda: (family for family in REGISTRY.collect() if family.name.startswith(prefix)))

    def include_from(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """Serve also what ``collect`` returns each time; it may take its time."""
        self.registry.register(_Foreign(collect))

    def set(self, name: str, value: float, **labels: str | int) -> None:
        """Set a gauge."""
        key = _labels(_spec(name, "gauge"), labels)
        with self._store.lock:
            series = self._store.numbers.setdefault(name, {})
            series[_bounded(series, key)] = float(value)

    def set_all(self, name: str, whole: float | None, parts: Mapping[Any, float]) -> None:
        """Replace every series of a gauge of one label: ``parts`` by label value, ``whole`` unlabelled."""
        spec = _spec(name, "gauge")
        if len(spec.labels) != 1 or (whole is not None and not spec.whole):
            raise UndeclaredMetric(f"metric {name}: set_all needs exactly one label, and a whole only where declared")
        series: dict[LabelValues, float] = {} if whole is None else {(): float(whole)}
        series.update({(str(label),): float(value) for label, value in itertools.islice(parts.items(), MAX_SERIES)})
        with self._store.lock:
            self._store.numbers[name] = series

    def inc(self, name: str, amount: float = 1.0, **labels: str | int) -> None:
        """Add to a counter."""
        key = _labels(_spec(name, "counter"), labels)
        if not amount >= 0:
            raise ValueError(f"metric {name}: a counter cannot change by {amount}")
        with self._store.lock:
            series = self._store.numbers.setdefault(name, {})
            key = _bounded(series, key)
            series[key] = series.get(key, 0.0) + amount

    def count_to(self, name: str, total: float, **labels: str | int) -> None:
        """Set a counter to a total that is counted elsewhere (by the broker, say)."""
        key = _labels(_spec(name, "counter"), labels)
        if not total >= 0:
            raise ValueError(f"metric {name}: a counter cannot be {total}")
        with self._store.lock:
            series = self._store.numbers.setdefault(name, {})
            series[_bounded(series, key)] = float(total)

    def observe(self, name: str, value: float, count: int = 1, **labels: str | int) -> None:
        """Add ``count`` equal observations to a histogram."""
        spec = _spec(name, "histogram")
        self._add(spec, _labels(spec, labels), {bisect.bisect_left(spec.buckets, value): count}, value * count)

    def observe_each(self, name: str, values: Sequence[float]) -> None:
        """Add one observation of each value to a histogram without labels: tens of thousands within milliseconds."""
        spec = _spec(name, "histogram")
        at = Counter(bisect.bisect_left(spec.buckets, value) for value in values)
        if at:
            self._add(spec, _labels(spec, {}), at, sum(values))

    def _add(self, spec: MetricSpec, key: LabelValues, counts: Mapping[int, int], total: float) -> None:
        """Add to a histogram: counts by the index of their bucket, and the sum of what was observed."""
        with self._store.lock:
            series = self._store.histograms.setdefault(spec.name, {})
            key = _bounded(series, key)
            histogram = series.get(key)
            if histogram is None:
                histogram = series[key] = _Histogram(len(spec.buckets))
            for at, count in counts.items():
                histogram.counts[at] += count
            histogram.total += total

    def serve(
        self, host: str = "127.0.0.1", port: int = 0, run_dir: Path | None = None, *, reached_at: str | None = None
    ) -> int:
        """Serve /metrics and, with ``run_dir``, write its Prometheus target files.

        reached_at: this host's address for a scraper elsewhere, if ``host`` means all interfaces; None for its name.
        Returns the port: ``port``, or the next free one; 0 asks for any. Raises ResourceError when the address cannot
        be used.
        """
        if self._server is not None:
            raise RuntimeError(f"metrics of {self.role} are served already")
        self._server, self._thread = self._listen(host, port)
        bound = int(self._server.server_port)
        if port and bound != port:
            log.warning("metrics.port is in use; /metrics is served on the next free one", port=port, served_on=bound)
        if run_dir is not None:
            # A wildcard address is not one that a scraper elsewhere can reach; the host's own is.
            reachable = host if host not in WILDCARDS else reached_at or socket.gethostname()
            self._write_target(run_dir, self.role, self.replica, with_port(reachable, bound))
        return bound

    def refer(self, role: str, addresses: Sequence[str], run_dir: Path) -> None:
        """Point Prometheus to the /metrics that other processes serve as replicas of ``role``, until ``close``."""
        for replica, address in enumerate(addresses):
            self._write_target(run_dir, role, replica, address)

    def _listen(self, host: str, port: int) -> tuple[Any, threading.Thread]:
        last = min(port + _PORTS_TRIED, 65535) if port else 0
        for candidate in range(port, last + 1):
            try:
                server, thread = start_http_server(candidate, addr=host, registry=self.registry)
            except OSError as error:
                if error.errno == errno.EADDRINUSE and candidate < last:
                    continue
                raise ResourceError(
                    f"metrics.port: cannot serve /metrics of {self.role} on {host}:{candidate} "
                    f"({error.strerror or error}); set metrics.port to a free port, or to 0, which picks one, and "
                    "metrics.host to an interface of this machine"
                ) from None
            server.set_app(_text_of(self.registry))
            return server, thread
        raise AssertionError("unreachable")

    def _write_target(self, run_dir: Path, role: str, replica: int, address: str) -> None:
        labels = {"run": self.run, "role": role, "replica": str(replica)}
        name = role if replica == 0 else f"{role}-{replica}"
        paths = [run_dir / TARGETS / f"{name}.json", run_dir.parent / ALL_TARGETS / f"{name}@{run_dir.name}.json"]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Prometheus may read at any moment, and only *.json: the file appears whole, by its rename.
            write_atomically(path, (json.dumps([{"targets": [address], "labels": labels}]) + "\n").encode())
        self._targets += paths

    def close(self) -> None:
        """Stop serving and withdraw the target files. May be called twice."""
        for target in self._targets:
            target.unlink(missing_ok=True)
        self._targets = []
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        if self._thread is not None:
            self._thread.join(timeout=5.0)
            self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve_metrics(config: RunConfig, role: str, replica: int, order: int) -> Metrics:
    """Serve the process's /metrics on the ``order``-th port from metrics.port, or on a free one where that is 0.

    Without metrics.host, the processes of a run on a cluster listen on their host's address in the cluster's network,
    and those of other runs on loopback.
    """
    metrics = Metrics(role, run=config.name, replica=replica)
    port = config.metrics.port + order if config.metrics.port else 0
    joined = config.cluster.joined_address
    own = None if joined is None else address_towards(joined)
    host = own or "127.0.0.1" if config.metrics.host is None else config.metrics.host
    metrics.serve(host, port, config.run_dir, reached_at=own)
    return metrics


def _text_of(registry: CollectorRegistry) -> Callable[[Any, Any], list[bytes]]:
    """Return a WSGI application that serves all metrics uncompressed and in Prometheus' text format only.

    This takes a quarter less time than OpenMetrics and gzip, which Prometheus asks for by default, and a rollout worker
    answers in the process that distributes its tokens. In OpenMetrics the colons of vLLM's names would be underscores.
    """

    def answer(_environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)])
        return [generate_latest(registry)]

    return answer


def _bounded(series: Mapping[LabelValues, Any], key: LabelValues) -> LabelValues:
    return key if key in series or len(series) < MAX_SERIES else (OTHER,) * len(key)


def _spec(name: str, kind: str) -> MetricSpec:
    spec = METRICS.get(name)
    if spec is None:
        raise UndeclaredMetric(f"metric {name!r} is not declared; add it to async_rl/metrics/declared.py")
    if spec.kind != kind:
        raise UndeclaredMetric(f"metric {name} is a {spec.kind}, used as a {kind}")
    return spec


def _labels(spec: MetricSpec, labels: Mapping[str, str | int]) -> LabelValues:
    if not labels and (spec.whole or not spec.labels):
        return ()
    if len(labels) != len(spec.labels) or any(label not in labels for label in spec.labels):
        declared = ", ".join(spec.labels) or "none"
        raise UndeclaredMetric(f"metric {spec.name}: labels {sorted(labels)} given, declared: {declared}")
    return tuple(str(labels[label]) for label in spec.labels)
