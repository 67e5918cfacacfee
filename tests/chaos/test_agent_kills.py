"""Deaths in each stage of the rollouts of agents that are programs: of a program, of its worker, of the engine.

The engine is scripted; programs, gateway, queue, driver and trainer are real.
"""

import json
import socket
import sys
import time
from urllib.parse import urlsplit

import psutil
import pytest

from tests.chaos.kills import NAMES, SETTINGS, wait_for_more
from tests.support import asking_program
from tests.support.invariants import check

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

AGENT = {
    "data__eval": "null",
    "rollout__engine": "tests.support.scripted_scenarios:DyingTurnsEngine",
    "rollout__agent__on_error": "skip",
    "rollout__min_group_size": 2,
    "rollout__max_failed_ratio": 1.0,
}


class Programs:
    """What the programs of a run have written of themselves."""

    def __init__(self, run, path):
        self._run, self._path = run, path

    def stages(self):
        """The last line of each program."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return {pid: (stage, url) for pid, stage, url in map(json.loads, lines)}

    def one_in(self, stage):
        """A program that lives and is in this stage: "started" waits for its first turn, "first" for its second."""
        deadline = time.monotonic() + 180
        while True:
            assert self._run.process.poll() is None, f"the run ended:\n{self._run.output}"
            assert time.monotonic() < deadline, f"no program in stage {stage}:\n{self._run.output[-5000:]}"
            for pid, (reached, url) in reversed(self.stages().items()):
                if reached == stage and psutil.pid_exists(pid):
                    return psutil.Process(pid), url
            time.sleep(0.01)

    def wait_until_gone(self, pids, url):
        """Wait until the programs have ended, and nothing listens where they asked."""
        deadline = time.monotonic() + 60
        while (alive := [pid for pid in pids if psutil.pid_exists(pid)]) or answers(url):
            assert time.monotonic() < deadline, f"still there: the port, and the programs {alive}"
            time.sleep(0.05)


def answers(url):
    """Whether something listens where a gateway was."""
    where = urlsplit(url)
    try:
        socket.create_connection((where.hostname, where.port), timeout=5).close()
    except OSError:
        return False
    return True


def test_programs_workers_and_engines_die_in_every_stage_of_a_rollout(start_run, tmp_path):
    stages = tmp_path / "stages"
    command = json.dumps([sys.executable, "-I", "-S", asking_program.__file__, str(stages)])
    run = start_run(rollout__agent__command=command, **SETTINGS | AGENT)
    programs = Programs(run, stages)
    run.wait_for_step(2)

    for stage in ("started", "first"):
        program, _ = programs.one_in(stage)
        program.kill()
        wait_for_more(run, 2)

    _, url = programs.one_in("first")
    of_the_worker = [
        pid for pid, (_, theirs) in programs.stages().items() if urlsplit(theirs).port == urlsplit(url).port
    ]
    assert answers(url)
    run.one(NAMES["worker"]).kill()
    programs.wait_until_gone(of_the_worker, url)
    wait_for_more(run, 3)

    restarts = run.events("worker_restarted")
    assert len(restarts) >= 2, "one for the kill, one for the engine, which has died by now"
    run.process.terminate()
    assert run.wait() == 130, run.output
    run.assert_nothing_left()
    assert "Traceback" not in run.output
    assert run.summary["groups"]["failed"] <= 2
    assert run.rows[-1]["reward_part_mean"]["turns"] == 2.0
    check(run, tmp_path, scripted=True)
