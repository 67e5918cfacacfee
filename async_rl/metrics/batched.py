"""A histogram for thousands of observations a second: they are collected first and counted many at a time.

vLLM observes the time between any two tokens, on the event loop that distributes them. Knows prometheus_client only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
from prometheus_client import REGISTRY, CollectorRegistry, Histogram
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

# Most observations that wait to be counted; a scrape counts them too.
_BATCH = 4096


class BatchedHistogram(Collector):
    """A replacement for prometheus_client.Histogram with the methods that vLLM uses and the same exposition."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labelnames: Sequence[str],
        buckets: Sequence[float] = Histogram.DEFAULT_BUCKETS,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._name = name  # vLLM looks for it to unregister the metrics of an earlier engine
        self._documentation = documentation
        self._labelnames = tuple(labelnames)
        self._bounds = np.array([bound for bound in buckets if bound != np.inf], np.float64)
        self._series: dict[tuple[str, ...], _Series] = {}
        registry.register(self)

    def labels(self, *values: object) -> _Series:
        return self._series.setdefault(tuple(map(str, values)), _Series(self._bounds))

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labelnames)
        names = [str(floatToGoString(bound)) for bound in (*self._bounds.tolist(), float("inf"))]  # type: ignore[no-untyped-call]
        for labels, series in list(self._series.items()):
            counts, total = series.counted()
            family.add_metric(labels, list(zip(names, np.cumsum(counts).tolist(), strict=True)), total)
        yield family

    def describe(self) -> Iterator[Metric]:
        yield HistogramMetricFamily(self._name, self._documentation)


class _Series:
    """The observations of one set of labels. Any thread may observe, any may count."""

    def __init__(self, bounds: np.ndarray) -> None:
        self._bounds = bounds
        self._waiting: list[float] = []
        self._counts = np.zeros(len(bounds) + 1)
        self._total = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        self.observe_all((value,))

    def observe_all(self, values: Sequence[float]) -> None:
        self._waiting.extend(values)
        if len(self._waiting) >= _BATCH:
            self.counted()

    def counted(self) -> tuple[np.ndarray, float]:
        """Return the count of each bucket, the last of which has no bound, and the sum of the observations."""
        with self._lock:
            # Keep the list itself: another thread may be about to append to it.
            values = self._waiting[:]
            del self._waiting[: len(values)]
            buckets = np.searchsorted(self._bounds, values)  # a bucket includes its upper bound
            self._counts = self._counts + np.bincount(buckets, minlength=len(self._counts))
            self._total += sum(values)
            return self._counts, self._total
