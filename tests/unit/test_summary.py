"""summary.json: exactly the promised keys, and figures worked out by hand."""

import json
import math

import pytest

from async_rl.metrics.declared import METRICS
from async_rl.metrics.publish import step_row
from async_rl.metrics.records import GroupCounts, SyncRecord, TokenAgreement, Totals
from async_rl.metrics.summary import Summary
from async_rl.runtime.runfolder import to_json
from tests.support.step_records import eval_results, step_record

KEYS = {
    "steps": None,
    "policy_version": None,
    "wall_s": None,
    "setup_s": None,
    "eval": {"first", "last", "n"},
    "eval_sets": set(),
    "reward_mean": {"first", "last"},
    "trajectories": {"total", "partial", "max_segments"},
    "token_staleness": {"max", "mean"},
    "tokens_masked": None,
    "groups": {"issued", "trained", "outstanding", "returned", "failed", "filtered", "dropped"},
    "on_policy_logprob_abs_diff": {"mean", "max"},
    "logprob_abs_diff_by_resume_position": {"uninterrupted", "before", "first", "after"},
    "ppo_kl": {"mean", "max_abs"},
    "sync": {"count", "seconds_mean", "seconds_max", "retries", "canary_max"},
    "tokens": {"generated", "trained", "resumed_prefill", "exact_extra"},
    "busy": {"rollout_s", "trainer_s"},
    "overlap_efficiency": None,
    "exit_reason": None,
}

TOTALS = Totals(
    wall_s=10.0,
    setup_s=3.0,
    groups=GroupCounts(issued=12, trained=4, outstanding=2, returned=2, failed=1, filtered=3, dropped=1),
    tokens_generated=500,
    tokens_resumed_prefill=70,
    rollout_busy_s=9.0,
    trainer_busy_s=6.0,
)


def shape(result):
    return {key: set(value) if isinstance(value, dict) else None for key, value in result.items()}


def on_policy(tokens, **values):
    part = TokenAgreement(tokens=tokens, **values)
    return {"agreement": part, "agreement_by_staleness": {0: part}}


def test_keys_are_exactly_the_promised_ones():
    summary = Summary()
    assert shape(summary.result(TOTALS, "finished")) == KEYS
    summary.add_step(step_record())
    assert shape(summary.result(TOTALS, "finished")) == KEYS


def test_a_run_that_ended_before_its_first_step_has_nulls_not_nan():
    result = Summary().result(Totals(wall_s=0.0, setup_s=1.5), "failed: no memory")
    assert result["steps"] == 0
    assert result["overlap_efficiency"] is None
    assert result["reward_mean"] == {"first": None, "last": None}
    assert result["eval"] == {"first": None, "last": None, "n": 0}
    assert result["sync"] == {"count": 0, "seconds_mean": None, "seconds_max": None, "retries": 0, "canary_max": None}
    assert result["exit_reason"] == "failed: no memory"


def test_totals_go_through():
    result = Summary().result(TOTALS, "finished")
    assert result["groups"] == {
        "issued": 12,
        "trained": 4,
        "outstanding": 2,
        "returned": 2,
        "failed": 1,
        "filtered": 3,
        "dropped": 1,
    }
    assert result["busy"] == {"rollout_s": 9.0, "trainer_s": 6.0}
    assert result["overlap_efficiency"] == 0.9
    assert (result["wall_s"], result["setup_s"]) == (10.0, 3.0)
    assert result["tokens"] == {"generated": 500, "trained": 0, "resumed_prefill": 70, "exact_extra": 0}


def test_invariant_5_conservation_of_the_counts():
    assert TOTALS.groups.add_up
    assert not GroupCounts(issued=9, trained=4, outstanding=2, returned=2, failed=0).add_up
    assert not GroupCounts(issued=9, trained=4, outstanding=2, returned=2, failed=1, filtered=1).add_up


def test_reward_is_of_the_first_and_last_ten_steps():
    summary = Summary()
    for step in range(1, 26):
        summary.add_step(step_record(step=step, reward_mean=float(step)))
    assert summary.result(TOTALS, "finished")["reward_mean"] == {"first": 5.5, "last": 20.5}


def test_a_short_run_uses_the_steps_it_has():
    summary = Summary()
    summary.add_step(step_record(reward_mean=0.2))
    summary.add_step(step_record(reward_mean=0.4))
    assert summary.result(TOTALS, "interrupted")["reward_mean"] == pytest.approx({"first": 0.3, "last": 0.3})


def test_means_are_weighted_by_tokens():
    summary = Summary()
    summary.add_step(step_record(**on_policy(10, kl=-0.4, abs_mean=0.5, abs_max=0.6)))
    summary.add_step(step_record(**on_policy(30, kl=0.2, abs_mean=0.1, abs_max=0.9)))
    result = summary.result(TOTALS, "finished")
    assert result["ppo_kl"] == pytest.approx({"mean": 0.05, "max_abs": 0.4})
    assert result["on_policy_logprob_abs_diff"] == pytest.approx({"mean": 0.2, "max": 0.9})
    assert result["tokens"]["trained"] == 40


def test_invariant_4_staleness_maximum_is_over_tokens_that_were_trained():
    summary = Summary()
    summary.add_step(step_record())
    none = TokenAgreement(tokens=0, kl=0.0)
    summary.add_step(step_record(agreement=none, agreement_by_staleness={9: none}, tokens_masked={"stale": 7}))
    result = summary.result(TOTALS, "finished")
    assert result["token_staleness"] == pytest.approx({"max": 2, "mean": 0.8})
    assert result["tokens_masked"] == 7


def test_on_policy_figures_leave_stale_tokens_out():
    summary = Summary()
    summary.add_step(step_record())
    found = summary.result(TOTALS, "finished")["on_policy_logprob_abs_diff"]
    assert found == pytest.approx({"mean": 1e-7, "max": 2e-6}, rel=1e-9, abs=0)


def test_differences_by_resume_position_and_extra_tokens_add_up_over_steps():
    summary = Summary()
    summary.add_step(step_record(extra_positions=5))
    later = TokenAgreement(tokens=10, kl=0.0, abs_mean=0.05, abs_max=0.2)
    summary.add_step(step_record(extra_positions=6, agreement_by_resume_position={"before": later}))
    result = summary.result(TOTALS, "finished")
    before = result["logprob_abs_diff_by_resume_position"]["before"]
    assert before == pytest.approx({"tokens": 40, "mean": (30 * 0.03 + 10 * 0.05) / 40, "max": 0.3})
    assert result["tokens"]["exact_extra"] == 11


def test_trajectories_partial_and_segments():
    summary = Summary()
    summary.add_step(step_record(segments=(1, 2), interruptions=(0, 1)))
    summary.add_step(step_record(segments=(1, 2, 4), interruptions=(0, 0, 3)))
    assert summary.result(TOTALS, "finished")["trajectories"] == {"total": 5, "partial": 2, "max_segments": 4}


def test_a_nan_is_not_hidden_by_the_maximum():
    summary = Summary()
    summary.add_step(step_record(**on_policy(1, kl=0.0, abs_mean=0.0, abs_max=math.nan)))
    summary.add_step(step_record(**on_policy(1, kl=0.0, abs_mean=0.0, abs_max=0.5)))
    assert math.isnan(summary.result(TOTALS, "finished")["on_policy_logprob_abs_diff"]["max"])


def test_syncs_and_evaluations():
    summary = Summary()
    for version, seconds, canary in ((1, 0.2, 1e-6), (2, 0.4, None), (3, 0.3, 5e-6)):
        summary.add_sync(
            SyncRecord(policy_version=version, seconds=seconds, canary=canary, retries={"canary": version // 3})
        )
    for reward in (0.3, 0.5, 0.7):
        summary.add_eval(eval_results(reward, problems=256))
        summary.add_eval(eval_results(reward / 2, "aime"))
    before, summary = summary.state(), Summary()
    summary.restore(before)
    result = summary.result(TOTALS, "finished")
    assert result["sync"] == pytest.approx(
        {"count": 3, "seconds_mean": 0.3, "seconds_max": 0.4, "retries": 1, "canary_max": 5e-6}
    )
    assert result["eval"] == {"first": 0.3, "last": 0.7, "n": 256}
    assert result["eval_sets"]["aime"] == {"first": eval_results(0.15, "aime"), "last": eval_results(0.35, "aime")}
    assert result["policy_version"] == 3


def test_rows_use_the_names_of_the_metrics():
    line = eval_results(0.5, "aime") | {"policy_version": 7}
    row = step_row(step_record(tokens_masked={"stale": 3}, evals={"aime": line}))
    assert json.loads(to_json(row)) == row
    assert row["ppo_kl_by_staleness"] == {"0": 1e-8, "2": 0.01}
    assert row["token_staleness"] == {"0": 60, "2": 40}
    assert (row["trajectories"], row["partial_rollouts"], row["max_segments"]) == (4, 2, 3)
    own = {
        "step",
        "time",
        "elapsed_s",
        "replica_versions",
        "groups",
        "max_segments",
        "response_tokens_mean",
        "response_tokens_max",
        "turns_per_rollout_mean",
        "turns_per_rollout_max",
        "trajectories_per_rollout_mean",
    }
    own |= {"ppo_kl_by_staleness", "on_policy_logprob_abs_diff_mean", "on_policy_logprob_abs_diff_max"}
    own |= {"trained_tokens_by_resume_position", "eval_version", "reward_mean_by_source"}
    assert (row["eval_version"], row["eval_avg"], row["eval_pass_at_k"]) == ({"aime": 7}, {"aime": 0.5}, {"aime": 0.25})
    own |= {f"rollout_logprob_abs_diff_{kind}_by_staleness" for kind in ("mean", "max")}
    assert row["rollout_logprob_abs_diff_max_by_staleness"] == {"0": 2e-6, "2": 0.3}
    assert row["ppo_kl_by_resume_position"] == {"uninterrupted": 1e-3, "before": 0.011}
    assert row["rollout_logprob_abs_diff_max_by_resume_position"] == {"uninterrupted": 0.01, "before": 0.3}
    assert [key for key in row if key not in METRICS and f"{key}_total" not in METRICS and key not in own] == []


def test_split_of_kl_into_on_policy_and_stale():
    record = step_record()
    assert record.on_policy is not None
    assert record.on_policy.kl == 1e-8
    assert record.stale_kl == pytest.approx(0.01)
    assert step_record(agreement_by_staleness={}).stale_kl is None
    assert record.partial_share == 0.5


def test_groups_of_steps_since_the_last_look_at_the_queue_count_as_trained():
    summary = Summary()
    for step in range(5):
        summary.add_step(step_record(step=step, groups=1))
    groups = summary.result(TOTALS, "interrupted")["groups"]
    assert (groups["trained"], groups["outstanding"], groups["issued"]) == (5, 1, 12)
    state = summary.state()
    del state["counts"]["groups"]  # as release 0.1 wrote it
    summary.restore(state)
    assert summary.result(TOTALS, "interrupted")["groups"]["trained"] == 4
