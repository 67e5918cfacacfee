"""A histogram that counts in batches serves what prometheus_client's own would serve."""

import sys
import threading

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from async_rl.metrics import batched
from async_rl.metrics.batched import BatchedHistogram

BUCKETS = [0.01, 0.5, 1, 20, 1e6]


def served(registry):
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


@pytest.fixture
def both():
    """(registry, histogram) of ours and of prometheus_client's."""
    registries = CollectorRegistry(), CollectorRegistry()
    made = zip((BatchedHistogram, Histogram), registries, strict=True)
    return [
        (registry, kind("vllm:t", "Seconds.", ["a", "b"], buckets=BUCKETS, registry=registry))
        for kind, registry in made
    ]


def test_it_serves_what_prometheus_client_would(both):
    rng = np.random.default_rng(0)
    # Some are on a bound. More than a batch, so that some are counted before they are asked for.
    values = [*rng.choice([0.01, 1.0, 1e6, 2e6], 100), *rng.lognormal(0, 4, batched._BATCH)]
    for _, histogram in both:
        for value in values:
            histogram.labels("x", 1).observe(float(value))
        histogram.labels("y", 1)
    ours, theirs = ([line for line in served(registry) if "_sum" not in line] for registry, _ in both)
    assert ours == theirs
    sums = [registry.get_sample_value("vllm:t_sum", {"a": "x", "b": "1"}) for registry, _ in both]
    np.testing.assert_allclose(*sums)


def test_what_waits_to_be_counted_is_bounded():
    histogram = BatchedHistogram("vllm:t", "Seconds.", ["a"], BUCKETS, CollectorRegistry())
    for _ in range(3 * batched._BATCH - 1):
        histogram.labels("x").observe(1.0)
        assert len(histogram.labels("x")._waiting) < batched._BATCH


def test_none_is_lost_or_counted_twice_by_a_scrape():
    registry = CollectorRegistry()
    series = BatchedHistogram("vllm:t", "Seconds.", ["a"], BUCKETS, registry).labels("x")
    stop = threading.Event()

    def scrape():
        while not stop.is_set():
            generate_latest(registry)

    scraper = threading.Thread(target=scrape)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # as often as can be
    try:
        scraper.start()
        for _ in range(100_000):
            series.observe(1.0)
    finally:
        stop.set()
        scraper.join()
        sys.setswitchinterval(interval)
    assert registry.get_sample_value("vllm:t_count", {"a": "x"}) == 100_000
