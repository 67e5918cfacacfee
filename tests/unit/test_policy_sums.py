"""The sums behind the policy's metrics against plain NumPy."""

import numpy as np
import pytest
import torch

from async_rl.config.training import LossSection
from async_rl.metrics.records import RESUME_POSITIONS
from async_rl.trainer.losses import Tokens, load_policy, sequence_sums
from async_rl.trainer.policy_sums import PolicySums, policy_sums

T = 40


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    behaviour = -rng.random(T).astype(np.float32)
    current = (behaviour + rng.normal(0, 0.6, T)).astype(np.float32)
    advantages = rng.normal(size=T).astype(np.float32)
    return current, behaviour, advantages, rng.random(T) < 0.7


def sums_of(current, behaviour, advantages, mask, staleness, resume_position=None, rejected=None, engine=None):
    if resume_position is None:
        resume_position = np.arange(len(mask)) % len(RESUME_POSITIONS)
    engine = np.zeros(len(mask), dtype=np.int64) if engine is None else engine
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
        rejected=torch.zeros(len(mask), dtype=torch.bool) if rejected is None else torch.from_numpy(rejected),
        staleness=torch.from_numpy(staleness),
        resume_position=torch.from_numpy(resume_position),
        engine=torch.from_numpy(engine),
        mask=tensors[3],
        empty=PolicySums.zero(4, engines=("vllm", "sglang")),
    )


def test_metric_sums_match_numpy():
    current, behaviour, advantages, mask = arrays()
    staleness = np.random.default_rng(1).integers(0, 3, T)
    rejected = np.arange(T) % 3 == 0
    engine = np.random.default_rng(2).integers(0, 3, T)
    sums = sums_of(current, behaviour, advantages, mask, staleness, rejected=rejected, engine=engine)
    x = (current.astype(np.float64) - behaviour)[mask]
    s = staleness[mask]
    assert sums["tokens"] == mask.sum()
    assert sums["entropy"] == mask.sum()
    assert sums["rejected"] == (mask & rejected).sum() > 0
    assert sums["kl"] == pytest.approx(-x.sum())
    assert sums["k3"] == pytest.approx((np.exp(x) - 1 - x).sum())
    assert sums["extreme"] == (np.abs(x) > np.log(2)).sum() > 0
    assert sums["ratio"] == pytest.approx(np.exp(x).sum())
    assert sums["ratio_squared"] == pytest.approx(np.exp(2 * x).sum())
    assert sums["abs_diff"] == pytest.approx(np.abs(x).sum())
    assert sums["squared_diff"] == pytest.approx((x**2).sum())
    sharpness = current[mask].astype(np.float64) + 1
    assert sums["sharpness_squared"] == pytest.approx((sharpness**2).sum())
    assert sums["diff_sharpness"] == pytest.approx((-x * sharpness).sum())
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
    e = engine[mask]
    assert sums.by_engine("tokens") == np.bincount(e, minlength=3).tolist()
    assert sums.by_engine("kl") == pytest.approx(np.bincount(e, weights=-x, minlength=3))
    assert sums.max_by_engine() == pytest.approx([np.abs(x[e == which]).max(initial=0.0) for which in range(3)])


def test_sums_of_two_halves_add_up_to_the_whole():
    current, behaviour, advantages, mask = arrays()
    staleness = np.random.default_rng(1).integers(0, 4, T)
    whole = sums_of(current, behaviour, advantages, mask, staleness)
    total = whole.empty()
    position = np.arange(T) % len(RESUME_POSITIONS)
    for part in (slice(0, 13), slice(13, T)):
        arguments = [array[part] for array in (current, behaviour, advantages, mask, staleness)]
        total.add(sums_of(*arguments, resume_position=position[part]))
    for name in ("loss", "sums", "max_abs_diff", "replayed_choices"):
        torch.testing.assert_close(getattr(total, name), getattr(whole, name), rtol=1e-6, atol=1e-6)


def on_policy(behaviour, logits, sampled):
    """Return the sums of tokens of staleness 0 whose current log-probs come from logits float64[T, V]."""
    rows = torch.from_numpy(logits).log_softmax(-1)
    size = len(sampled)
    return policy_sums(
        loss=torch.zeros(()),
        current=rows[torch.arange(size), torch.from_numpy(sampled)],
        behaviour=torch.from_numpy(behaviour),
        entropy=-(rows.exp() * rows).sum(-1),
        clipped=torch.zeros(size),
        rejected=torch.zeros(len(sampled), dtype=torch.bool),
        staleness=torch.zeros(size, dtype=torch.long),
        resume_position=torch.zeros(size, dtype=torch.long),
        engine=torch.zeros(size, dtype=torch.long),
        mask=torch.ones(size, dtype=torch.bool),
        empty=PolicySums.zero(2),
    )


def sampled_tokens(logits, rng):
    return (logits + rng.gumbel(size=logits.shape)).argmax(-1)


def logprobs_of(logits, sampled):
    return torch.from_numpy(logits).log_softmax(-1).numpy()[np.arange(len(sampled)), sampled]


@pytest.mark.parametrize("temperature", [0.8, 0.95, 1.05, 1.25])
def test_another_temperature_behind_the_behaviour_is_found(temperature):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4000, 50))
    sampled = sampled_tokens(logits / temperature, rng)
    ratio, explained = on_policy(logprobs_of(logits / temperature, sampled), logits, sampled).on_policy_temperature()
    assert ratio == pytest.approx(temperature, rel=0.05)
    assert explained > 0.9


def test_no_temperature_explains_other_logits():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4000, 50))
    other = logits + rng.normal(0, 0.3, logits.shape)
    sampled = sampled_tokens(other, rng)
    _, explained = on_policy(logprobs_of(other, sampled), logits, sampled).on_policy_temperature()
    assert explained < 0.1


def test_equal_logprobs_are_of_one_temperature_and_no_tokens_of_none():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (100, 50))
    sampled = sampled_tokens(logits, rng)
    assert on_policy(logprobs_of(logits, sampled), logits, sampled).on_policy_temperature() == (1.0, 0.0)
    assert PolicySums.zero(1).on_policy_temperature() is None
    # Ten times as sharp and more: no ratio below a tenth or negative.
    far = on_policy(-40 * logprobs_of(logits, sampled), logits, sampled).on_policy_temperature()
    assert 0 < far[0] <= 10


def test_a_fully_masked_microbatch_adds_zeros():
    current, behaviour, advantages, _ = arrays()
    nothing = sums_of(current, behaviour, advantages, np.zeros(T, bool), np.zeros(T, np.int64))
    assert not nothing.sums.any()
    assert not nothing.max_abs_diff.any()
    assert nothing.loss == 0
