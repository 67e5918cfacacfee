"""SIGKILL of each kind of process, in each phase and at random moments, on the real stack.

After each kill training goes on; at the end the invariants hold, and nothing is left. Many kills of one run are in
``test_many_kills.py``.
"""

import functools
import os
import random
import time

import pytest

from async_rl.config.loading import load
from async_rl.data.cursor import DatasetCursor
from async_rl.queue.redis_store import RedisJournal
from tests.chaos.kills import NAMES, SETTINGS, survive, wait_for_more
from tests.support.invariants import check, dataset
from tests.support.real_run import SCRIPTED
from tests.support.redis_server import PASSWORD

pytestmark = pytest.mark.e2e


@pytest.mark.slow
def test_training_survives_a_kill_of_each_kind(start_run, tmp_path, seed):
    run = start_run(**SETTINGS)
    survive(run, [(kind, None) for kind in NAMES], tmp_path, seed)


@pytest.mark.slow
def test_a_resumed_run_trains_exactly_the_prompts_of_an_uninterrupted_one(start_run, resume_run, tmp_path, seed):
    """Step by step: synchronous training takes the dataset's prompts in their order, four at a time."""
    settings = SETTINGS | {"async_training__staleness_threshold": 0}
    run = start_run(**settings)  # without an end, so that it cannot finish before it is killed
    run.wait_for_step(3)
    time.sleep(random.Random(seed).uniform(0, 1))
    os.kill(run.driver, 9)
    assert run.wait() == 137
    run.assert_nothing_left()
    steps = len(run.trained) + 4
    run = resume_run(**settings | {"trainer__steps": steps})
    assert run.wait() == 0, run.output
    run.assert_nothing_left()
    check(run, tmp_path)
    config = load(run.folder / "config.yaml")
    cursor = DatasetCursor(dataset(config), shuffle=config.data.shuffle, seed=config.seed)
    for row in run.trained:
        assert {group.rpartition(".")[0] for group in row["groups"]} == {cursor.next().prompt_id for _ in range(4)}
    assert run.summary["steps"] == steps
    assert run.summary["groups"]["trained"] == 4 * steps


@pytest.mark.long
def test_groups_in_redis_outlive_every_process(start_run, resume_run, tmp_path, redis_server):
    """Also what came after the last checkpoint: the queue's books and its groups are the server's. Pushes roll."""
    connection = redis_server.settings["redis"]
    settings = SETTINGS | {
        "rollout__replicas": 2,
        "sync__rolling": True,
        "checkpoint__every": 4,
        "queue__backend": "redis",
        "queue__redis__url": connection["url"],
        "queue__redis__password_file": connection["password_file"],
    }
    run = start_run(**settings)
    run.wait_for_step(6)
    for kind in ("queue", "worker"):
        run.one(NAMES[kind]).kill()
        wait_for_more(run, 3)
    os.kill(run.driver, 9)
    assert run.wait() == 137
    run.assert_nothing_left()
    last = run.trained[-1]
    run = resume_run(**settings)
    run.wait_for_step(last["step"] + 4)
    assert run.rows[-1]["policy_version"] > last["policy_version"], "versions only rise, also over the death of all"
    run.process.terminate()
    assert run.wait() == 130, run.output
    run.assert_nothing_left()
    # The settings as written down hold no password, and the entries of what was trained are gone.
    assert PASSWORD not in (run.folder / "config.yaml").read_text()
    config = load(run.folder / "config.yaml")
    check(run, tmp_path, journal=functools.partial(RedisJournal, config.queue.redis, config.name))
    entries = redis_server.client().xlen(f"async_rl:{config.name}:groups")
    assert entries <= 2 * config.required_groups + config.rollout.replicas * 8


@pytest.mark.long
def test_an_engine_that_hangs_is_replaced(start_run, tmp_path):
    """The process is stopped and not killed, which no other process notices, while it generates and in a weight sync.

    Before the first weight sync the trainer imports vLLM, which takes 6 s beside another test, and more beside others.
    """
    run = start_run(watchdog__stall_s=4, sync__timeout_s=60, **SETTINGS)
    run.wait_for_step(3)
    for phase in ("groups", "push"):
        run.wait_for_phase(phase)
        run.one(NAMES["engine"]).suspend()
        wait_for_more(run, 4)
    run.process.terminate()
    assert run.wait() == 130, run.output
    run.assert_nothing_left()
    check(run, tmp_path)


@pytest.mark.long
def test_a_run_that_stands_still_ends_with_every_stack(start_run):
    """The trainer's process is stopped: it does not respond, and is not dead.

    The limit holds for the start as well, which takes the scripted engine half of it on a busy machine.
    """
    run = start_run(watchdog__stall_s=3, watchdog__abort_s=60, **SETTINGS, **SCRIPTED)
    run.wait_for_step(3)
    run.one(NAMES["trainer"]).suspend()
    assert run.wait() == 1, run.output
    run.assert_nothing_left()
    assert "nothing has moved for" in run.summary["exit_reason"]
    assert "watchdog.abort_s" in run.output
    for role in ("pipeline", "queue", "rollout-0"):
        assert "most recent call first" in (run.folder / "logs" / f"{role}.stacks.txt").read_text()


@pytest.mark.long
@pytest.mark.parametrize("mode", ["resume", "in_flight"])
def test_the_driver_is_killed_and_the_run_resumed(start_run, resume_run, tmp_path, seed, mode):
    """In each phase; then the run is let go on and stopped in good order."""
    chance = random.Random(seed)
    settings = SETTINGS | {"async_training__partial_rollout__mode": mode}
    run = start_run(**settings)
    for phase in ("checkpoint", "push", "update", None):
        run.wait_for_step(len(run.trained) + 4 if (run.folder / "trained.jsonl").exists() else 4)
        if phase is None:
            time.sleep(chance.uniform(0, 1.5))
        else:
            run.wait_for_phase(phase)
        os.kill(run.driver, 9)
        assert run.wait() == 137
        run.assert_nothing_left()
        run = resume_run(**settings)
    run.wait_for_step(len(run.trained) + 4)
    run.process.terminate()
    assert run.wait() == 130, run.output
    run.assert_nothing_left()
    check(run, tmp_path)
