"""The shortest proof that a whole run works: scripted engine, a few steps, one kill. ``make smoke`` runs it."""

import pytest

from tests.support.invariants import conserved
from tests.support.real_run import SCRIPTED

# `make smoke` runs it by its name, and `make test` has a kill in test_pipeline.
pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_a_run_survives_a_kill_of_its_queue(start_run):
    run = start_run(
        trainer__steps=10_000,
        recovery__max_restarts=10,
        recovery__backoff_s=0.01,
        eval__n=1,
        **SCRIPTED,
    )
    run.wait_for_step(3)
    queue = run.one("QueueProcess")
    queue.kill()
    run.wait_for_step(len(run.rows) + 3)
    assert run.one("QueueProcess").pid != queue.pid
    run.process.terminate()
    assert run.wait() == 130, run.output
    run.assert_nothing_left()
    groups = run.summary["groups"]
    # Invariant 5: conservation, over the death of the process that counts.
    assert conserved(groups)
