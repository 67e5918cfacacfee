"""A whole run of agents that branch: real vLLM, Ray and Megatron, weight syncs in the middle of turns."""

import json

import pytest

from async_rl.queue import codec
from tests.support.invariants import conserved

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_engine_and_trainer_agree_on_the_tokens_of_every_branch(start_run):
    """A fork's prompt has tokens that another version may have sampled, and routed experts of the fork's own calls."""
    run = start_run(
        eval__n=8,
        rollout__agent__function="tests.support.user_agents:forks",
        trainer__loss__aggregation="sequence_mean",
        trainer__loss__advantage="turn_return",
        trainer__loss__turn_discount=0.5,
        debug__dump_trajectories=64,
        trainer__steps=4,
    )
    assert run.wait() == 0, run.output
    run.assert_nothing_left()
    summary = run.summary
    assert conserved(summary["groups"])
    assert summary["trajectories"]["partial"] > 0
    assert summary["on_policy_logprob_abs_diff"]["max"] <= 2e-5
    groups = [codec.decode(path.read_bytes()) for path in sorted((run.folder / "trajectories").iterdir())]
    assert len(groups) == 4 * 4
    assert {rollout.reward for group in groups for rollout in group.rollouts} <= {0.0, 1.0, 2.0}
    counts = {len(rollout.trajectories) for group in groups for rollout in group.rollouts}
    assert counts <= {2, 3}, "the first turn, and two after it of which one may extend it"
    for group in groups:
        for rollout in group.rollouts:
            first, *forks = rollout.trajectories
            assert len(first.prompt_ids) == len(group.prompt.token_ids)
            for fork in forks:
                assert fork.prompt_ids[: len(first.prompt_ids)].tolist() == first.prompt_ids.tolist()
                assert len(fork.routed_experts) == fork.num_tokens - 1
    assert summary["trajectories"]["total"] == sum(len(group.trajectories) for group in groups)
    assert {turn for group in groups for rollout in group.rollouts for turn in rollout.turn_rewards} == {1, 2}
    for row in run.rows:
        assert ("tokens" in row["reward_part_mean"], "context" in row["rollout_metric_mean"]) == (True, True)
        assert (row["turns_per_rollout_mean"], row["rollouts_trained"].keys() <= {"done", "truncated"}) == (3.0, True)
        assert 2 <= row["trajectories_per_rollout_mean"] <= 3
        assert 0 < row["prefix_recomputed_share"] < 1
        assert row["grad_norm"] > 0
    first, *_, last = (json.loads(line) for line in (run.folder / "evals.jsonl").read_text().splitlines())
    assert (first["policy_version"], last["policy_version"]) == (0, 4)
    for results in first, last:
        assert (results["set"], results["problems"], results["failed"]) == ("held_out", 8, 0)
        # The agent's reward is that of the seed, which is the same in every evaluation; four tokens are the first turn.
        assert results["avg"]["mean"] == first["avg"]["mean"] > 0
        assert results["response_tokens_mean"] > 4
    samples = [json.loads(line) for line in (run.folder / "eval_samples.jsonl").read_text().splitlines()]
    assert all(1 <= len(sample["branches"]) <= 2 for sample in samples)
