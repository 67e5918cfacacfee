"""Checkpoints of whole runs with the scripted engine: real broker, Ray, driver and trainer, and no vLLM."""

import msgpack
import pytest

from async_rl.runtime import manifest
from tests.support.invariants import check

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SETTINGS = {
    "rollout__engine": "tests.support.scripted_scenarios:LongDyingEngine",
    "rollout__replicas": 2,
    "checkpoint__every": 2,
    "eval__n": 1,
    "recovery__backoff_s": 0.01,
}


def test_a_checkpoint_that_turns_out_damaged_when_it_is_loaded_is_passed_over(start_run, resume_run, tmp_path):
    """Groups in flight are resumed from the one before; in the first part also those of an engine that died."""
    run = start_run(trainer__steps=4, **SETTINGS)
    assert run.wait() == 0, run.output
    died = run.events("process_died")
    assert [line["process"] for line in died] == ["rollout-0"]
    assert died[0]["resumed"] > 0, "the groups of the dead engine, which a stream brought to the next one"
    older, newest = sorted((run.folder / "checkpoints").glob("step-*"))
    assert (older.name, newest.name) == ("step-000002", "step-000004"), "the last one is written before the run ends"
    for path in (older, newest):
        entries = manifest.read(path)
        assert manifest.find_altered(path, entries) is None
        assert entries.keys() == {
            str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name != manifest.NAME
        }
    in_flight = msgpack.unpackb((older / "pipeline" / "state.msgpack").read_bytes(), strict_map_key=False)["in_flight"]
    assert {file.rpartition("-")[0] for file in in_flight.values()} <= {"rollout-0", "rollout-1"}
    victim = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)

    run = resume_run(trainer__steps=6, **SETTINGS)
    assert run.wait() == 0, run.output
    run.assert_nothing_left()
    (damaged,) = run.events("checkpoint_damaged")
    assert damaged["checkpoint"] == str(newest)
    assert damaged["damage"] == f"{victim.name} has another checksum than when it was written"
    (restored,) = run.events("work_restored")
    assert restored["step"] == 2
    assert restored["resumed"] == len(in_flight)
    assert not run.events("in_flight_group_refused")
    assert run.summary["steps"] == 6
    assert manifest.find_altered(newest, manifest.read(newest)) is None, "it was written again"
    check(run, tmp_path, scripted=True)


def test_rollouts_with_environments_continue_after_an_engine_s_death_and_from_a_checkpoint(
    start_run, resume_run, tmp_path, monkeypatch
):
    """Each rollout that is trained has had its steps one after the other, whichever processes made them."""
    log = tmp_path / "environments"
    monkeypatch.setenv("ENVIRONMENTS_LOG", str(log))
    settings = SETTINGS | {
        "rollout__engine": "tests.support.scripted_scenarios:LongDyingTurnsEngine",
        "rollout__agent__environment": "tests.support.user_environments:Diary",
        "rollout__agent__recovery": "state",
        "data__eval": "null",
    }

    def restored():
        """The rollouts whose environments were set to a state after at least one step, each with its turn."""
        lines = [line.split() for line in log.read_text().splitlines()]
        return [(name, int(turn)) for kind, name, turn, _ in lines if kind == "state" and turn != "0"]

    run = start_run(trainer__steps=4, **settings)
    assert run.wait() == 0, run.output
    (died,) = run.events("process_died")
    assert died["resumed"] > 0
    after_death = restored()
    assert after_death, "rollouts of the dead engine's worker, which its successor continued"

    run = resume_run(trainer__steps=8, **settings)
    assert run.wait() == 0, run.output
    run.assert_nothing_left()
    (work,) = run.events("work_restored")
    assert work["resumed"] > 0
    assert len(restored()) > len(after_death), "rollouts of the checkpoint"
    for replica in range(2):
        assert "in_flight_group_refused" not in (run.folder / "logs" / f"rollout-{replica}.jsonl").read_text()
    steps, new, again = {}, set(), 0
    for kind, name, turn, _ in (line.split() for line in log.read_text().splitlines()):
        if kind == "setup":  # A state follows, unless the rollout waited or was being set up when all was cut off.
            new.add(name)
            continue
        before = 0 if kind == "step" and name in new else steps.get(name, 0)
        assert int(turn) == before + 1 if kind == "step" else int(turn) <= before, (kind, name, turn, before)
        again += kind == "step" and name in new and name in steps
        new.discard(name)
        steps[name] = int(turn)
    assert again < len(restored())
    for row in run.trained:
        for group in row["groups"]:
            assert [steps[f"{group}/{index}"] for index in range(4)] == [4] * 4
    check(run, tmp_path, scripted=True)
