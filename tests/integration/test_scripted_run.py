"""A whole run with the scripted engine: real broker, Ray, driver and trainer, and no vLLM."""

import shutil

import pytest

from tests.support.invariants import conserved
from tests.support.real_run import SCRIPTED, Run, make_model, make_recipe

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STEPS = 3


@pytest.mark.parametrize("backend", ["shm", "object_store"])
def test_three_steps_with_a_scripted_engine(tmp_path_factory, backend):
    folder = tmp_path_factory.mktemp("scripted")
    recipe = make_recipe(folder, make_model(folder / "model"))
    run = Run(recipe, folder, trainer__steps=STEPS, sync__backend=backend, **SCRIPTED)
    try:
        assert run.wait() == 0, run.output
        run.assert_nothing_left()
        summary = run.summary
        assert summary["exit_reason"] == "finished"
        assert len(run.rows) == summary["steps"] == summary["policy_version"] == STEPS
        groups = summary["groups"]
        assert groups["trained"] == STEPS * 4
        # Invariant 5: conservation.
        assert conserved(groups)
        # Invariant 10: every sync was verified, against weights that the scripted engine received.
        assert summary["sync"]["count"] == STEPS
        assert 0 < summary["sync"]["canary_max"] <= 1e-4
        assert not run.descendants("EngineCore")
    finally:
        run.close()
        shutil.rmtree(folder)
