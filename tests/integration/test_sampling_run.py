"""A whole run whose responses are sampled in several ways at once: real vLLM, Ray and Megatron."""

import json
import os

import pytest

from async_rl.queue import codec
from tests.support.invariants import conserved

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

# So few places that the engine is never idle, and each weight sync cuts responses.
BUSY = {"rollout__max_num_seqs": 4}


def test_engine_and_trainer_agree_at_the_temperature_of_each_source_and_row(start_run, recipe, tmp_path):
    rows = [json.loads(line) for line in (recipe.parent / "train.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["how"] = {"temperature": 0.5, "max_response_tokens": 30} if number % 2 else None
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join(map(json.dumps, rows)))
    sources = {
        "cold": {"path": str(recipe.parent / "train.jsonl"), "temperature": 0.7},
        "mixed": {"path": str(mixed)},
    }
    run = start_run(
        data__train="null",
        data__sources=json.dumps(sources),
        data__sampling_field="how",
        rollout__temperature=1.3,
        # A second pass of the trainer over the same tokens, which must be at their temperature too.
        trainer__loss__proximal="recompute",
        debug__dump_trajectories=64,
        trainer__steps=4,
        **BUSY,
    )
    assert run.wait() == 0, run.output
    run.assert_nothing_left()
    summary = run.summary
    assert conserved(summary["groups"])
    assert summary["trajectories"]["partial"] > 0
    # With one temperature for all it would be about 0.5.
    assert summary["on_policy_logprob_abs_diff"]["max"] <= 2e-5
    groups = [codec.decode(path.read_bytes()) for path in sorted((run.folder / "trajectories").iterdir())]
    asked = {
        (group.group_id.partition("/")[0], (group.prompt.fields.get("how") or {}).get("temperature"))
        for group in groups
    }
    assert asked == {("cold", None), ("mixed", None), ("mixed", 0.5)}
    short = [t for group in groups if group.prompt.fields.get("how") for t in group.trajectories]
    assert max(len(trajectory.response_ids) for trajectory in short) <= 30


def test_what_was_sampled_before_a_resume_is_trained_at_its_own_temperature(start_run, resume_run):
    """Weights stay as they are, so that engine and trainer agree on tokens of every version."""
    settings = {"trainer__optimizer__lr": 1e-12, "checkpoint__every": 1, "async_training__max_staleness": 8, **BUSY}
    first = start_run(rollout__temperature=1.5, trainer__steps=10_000, **settings)
    first.wait_for_step(3)
    os.kill(first.driver, 9)
    assert first.wait() == 137, first.output
    steps = len(first.rows) + 3
    resumed = resume_run(rollout__temperature=0.6, trainer__steps=steps, debug__dump_trajectories=64, **settings)
    assert resumed.wait() == 0, resumed.output
    resumed.assert_nothing_left()
    groups = [codec.decode(path.read_bytes()) for path in sorted((resumed.folder / "trajectories").iterdir())]
    found = [{s.temperature for s in t.segments} for group in groups for t in group.trajectories]
    assert {1.5} in found
    assert {0.6} in found
    assert {1.5, 0.6} in found, "begun before, ended after"
    # With one temperature for all it would be about 1.
    assert max(row["rollout_logprob_abs_diff_max"] for row in resumed.rows) <= 2e-5
