"""Advantages against plain NumPy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from async_rl.config.training import LossSection
from async_rl.errors import TrainerError
from async_rl.trainer.advantages import (
    batch_normalized,
    batch_sums,
    group_advantages,
    load_advantages,
)

REWARDS = arrays(np.float32, st.integers(2, 8), elements=st.floats(-4, 4, width=32))


def of(name, rewards, **settings):
    return group_advantages(
        "g", np.asarray(rewards, np.float32), load_advantages(LossSection(advantage=name, **settings))
    )


@given(REWARDS)
def test_grpo_centres_and_scales_by_the_groups_deviation(rewards):
    exact = rewards.astype(np.float64)
    centred = exact - exact.mean()
    assert of("grpo", rewards, normalize_by_std=False) == pytest.approx(centred, abs=1e-5)
    if (exact == exact[0]).all():
        assert (of("grpo", rewards) == 0).all()
    elif exact.std() > 1e-3:
        assert of("grpo", rewards) == pytest.approx(centred / exact.std(), rel=2e-3, abs=1e-4)


@given(REWARDS)
def test_rloo_compares_each_with_the_mean_of_the_others(rewards):
    expected = [rewards[i] - np.delete(rewards.astype(np.float64), i).mean() for i in range(len(rewards))]
    assert of("rloo", rewards) == pytest.approx(expected, abs=1e-5)


@given(st.lists(REWARDS, min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_reinforce_plus_plus_normalizes_over_the_tokens_of_the_whole_batch(groups, seed):
    """Two ranks share the batch: what they add up is all that they know of one another."""
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(1, 9, len(rewards)).tolist() for rewards in groups]
    advantages = [of("reinforce_plus_plus", rewards).tolist() for rewards in groups]
    sums = [batch_sums(a, n) for a, n in zip(advantages, lengths, strict=True)]
    total = tuple(np.sum(sums, axis=0))
    found = np.concatenate([batch_normalized(a, total) for a in advantages])
    tokens = np.repeat(found, np.concatenate(lengths))
    every = np.repeat(np.concatenate(advantages), np.concatenate(lengths))
    if every.std() > 1e-3:
        assert tokens == pytest.approx((every - every.mean()) / every.std(), rel=1e-4, abs=1e-5)
    elif every.std() < 1e-7:
        assert not found.any()


@given(REWARDS)
def test_reinforce_plus_plus_takes_the_groups_mean_as_baseline_and_leaves_the_scale_to_the_batch(rewards):
    exact = rewards.astype(np.float64)
    assert of("reinforce_plus_plus", rewards) == pytest.approx(exact - exact.mean(), abs=1e-5)


def test_groups_of_one_response_are_compared_over_the_batch_with_reinforce_plus_plus():
    rewards, lengths = [[1.0], [0.0], [1.0], [0.0]], [1, 1, 3, 3]
    advantages = [float(of("reinforce_plus_plus", each)[0]) for each in rewards]
    assert advantages == [1.0, 0.0, 1.0, 0.0]
    assert batch_normalized(advantages, batch_sums(advantages, lengths)) == pytest.approx([1.0, -1.0, 1.0, -1.0])


def test_a_batch_without_a_token_that_counts_has_no_advantages():
    assert batch_normalized([1.0, -1.0], batch_sums([1.0, -1.0], [0, 0])) == [0.0, 0.0]


def test_only_reinforce_plus_plus_has_to_see_the_batch():
    names = ["grpo", "rloo", "reinforce_plus_plus", f"{__name__}:ranks"]
    assert [LossSection(advantage=name).needs_batch_statistics for name in names] == [False, False, True, False]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce_plus_plus"])
def test_a_reward_that_is_no_number_names_the_group(name, value):
    with pytest.raises(TrainerError, match=r"group g: rewards .* not all finite"):
        of(name, [0.0, value, 1.0])


def ranks(rewards):
    return rewards.argsort().argsort() - (len(rewards) - 1) / 2


def too_few(rewards):
    return rewards[1:]


def nothing(rewards):
    return rewards * np.nan


def words(rewards):
    return ["good", "bad"]


def ragged(rewards):
    return [[1.0], [1.0, 2.0]]


def test_a_users_own_estimator():
    assert of(f"{__name__}:ranks", [3.0, 1.0, 2.0]).tolist() == [1.0, -1.0, 0.0]


@pytest.mark.parametrize("name", ["too_few", "nothing", "words", "ragged"])
def test_a_users_estimator_that_returns_something_else_is_named(name):
    with pytest.raises(TrainerError, match=rf"trainer\.loss\.advantage .*{name}: returned"):
        of(f"{__name__}:{name}", [1.0, 2.0])
