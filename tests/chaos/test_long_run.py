"""Weeks of a run in virtual time: no table of the queue or the driver, and no file, grows with the steps."""

import json
import time

import pytest

from async_rl.config.loading import validate
from async_rl.driver.recorder import Recorder
from async_rl.queue import actor
from async_rl.runtime import runfolder
from async_rl.runtime.rolling import open_part, parts
from tests.support.long_run import LongRun, container_bytes

STEPS = 20_000
SAMPLES_BYTES, TIMELINE_BYTES = 2_000_000, 200_000

pytestmark = pytest.mark.slow


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """The records of a run, whose bounds are a hundredth of the real ones, so that all are reached."""
    monkeypatch.setattr(runfolder, "_TRAINED_BYTES", 160_000)
    monkeypatch.setattr(actor, "_COMPACT_BYTES", 160_000)
    tree = {
        "name": "run",
        "runs": str(tmp_path),
        "model": {"path": "model"},
        "data": {"train": "train.jsonl"},
        "trainer": {"steps": STEPS},
        "metrics": {"samples_bytes": SAMPLES_BYTES, "timeline_bytes": TIMELINE_BYTES},
    }
    with Recorder(validate(tree), time.monotonic(), lambda ids: "word " * len(ids)) as made:
        yield made


def rows(path):
    return [json.loads(line) for part in parts(path) for line in open_part(part)]


def size_of(path):
    return sum(part.stat().st_size for part in parts(path))


def test_invariant_6_nothing_grows_with_the_steps_of_a_run(recorder):
    run = LongRun(
        recorder,
        queue_deaths=5e-4,
        replicas=3,
        capacity=3,
        required=2,
        checkpoint_every=10,
        on_stale="drop",
        max_staleness=1,
        deaths=1e-3,
        trainer_deaths=2e-3,
        never_finish=1e-3,
        rows=1000,
    )
    memory = []
    for part in range(1, 11):
        run.run(part * STEPS // 10)
        memory.append(container_bytes())
    for event in ("die", "queue died", "time_out"):
        assert run.happened[event] > 1, f"no {event}: nothing was tried"
    assert run.version > STEPS + 10, "the trainer died"

    half = len(run.kept) // 2
    for what in run.kept[0]:
        early, late = (max(kept[what] for kept in some) for some in (run.kept[:half], run.kept[half:]))
        assert late <= 1.25 * early, f"{what} grows: {early} in the first half of the run, {late} in the second"
    assert memory[-1] - memory[1] < 1_000_000, f"tables grow: {memory} bytes after each tenth of the run"

    # What is kept of every step is there once, whatever was undone; what is not is bounded.
    recorder.__exit__()
    folder = recorder.checkpoints.parent
    assert [row["step"] for row in rows(folder / "metrics.jsonl")] == list(range(1, STEPS + 1))
    trained = rows(folder / "trained.jsonl")
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    groups = [group_id.rpartition(".")[0] for row in trained for group_id in row["groups"]]
    assert len(set(groups)) == len(groups) == 2 * STEPS, "each prompt once"
    assert size_of(folder / "samples.jsonl") <= SAMPLES_BYTES * 1.01
    assert size_of(folder / "rewound-samples.jsonl") <= SAMPLES_BYTES * 1.01
    assert sum(file.stat().st_size for file in (folder / "timeline").rglob("*.*")) <= TIMELINE_BYTES * 1.01
    assert recorder.journal.stat().st_size <= run.kept[-1]["journal"]
