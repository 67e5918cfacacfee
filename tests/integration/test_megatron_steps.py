"""Updates of a real trainer on the CPU do not depend on how they are computed, nor on stale tokens."""

from dataclasses import replace

import numpy as np
import pytest

from async_rl.trainer.packing import split_over_ranks
from tests.support.groups import with_trajectories
from tests.support.one_rank import (
    Opened,
    assert_close,
    assert_same_agreement,
    make_groups,
    parameters,
    sequences,
    step,
    train_once,
)
from tests.support.ranks import run_config

pytestmark = pytest.mark.megatron


def test_exact_views_whose_routing_is_that_of_the_whole_make_the_update_of_the_whole(ranks, models):
    """Each token is trained once, in its own context, and the cost of the prefixes is counted."""
    groups = make_groups()
    r3, exact = {"trainer__router_replay": "R3"}, {"async_training__partial_rollout__routing": "exact"}
    own = [
        with_trajectories(
            group,
            lambda t: replace(
                t,
                segments=tuple(
                    replace(s, routed_experts=t.routed_experts[: len(t.prompt_ids) + s.stop - 1])
                    for s in t.segments[:-1]
                )
                + t.segments[-1:],
            ),
        )
        for group in groups
    ]
    whole = ranks.call(train_once, models / "moe", groups, r3)
    split = ranks.call(train_once, models / "moe", own, r3 | exact)
    assert_close(split[1], whole[1], rtol=1e-4, atol=1e-7)
    assert_same_agreement(split[0].agreement, whole[0].agreement)
    first_segments = sum(len(t.prompt_ids) + t.segments[0].stop - 1 for g in groups for t in g.trajectories)
    assert (whole[0].extra_positions, split[0].extra_positions) == (0, first_segments)
    # Another routing for the first segments changes what is computed for them, and for no other.
    changed = [
        with_trajectories(
            group,
            lambda t: replace(
                t,
                segments=(
                    replace(t.segments[0], routed_experts=t.segments[0].routed_experts[::-1].copy()),
                    *t.segments[1:],
                ),
            ),
        )
        for group in own
    ]
    other = ranks.call(train_once, models / "moe", changed, r3 | exact)[0].agreement_by_resume_position
    same = split[0].agreement_by_resume_position
    assert abs(other["before"].kl - same["before"].kl) > 1e-3
    for position in ("first", "after"):
        assert_same_agreement(other[position], same[position])


@pytest.mark.parametrize("mode", ["R3", "R2", "off"])
def test_padding_of_microbatches_changes_no_update(ranks, models, mode):
    settings = {"trainer__router_replay": mode, "trainer__tokens_per_microbatch": 60}
    plain = ranks.call(train_once, models / "moe", make_groups(), settings)
    padded = ranks.call(train_once, models / "moe", make_groups(), settings | {"trainer__microbatch_multiple": 64})
    assert_close(padded[1], plain[1], rtol=1e-4, atol=1e-7)
    assert_same_agreement(padded[0].agreement, plain[0].agreement)
    assert padded[0].router_fallback_rows == plain[0].router_fallback_rows == 0


def test_the_update_does_not_depend_on_microbatches(ranks, models):
    groups = make_groups()
    one = ranks.call(train_once, models / "moe", groups, {"trainer__router_replay": "R3"})
    many = ranks.call(
        train_once,
        models / "moe",
        groups,
        {"trainer__router_replay": "R3", "trainer__tokens_per_microbatch": 40},
    )
    assert (one[0].microbatches, many[0].microbatches > 3) == (1, True)
    assert_close(many[1], one[1], rtol=1e-4, atol=1e-7)
    for field in ("loss", "ppo_kl_k3", "entropy", "clip_fraction", "effective_sample_size_ratio", "grad_norm"):
        assert getattr(many[0], field) == pytest.approx(getattr(one[0], field), rel=1e-4, abs=1e-6), field


def with_equal_rewards(groups):
    return [replace(g, rollouts=tuple(replace(rollout, reward=1.0) for rollout in g.rollouts)) for g in groups]


@pytest.mark.parametrize("policy", ["ppo", "gspo", "cispo"])
def test_samples_without_an_advantage_are_left_out_and_the_update_stays(ranks, models, policy):
    groups = make_groups()
    groups = groups[:1] + with_equal_rewards(groups[1:2]) + groups[2:]
    settings = {"trainer__router_replay": "R3", "trainer__loss__policy": policy, "trainer__tokens_per_microbatch": 60}
    whole = ranks.call(train_once, models / "moe", groups, settings)
    fewer = ranks.call(train_once, models / "moe", groups, settings | {"trainer__skip_zero_advantage": True})
    assert fewer[3] < whole[3], "routers must run in fewer microbatches"
    assert_close(fewer[1], whole[1], rtol=1e-6, atol=1e-7)
    assert_close(fewer[2], whole[2], rtol=1e-6, atol=1e-6)
    assert fewer[0].loss == pytest.approx(whole[0].loss, rel=1e-6)
    tokens = sum(int(t.sampled.sum()) for t in groups[1].trajectories)
    assert fewer[0].agreement.tokens == whole[0].agreement.tokens - tokens
    assert fewer[0].tokens_masked == whole[0].tokens_masked | {"zero_advantage": tokens}


def test_a_step_without_any_advantage_computes_nothing_and_updates_as_ever(ranks, models):
    groups = with_equal_rewards(make_groups())
    settings = {"trainer__router_replay": "R3", "trainer__optimizer__weight_decay": 0.1}
    whole = ranks.call(train_once, models / "moe", groups, settings)
    fewer = ranks.call(train_once, models / "moe", groups, settings | {"trainer__skip_zero_advantage": True})
    assert (fewer[3], fewer[0].microbatches, fewer[0].agreement.tokens) == (0, 0, 0)
    assert fewer[0].skipped == whole[0].skipped == {}
    assert_close(fewer[2], whole[2], rtol=0, atol=0)


def loads_in_a_step(path):
    """Return how often the reference's weights are loaded in a training step of two updates, and a report of each."""
    from types import SimpleNamespace

    from async_rl.trainer.worker import TrainerWorker

    overrides = {"trainer__loss__kl": "k3", "trainer__loss__kl_coef": 0.1, "trainer__tokens_per_microbatch": 40}
    with Opened(path, **overrides) as (trainer, _):
        worker = TrainerWorker(trainer._config, 0, "127.0.0.1")
        worker._trainer, worker._fetcher = trainer, SimpleNamespace(groups=list)
        loaded, loads = trainer._reference.loaded, []
        trainer._reference.loaded = lambda: loads.append(1) or loaded()
        reports = worker.train_step([make_groups(3), make_groups(2, seed=9, epoch=1)], 4, 2)
        return len(loads), [report.skipped for report in reports], trainer._config.streams


def test_the_references_weights_are_loaded_once_in_a_training_step(ranks, models):
    assert ranks.call(loads_in_a_step, models / "moe") == (1, [{}, {}], False)


def two_steps(trainer, shares):
    """Make two updates, the second with groups for the first rank alone: the others must still take part."""
    place = trainer._place.dp
    return step(trainer, shares[place]), step(trainer, shares[0] if place == 0 else []), parameters(trainer)


def one_rank_two_steps(trainer, first, second):
    return step(trainer, first), step(trainer, second), parameters(trainer)


def test_two_data_parallel_ranks_make_the_update_of_one(ranks, models):
    groups = make_groups()
    by_rank = split_over_ranks([group.num_tokens for group in groups], 2)
    shares = [[groups[index] for index in indices] for indices in by_rank]
    alone, both = (run_config(models / "moe", trainer__router_replay="R3", trainer__parallel__dp=dp) for dp in (1, 2))
    (expected,) = ranks.run(one_rank_two_steps, alone, groups, shares[0])
    by_rank = ranks.run(two_steps, both, shares)
    for first, second, weights in by_rank:
        assert_close(weights, expected[2], rtol=1e-5, atol=1e-6)
        for got, wanted in ((first, expected[0]), (second, expected[1])):
            for field in ("tokens_masked", "groups", "trajectories"):
                assert getattr(got, field) == getattr(wanted, field), field
            for field in ("loss", "grad_norm", "entropy"):
                assert getattr(got, field) == pytest.approx(getattr(wanted, field), rel=1e-4, abs=1e-6), field
            assert list(got.agreement_by_staleness) == list(wanted.agreement_by_staleness)
            assert_same_agreement(got.agreement, wanted.agreement)
            for age, agreement in got.agreement_by_staleness.items():
                assert_same_agreement(agreement, wanted.agreement_by_staleness[age])
    first, second = (weights["embedding.word_embeddings.weight"] for _, _, weights in by_rank)
    assert (first == second).all()


def step_of_rank(trainer, shares):
    return step(trainer, shares[trainer._place.dp], oldest_version=3), parameters(trainer)


@pytest.mark.parametrize("aggregation", ["token_mean", pytest.param("sequence_mean", marks=pytest.mark.slow)])
def test_a_rank_whose_tokens_are_all_too_old_leaves_the_update_to_the_others(ranks, models, aggregation):
    """It takes part in every collective, and neither its tokens nor its sequences are divided by."""
    fresh, stale = make_groups(2), make_groups(2, version=2, seed=9, epoch=1)
    settings = {"trainer__router_replay": "R3", "trainer__loss__aggregation": aggregation}
    alone, both = (run_config(models / "moe", **settings, trainer__parallel__dp=dp) for dp in (1, 2))
    ((expected, wanted),) = ranks.run(step_of_rank, alone, [fresh])
    for report, weights in ranks.run(step_of_rank, both, [fresh, stale]):
        assert_close(weights, wanted, rtol=1e-5, atol=1e-6)
        for field in ("loss", "grad_norm", "entropy"):
            assert getattr(report, field) == pytest.approx(getattr(expected, field), rel=1e-4, abs=1e-6), field
        assert report.agreement.tokens == expected.agreement.tokens
        assert report.tokens_masked["stale"] == expected.tokens_masked["stale"] + sum(
            len(t.response_ids) for group in stale for t in group.trajectories
        )


def mask_everything_then_poison(path):
    import torch

    groups = make_groups()
    with Opened(path, trainer__router_replay="R3") as (trainer, _):
        before = parameters(trainer)
        masked = step(trainer, groups, oldest_version=5)
        after_masked = parameters(trainer)
        norm = dict(trainer._chunks[0].module.named_parameters())["decoder.final_layernorm.weight"]
        with torch.no_grad():
            kept = norm.clone()
            norm[0] = float("inf")
        poisoned = step(trainer, groups)
        with torch.no_grad():
            norm.copy_(kept)
        after_poison = parameters(trainer)
        healthy = step(trainer, groups)
        return before, masked, after_masked, poisoned, after_poison, healthy, parameters(trainer)


def test_invariant_4_an_all_stale_batch_and_a_non_finite_gradient_are_skipped_and_training_goes_on(ranks, models):
    before, masked, after_masked, poisoned, after_poison, healthy, after = ranks.call(
        mask_everything_then_poison, models / "moe"
    )
    responses = sum(len(t.response_ids) for g in make_groups() for t in g.trajectories)
    assert (masked.skipped, masked.agreement.tokens) == ({"no_tokens": 1}, 0)
    assert masked.tokens_masked == {"stale": responses, "not_sampled": 0}
    assert (masked.loss, masked.agreement.kl, masked.agreement_by_staleness) == (0.0, 0.0, {})
    assert poisoned.skipped == {"non_finite": 1}
    assert not np.isfinite(poisoned.grad_norm)
    for name, values in before.items():
        assert (after_masked[name] == values).all()
        assert (after_poison[name] == values).all()
    assert healthy.skipped == {}
    assert np.isfinite(healthy.grad_norm)
    assert any((after[name] != values).any() for name, values in before.items())


def change_stale_tokens(path):
    """Return the gradients of a batch, and those with other behaviour log-probs on its stale tokens."""
    results = []
    for shift in (0.0, 3.0):
        groups = [
            with_trajectories(
                group, lambda t, shift=shift: replace(t, logprobs=t.logprobs - np.float32(shift) * (t.versions < 4))
            )
            for group in make_groups()
        ]
        results.append(train_once(path, groups, {"trainer__router_replay": "R3"}, oldest_version=3)[:2])
    return results


def test_invariant_4_stale_tokens_contribute_no_gradient_and_no_metric(ranks, models):
    (report, gradients), (shifted_report, shifted) = ranks.call(change_stale_tokens, models / "moe")
    assert report.tokens_masked["stale"] > 0
    assert set(report.agreement_by_staleness) == {0}
    assert_close(shifted, gradients, rtol=0, atol=0)
    assert replace(shifted_report, seconds={}) == replace(report, seconds={})


def supervised(path):
    ids = sequences()
    batch = [(x, np.arange(len(x)) >= 3) for x in ids]
    with Opened(path, trainer__optimizer__warmup_steps=2) as (trainer, _):
        logprobs = trainer.logprobs(ids)
        losses = [trainer.supervised_step(batch) for _ in range(8)]
    return losses, -np.concatenate([x[2:] for x in logprobs]).mean()


@pytest.mark.parametrize("name", ["moe", "dense"])
def test_supervised_steps_report_the_cross_entropy_of_the_masked_tokens_and_learn(ranks, models, name):
    losses, expected = ranks.call(supervised, models / name)
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < 0.8 * losses[0]
