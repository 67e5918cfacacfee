"""Policy losses against plain NumPy."""

import numpy as np
import pytest
import torch

from async_rl.trainer.losses import clipped_policy_loss

T = 40


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    behaviour = -rng.random(T).astype(np.float32)
    current = (behaviour + rng.normal(0, 0.6, T)).astype(np.float32)
    advantages = rng.normal(size=T).astype(np.float32)
    return current, behaviour, advantages, rng.random(T) < 0.7


def test_clipped_policy_loss_matches_numpy_with_asymmetric_clip():
    current, behaviour, advantages, mask = arrays()
    loss, clipped = clipped_policy_loss(
        *map(torch.from_numpy, (current, behaviour, advantages, mask)), clip_low=0.2, clip_high=0.3
    )
    ratio = np.exp(current - behaviour)
    plain, cut = ratio * advantages, np.clip(ratio, 0.8, 1.3) * advantages
    assert float(loss) == pytest.approx(-np.minimum(plain, cut)[mask].sum(), rel=1e-5)
    stopped = mask & (((advantages > 0) & (ratio > 1.3)) | ((advantages < 0) & (ratio < 0.8)))
    assert clipped.numpy().tolist() == stopped.tolist()
    assert 0 < stopped.sum() < mask.sum()


def test_clipping_stops_the_gradient_exactly_where_it_says():
    current, behaviour, advantages, mask = map(torch.from_numpy, arrays())
    current.requires_grad_()
    loss, clipped = clipped_policy_loss(current, behaviour, advantages, mask, clip_low=0.2, clip_high=0.2)
    loss.backward()
    assert (current.grad[clipped] == 0).all()
    assert (current.grad[~mask] == 0).all()
    assert (current.grad[mask & ~clipped] != 0).all()


def test_masked_positions_may_hold_anything():
    current, behaviour, advantages, mask = map(torch.from_numpy, arrays())
    clean = clipped_policy_loss(current, behaviour, advantages, mask, clip_low=0.2, clip_high=0.2)[0]
    behaviour[~mask] = float("nan")
    current = current.clone().requires_grad_()
    loss, _ = clipped_policy_loss(current, behaviour, advantages, mask, clip_low=0.2, clip_high=0.2)
    loss.backward()
    assert loss == clean
    assert torch.isfinite(current.grad).all()
