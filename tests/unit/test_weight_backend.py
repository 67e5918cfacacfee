"""Which backend takes weights to the engines, by where the run is."""

import pytest

from async_rl.config.loading import validate
from async_rl.driver.run import resolved

MINIMAL = {"model": {"path": "m"}, "data": {"train": "t"}}


@pytest.mark.parametrize(
    ("backend", "address", "environment", "used"),
    [
        ("auto", None, None, "shm"),
        ("auto", "10.0.0.1:6379", None, "object_store"),
        ("auto", None, "10.0.0.1:6379", "object_store"),
        ("shm", None, "10.0.0.1:6379", "shm"),
        ("object_store", None, None, "object_store"),
    ],
)
def test_weights_leave_the_host_only_where_the_run_joins_a_cluster(monkeypatch, backend, address, environment, used):
    monkeypatch.setenv("RAY_ADDRESS", environment or "")
    sections = {"sync": {"backend": backend, "rolling": True}, "cluster": {"address": address}}
    config = validate({**MINIMAL, **sections, "resources": {"device": "cpu"}})
    assert config.sync_backend == used
    # As actors on other hosts see it, and the run folder.
    made = resolved(config, resume=True)
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert made.sync.backend == made.sync_backend == used
