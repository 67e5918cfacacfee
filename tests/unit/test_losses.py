"""Losses and metric sums against plain NumPy."""

import numpy as np
import pytest
import torch

from async_rl.trainer.losses import PolicySums, clipped_policy_loss, policy_sums, token_logprobs
from async_rl.types import RESUME_POSITIONS

T, V = 40, 11


def reference_logprobs(logits, targets, temperature):
    scaled = logits.astype(np.float64) / temperature
    logs = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    return logs[np.arange(len(targets)), targets], -(np.exp(logs) * logs).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_token_logprobs_and_entropy_are_of_logits_over_temperature(temperature):
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(T, V)).astype(np.float32) * 3, rng.integers(0, V, T)
    expected, expected_entropy = reference_logprobs(logits, targets, temperature)
    logprobs, entropy = token_logprobs(torch.from_numpy(logits), torch.from_numpy(targets), temperature)
    assert logprobs.numpy() == pytest.approx(expected, abs=1e-5)
    assert entropy.numpy() == pytest.approx(expected_entropy, abs=1e-5)


def test_token_logprobs_gradient_is_that_of_log_softmax():
    torch.manual_seed(0)
    logits = torch.randn(T, V, requires_grad=True)
    targets, weights = torch.randint(0, V, (T,)), torch.randn(T)
    (token_logprobs(logits, targets, 0.7)[0] * weights).sum().backward()
    ours, logits.grad = logits.grad, None
    expected = (logits / 0.7).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours, logits.grad, rtol=1e-5, atol=1e-6)


def test_token_logprobs_of_bfloat16_logits_are_computed_in_float32():
    logits = torch.randn(T, V).bfloat16()
    targets = torch.randint(0, V, (T,))
    logprobs, _ = token_logprobs(logits, targets)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, token_logprobs(logits.float(), targets)[0])


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


def sums_of(current, behaviour, advantages, mask, staleness, stalenesses=4, resume_position=None):
    if resume_position is None:
        resume_position = np.arange(len(mask)) % len(RESUME_POSITIONS)
    tensors = [torch.from_numpy(a) for a in (current, behaviour, advantages, mask)]
    loss, clipped = clipped_policy_loss(*tensors, clip_low=0.2, clip_high=0.2)
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
