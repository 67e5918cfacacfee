"""A whole run with the scripted engine: real broker, Ray, driver and trainer, and no vLLM."""

import json
import shutil

import pytest

from tests.support.invariants import conserved
from tests.support.real_run import SCRIPTED, Run, make_model, make_recipe

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STEPS = 3


# With so small a rate some twentieth of the elements have other bits after an update, in float32.
DELTA = {"sync__backend": "object_store", "sync__delta__full_every": 20, "trainer__optimizer__lr": 1e-10}


@pytest.mark.parametrize(
    ("settings", "sent_full"),
    [
        ({"sync__backend": "shm"}, []),
        ({"sync__backend": "object_store"}, []),
        (DELTA, [True, False, False]),
    ],
    ids=["shm", "object_store", "delta"],
)
def test_three_steps_with_a_scripted_engine(tmp_path_factory, settings, sent_full):
    folder = tmp_path_factory.mktemp("scripted")
    recipe = make_recipe(folder, make_model(folder / "model"))
    run = Run(recipe, folder, trainer__steps=STEPS, **settings, **SCRIPTED)
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
        lines = [json.loads(line) for line in (run.folder / "logs" / "trainer-0.jsonl").read_text().splitlines()]
        published = [line for line in lines if line["event"] == "weights_published"]
        assert [line["full"] for line in published] == sent_full
        assert all(line["full"] or 0 < line["changed"] < 0.5 for line in published)
    finally:
        run.close()
        shutil.rmtree(folder)
