"""Group-relative advantages against their definition."""

import numpy as np
import pytest

from async_rl.trainer.advantages import group_advantages


def test_mean_is_subtracted_and_std_divided():
    rewards = np.array([0.0, 1.0, 1.0, 0.0], np.float32)
    assert group_advantages(rewards, normalize_by_std=False) == pytest.approx([-0.5, 0.5, 0.5, -0.5])
    assert group_advantages(rewards, normalize_by_std=True) == pytest.approx([-1, 1, 1, -1], rel=1e-5)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, -7.7])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_equal_rewards_give_exactly_zero(reward, n):
    # 0.1 and 1/3 are not exact in float32: a naive mean leaves rounding that the division would blow up.
    advantages = group_advantages(np.full(n, reward, np.float32), normalize_by_std=True)
    assert (advantages == 0).all()
    assert advantages.dtype == np.float32


@pytest.mark.parametrize("normalize", [False, True])
def test_advantages_of_a_group_sum_to_zero(normalize):
    rewards = np.random.default_rng(0).random(8).astype(np.float32)
    assert group_advantages(rewards, normalize_by_std=normalize).sum() == pytest.approx(0, abs=1e-5)


def test_advantages_do_not_depend_on_offset_and_with_std_not_on_scale():
    rewards = np.random.default_rng(1).random(8).astype(np.float32)
    assert group_advantages(rewards * 4 + 2, normalize_by_std=True) == pytest.approx(
        group_advantages(rewards, normalize_by_std=True), rel=1e-3
    )
