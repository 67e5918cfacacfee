"""Kills of a run's processes: which, in which phase, and that training goes on after each."""

import random
import time

from tests.support.invariants import check

NAMES = {"worker": "RolloutActor", "engine": "EngineCore", "queue": "QueueProcess", "trainer": "TrainerActor"}
PHASES = ("groups", "update", "push", "checkpoint", None)  # None: whenever it is
SETTINGS = {
    "checkpoint__every": 2,
    "trainer__steps": 100_000,
    "recovery__max_restarts": 1000,
    "recovery__backoff_s": 0.01,
    "recovery__period_s": 0.1,  # so that the wait does not double
    "eval__n": 1,
    # So many steps at the recipe's rate would end in a model that repeats itself, and in a router that has one answer.
    "trainer__optimizer__lr": 1e-6,
}


def trained_steps(run) -> int:
    """Steps trained, those included that were taken back."""
    lines = 0
    for name in ("trained.jsonl", "rewound-trained.jsonl"):
        path = run.folder / name
        lines += path.read_bytes().count(b"\n") if path.exists() else 0
    return lines


def wait_for_more(run, steps: int) -> None:
    goal, deadline = trained_steps(run) + steps, time.monotonic() + 300
    while trained_steps(run) < goal:
        assert run.process.poll() is None, f"the run ended:\n{run.output}"
        assert time.monotonic() < deadline, f"training does not go on:\n{run.output[-5000:]}"
        time.sleep(0.05)


def kill(run, kind: str, phase: str | None, chance: random.Random) -> None:
    if phase is None:
        time.sleep(chance.uniform(0, 1.5))
    else:
        run.wait_for_phase(phase)
    run.one(NAMES[kind]).kill()


def schedule(chance: random.Random, kills: int, kinds) -> list[tuple[str, str | None]]:
    """Every kind in every phase before any is repeated."""
    pairs: list = []
    while len(pairs) < kills:
        each = [(kind, phase) for kind in kinds for phase in PHASES]
        chance.shuffle(each)
        pairs += each
    return pairs[:kills]


def survive(run, kills, tmp_path, seed) -> None:
    chance = random.Random(seed)
    run.wait_for_step(3)
    for kind, phase in kills:
        before = trained_steps(run)
        kill(run, kind, phase, chance)
        wait_for_more(run, 3)
        print(f"killed {kind} in {phase or 'any phase'} at step {before}")
    run.process.terminate()
    assert run.wait() == 130, run.output
    run.assert_nothing_left()
    assert "Traceback" not in run.output
    assert "(raylet" not in run.output, "Ray's own paragraphs on what died"
    check(run, tmp_path)
