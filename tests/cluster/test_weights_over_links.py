"""Weights from one host to others over limited links, by the two ends of a run: what each link carries."""

import pytest

from tests.bench.cluster import measure_weights
from tests.cluster.hosts import why_unavailable

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NBYTES, MBIT = 32 * 2**20, 200.0


def test_each_link_carries_the_weights_about_once_whether_one_host_fetches_them_or_two(tmp_path):
    if reason := why_unavailable():
        pytest.skip(reason)
    found = dict(measure_weights(tmp_path / "hosts", [NBYTES], [1, 2], [MBIT], rounds=1))
    assert list(found) == ["32 MB to 1 at 200 Mbit/s", "32 MB to 2 at 200 Mbit/s"]
    for each in found.values():
        assert each["seconds"] > 0.9 * NBYTES * 8 / (MBIT * 1e6), "the links are limited"
        assert each["most"] < 1.15 * NBYTES, "with headers, acknowledgements, and what Ray says meanwhile"
        assert each["sent"] > 0.95 * NBYTES


def test_of_a_delta_each_link_carries_little_more_than_what_has_changed(tmp_path):
    if reason := why_unavailable():
        pytest.skip(reason)
    found = dict(measure_weights(tmp_path / "hosts", [NBYTES], [2], [MBIT], rounds=1, changed_every=100))
    (each,) = found.values()
    assert each["most"] < 0.1 * NBYTES, "with what Ray says meanwhile"
    assert each["sent"] > 0.01 * NBYTES, "the new values alone"
