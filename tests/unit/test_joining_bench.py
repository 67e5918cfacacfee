"""What ``tests.bench.joining`` makes of a run folder, and the engine that it runs; no hosts, no Ray."""

import json
from concurrent.futures import Future
from dataclasses import asdict, replace
from datetime import UTC, datetime

import pytest

from async_rl.errors import WeightSyncError
from async_rl.metrics.timeline import TIMELINE
from async_rl.rollout.engine.interface import WeightUpdate
from async_rl.weights.object_store import HostWeights, Publisher
from async_rl.weights.shm_file import TensorMeta
from tests.bench import driver_at_scale, joining
from tests.support.plain_weights import PlainWeights


def stored(array):
    future = Future()
    future.set_result(array)
    return future


@pytest.fixture
def host():
    host = HostWeights(stored)
    yield host
    host.close()


async def test_the_engine_that_joins_reads_the_weights_that_it_is_given(tmp_path, host):
    driver_at_scale.make_files(tmp_path)
    engine = joining.Engine(joining.settings(tmp_path, 4, "10.201.0.1:6379"), joining.STAYS)
    weights = PlainWeights(2**20)
    engine._table = [TensorMeta.of(name, tensor) for name, tensor in weights]
    publication = Publisher(engine._table, lambda array: array.copy()).publish(weights)
    file = host.fetch(publication, host=0, hosts=1, timeout_s=20.0)
    await engine.update_weights(WeightUpdate(asdict(file)))
    with pytest.raises(WeightSyncError):
        await engine.update_weights(WeightUpdate(asdict(replace(file, round=file.round + 1))))


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_engine_that_stays_is_compared_with_itself_before_the_death(tmp_path):
    died = 1000.0
    events = [
        ("process_died", "trainer", 1.0),
        ("process_died", "rollout-1", died),
        ("worker_restarted", "rollout-1", died + 10),
    ]
    lines(
        tmp_path / "logs" / "pipeline.jsonl",
        (
            {"event": event, "process": name, "replica": name, "timestamp": f"{datetime.fromtimestamp(at, UTC)}"}
            for event, name, at in events
        ),
    )
    # 10 tokens a second from 4 s before the death until 3 s after it, then 5 a second, with a gap when it has joined.
    calls = [(died - 4, 7.0, 70), (died + 3, 7.0, 35), (died + 12, 8.0, 80)]
    spans = [{"what": "call", "at": at, "s": s, "tokens": tokens} for at, s, tokens in calls]
    pauses = [{"what": "pause", "at": died + at, "s": 0.1} for at in (-11, -9, -8, 5, 11)]
    lines(tmp_path / TIMELINE / "rollout-0.jsonl", [*spans, *pauses])
    assert joining.result(tmp_path) == {
        "throughput_while_joining": pytest.approx(0.65),
        "throughput_after": pytest.approx(0.8),
        "tokens_per_s": pytest.approx(10.0),
        "joining_s": pytest.approx(10.0),
        "pauses_before": 2,
        "pauses_while_joining": 1,
    }


def test_a_run_that_ended_before_the_replica_had_joined_is_no_result(tmp_path):
    lines(tmp_path / "logs" / "pipeline.jsonl", [])
    with pytest.raises(SystemExit, match="no event process_died"):
        joining.result(tmp_path)
