"""The sums behind the policy's metrics against plain NumPy."""

import numpy as np
import pytest
import torch

from async_rl.config import LossSection
from async_rl.trainer.losses import Tokens, load_policy, sequence_sums
from async_rl.trainer.policy_sums import PolicySums, policy_sums
from async_rl.types import RESUME_POSITIONS

T = 40


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    behaviour = -rng.random(T).astype(np.float32)
    current = (behaviour + rng.normal(0, 0.6, T)).astype(np.float32)
    advantages = rng.normal(size=T).astype(np.float32)
    return current, behaviour, advantages, rng.random(T) < 0.7


def sums_of(current, behaviour, advantages, mask, staleness, stalenesses=4, resume_position=None):
    if resume_position is None:
        resume_position = np.arange(len(mask)) % len(RESUME_POSITIONS)
    tensors = [torch.from_numpy(a) for a in (current, behaviour, advantages, mask)]
    settings = LossSection(clip_low=0.2, clip_high=0.2)
    tokens = Tokens(
        current=tensors[0],
        behaviour=tensors[1],
        proximal=tensors[1],
        advantages=tensors[2],
        mask=tensors[3],
        staleness=torch.from_numpy(staleness),
        sequence_sum=sequence_sums(torch.zeros(len(mask), dtype=torch.long), tensors[3]),
    )
    values, clipped = load_policy(settings)(tokens, settings)
    loss = values.sum()
    return policy_sums(
        loss=loss,
        current=tensors[0],
        behaviour=tensors[1],
        entropy=torch.ones(len(mask)),
        clipped=clipped,
        staleness=torch.from_numpy(staleness),
        resume_position=torch.from_numpy(resume_position),
        mask=tensors[3],
        stalenesses=stalenesses,
    )


def test_metric_sums_match_numpy():
    current, behaviour, advantages, mask = arrays()
    staleness = np.random.default_rng(1).integers(0, 3, T)
    sums = sums_of(current, behaviour, advantages, mask, staleness)
    x = (current.astype(np.float64) - behaviour)[mask]
    s = staleness[mask]
    assert sums["tokens"] == mask.sum()
    assert sums["entropy"] == mask.sum()
    assert sums["kl"] == pytest.approx(-x.sum())
    assert sums["k3"] == pytest.approx((np.exp(x) - 1 - x).sum())
    assert sums["extreme"] == (np.abs(x) > np.log(2)).sum() > 0
    assert sums["ratio"] == pytest.approx(np.exp(x).sum())
    assert sums["ratio_squared"] == pytest.approx(np.exp(2 * x).sum())
    assert sums["abs_diff"] == pytest.approx(np.abs(x).sum())
    assert sums.by_staleness("tokens") == np.bincount(s, minlength=4).tolist()
    assert sums.by_staleness("kl") == pytest.approx(np.bincount(s, weights=-x, minlength=4))
    assert sums.by_staleness("abs_diff") == pytest.approx(np.bincount(s, weights=np.abs(x), minlength=4))
    largest = [np.abs(x[s == age]).max(initial=0.0) for age in range(4)]
    assert sums.max_by_staleness() == pytest.approx(largest)
    position = (np.arange(T) % len(RESUME_POSITIONS))[mask]
    assert sums.by_resume_position("tokens") == np.bincount(position, minlength=4).tolist()
    assert sums.by_resume_position("kl") == pytest.approx(np.bincount(position, weights=-x, minlength=4))
    largest = [np.abs(x[position == p]).max(initial=0.0) for p in range(4)]
    assert sums.max_by_resume_position() == pytest.approx(largest)


def test_sums_of_two_halves_add_up_to_the_whole():
    current, behaviour, advantages, mask = arrays()
    staleness = np.random.default_rng(1).integers(0, 4, T)
    whole = sums_of(current, behaviour, advantages, mask, staleness)
    total = PolicySums.zero(4)
    position = np.arange(T) % len(RESUME_POSITIONS)
    for part in (slice(0, 13), slice(13, T)):
        arguments = [array[part] for array in (current, behaviour, advantages, mask, staleness)]
        total.add(sums_of(*arguments, resume_position=position[part]))
    for name in ("loss", "sums", "max_abs_diff"):
        torch.testing.assert_close(getattr(total, name), getattr(whole, name), rtol=1e-6, atol=1e-6)


def test_a_fully_masked_microbatch_adds_zeros():
    current, behaviour, advantages, _ = arrays()
    nothing = sums_of(current, behaviour, advantages, np.zeros(T, bool), np.zeros(T, np.int64))
    assert not nothing.sums.any()
    assert not nothing.max_abs_diff.any()
    assert nothing.loss == 0
