"""A whole run whose responses are sampled in several ways at once: real vLLM, Ray and Megatron."""

import json

import pytest

from async_rl.queue import codec
from tests.support.invariants import conserved

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


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
