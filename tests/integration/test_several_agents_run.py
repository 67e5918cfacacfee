"""A whole run of two environments and of responses, each for a source: scripted engine, real Ray and trainer."""

import json
import shutil

import pytest

from async_rl.queue import codec
from tests.support.invariants import conserved
from tests.support.real_run import SCRIPTED, Run, make_model, make_recipe

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STEPS = 4
WORLDS = "tests.support.user_environments"
AGENTS = {
    "short": {"environment": f"{WORLDS}:Wordless", "max_turns": 2},
    # Its host is killed in the first rollout of the first row.
    "mortal": {"environment": f"{WORLDS}:WordlessDies", "on_error": "skip"},
}


def test_each_source_is_played_as_it_says_and_a_lost_host_of_one_harms_no_other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    recipe = make_recipe(folder, make_model(folder / "model"))
    train = str(folder / "train.jsonl")
    sources = {
        "plain": {"path": train},
        "short": {"path": train, "agent": "short", "max_response_tokens": 100},
        "mortal": {"path": train, "agent": "mortal"},
    }
    sets = {"played": {"path": str(folder / "eval.jsonl"), "agent": "short", "limit": 4}}
    run = Run(
        recipe,
        folder,
        data__train="null",
        data__sources=json.dumps(sources),
        data__shuffle="false",
        rollout__agents=json.dumps(AGENTS),
        eval__sets=json.dumps(sets),
        debug__dump_trajectories=64,
        trainer__steps=STEPS,
        **SCRIPTED,
    )
    try:
        assert run.wait() == 0, run.output
        run.assert_nothing_left()
        summary = run.summary
        assert conserved(summary["groups"])
        assert summary["groups"]["failed"] >= 1
        groups = [codec.decode(path.read_bytes()) for path in sorted((run.folder / "trajectories").iterdir())]
        assert len(groups) == STEPS * 4
        found = {}
        for group in groups:
            found.setdefault(group.group_id.partition("/")[0], []).extend(group.rollouts)
        assert found.keys() == {"plain", "short", "mortal"}
        assert not [group for group in groups if group.group_id == "mortal/0-1.0"]
        assert all(t.sampled.all() for r in found["plain"] for t in r.trajectories)
        assert {r.metrics.get("turns") for r in found["plain"]} == {None}
        ends = {name: {(r.end, r.metrics["turns"], r.reward) for r in found[name]} for name in ("short", "mortal")}
        assert ends["mortal"] <= {("done", 3.0, 3.0), ("truncated", 2.0, 2.0), ("truncated", 1.0, 1.0)}
        assert ("done", 3.0, 3.0) in ends["mortal"]
        assert ends["short"] <= {("truncated", 2.0, 2.0), ("truncated", 1.0, 1.0)}
        assert ("truncated", 2.0, 2.0) in ends["short"]
        assert max(len(t.response_ids) for r in found["short"] for t in r.trajectories) <= 100
        shares = run.rows[-1]["issued_share"]
        assert all(abs(share - 1 / 3) < 0.2 for share in shares.values()), shares
        lines = [json.loads(line) for line in (run.folder / "evals.jsonl").read_text().splitlines()]
        played = [line for line in lines if line["set"] == "played"]
        assert [line["policy_version"] for line in played] == [0, STEPS]
        assert all(1 <= line["metrics"]["turns"] <= 2 for line in played)
        assert not any("metrics" in line for line in lines if line["set"] != "played")
        logs = (run.folder / "logs" / "rollout-0.jsonl").read_text().splitlines()
        died = [line for line in map(json.loads, logs) if line["event"] == "environment_host_died"]
        assert len(died) == 1
    finally:
        run.close()
        shutil.rmtree(folder)
