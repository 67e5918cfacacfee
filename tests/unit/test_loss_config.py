"""Settings of the loss of which a part would have no effect are refused, by name and with the fix."""

import pytest

from async_rl.config.loading import validate
from async_rl.errors import ConfigError

MINIMAL = {"model": {"path": "model"}, "data": {"train": "train.jsonl"}}
EXACT = {"async_training": {"partial_rollout": {"routing": "exact"}}}


def tree(loss, skip_zero_advantage=False, **sections):
    return {**MINIMAL, "trainer": {"loss": loss, "skip_zero_advantage": skip_zero_advantage}, **sections}


@pytest.mark.parametrize(
    ("trainer", "streams"),
    [
        ({}, True),
        ({"streaming": False}, False),
        ({"loss": {"advantage": "reinforce_plus_plus"}}, False),
        ({"loss": {"kl": "k3", "kl_coef": 0.1}}, False),
        ({"loss": {"proximal": "recompute"}}, True),
        ({"loss": {"proximal": "recompute", "rejection": {"rule": "second_moment"}}}, False),
        ({"loss": {"rejection": {"rule": "k3"}}}, True),
        ({"router_replay": "R2"}, True),
        ({"parallel": {"pp": 2}}, True),
        ({"loss": {"proximal": "recompute"}, "parallel": {"pp": 2}}, False),
        ({"router_replay": "R2", "parallel": {"pp": 2}}, False),
    ],
)
def test_a_step_streams_unless_something_needs_all_of_its_groups_at_once(trainer, streams):
    assert validate({**MINIMAL, "trainer": trainer}).streams is streams


@pytest.mark.parametrize(
    ("loss", "sections", "words"),
    [
        ({"kl": "k3"}, {}, ["trainer.loss.kl is k3", "kl_coef is 0.0"]),
        ({"kl_coef": 0.1}, {}, ["trainer.loss.kl is none", "kl_coef is 0.1"]),
        ({"importance": {"level": "token"}}, {}, ["importance.level is token", "proximal is behaviour"]),
        (
            {"importance": {"level": "token", "mode": "mask", "low": 3.0}, "proximal": "recompute"},
            {},
            ["importance.low (3.0)", "importance.high (2.0)"],
        ),
        ({"policy": "gspo"}, EXACT, ["routing is exact", "policy gspo"]),
        (
            {"importance": {"level": "sequence"}, "proximal": "interpolate"},
            EXACT,
            ["routing is exact", "importance.level sequence"],
        ),
        ({"policy": "reinforce", "proximal": "recompute"}, {}, ["proximal is recompute", "policy is reinforce"]),
        ({"policy": "cispo", "dual_clip": 3.0}, {}, ["dual_clip is 3.0", "policy is cispo"]),
        ({"policy": "dppo", "dual_clip": 3.0}, {}, ["dual_clip is 3.0", "policy is dppo"]),
        ({"policy": "ipo", "proximal": "recompute"}, {}, ["proximal is recompute", "policy is ipo"]),
        ({"divergence_bound": 0.2}, {}, ["divergence_bound is 0.2", "policy is ppo"]),
        ({"policy": "ipo", "divergence": "kl"}, {}, ["divergence is kl", "policy is ipo"]),
        ({"policy": "dppo", "divergence": "js"}, {}, ["trainer.loss.divergence", "tv, kl"]),
        ({"policy": "dppo", "divergence_bound": 0.0}, {}, ["trainer.loss.divergence_bound", "greater than 0"]),
        (
            {"rejection": {"rule": "geometric_mean", "low": 1.1, "high": 1.001}},
            {},
            ["rejection.low (1.1)", "rejection.high (1.001)"],
        ),
        ({"rejection": {"bound": 0.1}}, {}, ["rejection.bound is 0.1", "rule is off"]),
        ({"rejection": {"rule": "geometric_mean", "bound": 0.1}}, {}, ["rejection.bound is 0.1", "geometric_mean"]),
        ({"rejection": {"rule": "second_moment"}}, {}, ["rule is second_moment", "proximal is behaviour", "recompute"]),
        ({"rejection": {"rule": "k3"}}, EXACT, ["routing is exact", "rejection.rule is k3"]),
        ({"rejection": {"rule": "seq_max_k3"}}, {}, ["trainer.loss.rejection.rule", "geometric_mean, k3"]),
        ({"clip_low": 1.5}, {}, ["trainer.loss.clip_low", "1.5"]),
        ({"policy": "trpo"}, {}, ["trainer.loss.policy", "'trpo'"]),
        ({"kl": "k3", "kl_coef": 0.1}, {"skip_zero_advantage": True}, ["skip_zero_advantage", "kl k3"]),
        ({"policy": "rewards:mine"}, {"skip_zero_advantage": True}, ["skip_zero_advantage", "rewards:mine"]),
        ({"dual_clip": 0.5}, {}, ["trainer.loss.dual_clip"]),
        ({}, {"rollout": {"n": 1}}, ["rollout.n is 1", "trainer.loss.advantage is grpo", "reinforce_plus_plus"]),
        ({"advantage": "rloo"}, {"rollout": {"n": 1}}, ["rollout.n is 1", "trainer.loss.advantage is rloo"]),
        (
            {"advantage": "my:own"},
            {"rollout": {"n": 1, "filter": {"zero_variance": True}}},
            ["rollout.n is 1", "rollout.filter.zero_variance is true"],
        ),
    ],
)
def test_combinations_that_cannot_work(loss, sections, words):
    with pytest.raises(ConfigError) as caught:
        validate(tree(loss, **sections))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"policy": "gspo", "aggregation": "sequence_mean", "dual_clip": 3.0},
        {"policy": "reinforce", "importance": {"level": "token"}},
        {"proximal": "recompute", "importance": {"level": "sequence", "mode": "plain"}},
        {"policy": "my_losses:mine", "advantage": "my_losses:yours"},
        {"kl": "k2", "kl_coef": 0.01},
        {"policy": "dppo", "divergence": "kl", "divergence_bound": 0.1, "proximal": "recompute"},
        {"policy": "ipo", "divergence_bound": 0.1},
        {"policy": "my_losses:mine", "divergence_bound": 0.1, "divergence": "kl"},
        {"policy": "cispo", "clip_low": 1.0},
        {"rejection": {"rule": "k3", "bound": 0.001}},
        {"rejection": {"rule": "geometric_mean"}, "importance": {"level": "token"}, "proximal": "recompute"},
        {"rejection": {"rule": "second_moment"}, "proximal": "recompute"},
    ],
)
def test_combinations_that_can(loss):
    validate(tree(loss))


@pytest.mark.parametrize("advantage", ["reinforce_plus_plus", "my:own"])
def test_one_response_to_each_prompt_is_enough_for_some_estimators(advantage):
    assert validate(tree({"advantage": advantage}, rollout={"n": 1})).rollout.n == 1


def test_the_bound_of_a_rejection_has_a_default_for_each_rule():
    def limit(**rejection):
        return validate(tree({"rejection": rejection, "proximal": "recompute"})).trainer.loss.rejection.limit

    assert (limit(rule="k3"), limit(rule="second_moment"), limit(rule="k3", bound=0.3)) == (0.01, 0.04, 0.3)
