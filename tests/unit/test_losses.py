"""Policy losses against plain NumPy in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given

from async_rl.config.training import ImportanceSection, LossSection
from async_rl.trainer.losses import MAX_LOG_RATIO, MIN_PROBABILITY, load_policy, policy_loss
from tests.support.loss_batches import FAST, NAMES, POLICIES, batches, ordinary_batch, ratio_of, small, tokens_of

MASKING = ("dppo", "ipo")
"""Policies that leave tokens out instead of clipping their ratio."""


def clip_by_hand(ratio, advantage, loss):
    """One token, case by case."""
    low, high = 1 - loss.clip_low, 1 + loss.clip_high
    if advantage > 0:
        return -advantage * min(ratio, high), ratio > high
    if advantage < 0:
        kept = max(ratio, low)
        if loss.dual_clip is not None and kept > loss.dual_clip:
            return -advantage * loss.dual_clip, True
        return -advantage * kept, ratio < low
    return 0.0, False


def divergence_by_hand(loss, before, after):
    """Of one token, whose log-probs are given."""
    p, q = np.exp(np.float64(before)), np.exp(np.float64(after))
    if loss.divergence == "tv":
        return abs(p - q)
    others, others_after = (max(-np.expm1(np.float64(x)), MIN_PROBABILITY) for x in (before, after))
    return p * (np.float64(before) - after) + others * np.log(others / others_after)


def mask_by_hand(loss, before, after, advantage):
    """Return whether a masking policy leaves out one token."""
    far = divergence_by_hand(loss, before, after) > loss.divergence_limit
    if loss.policy == "ipo":
        return far
    return far and ((advantage > 0 and after > before) or (advantage < 0 and after < before))


def by_hand(batch, loss):
    """(loss, clipped) of each token; sequence by sequence."""
    values, clipped = np.zeros(len(batch["mask"])), np.zeros(len(batch["mask"]), bool)
    for number in np.unique(batch["sequence"]):
        here = np.flatnonzero((batch["sequence"] == number) & batch["mask"])
        if not len(here):
            continue
        log_ratio = np.clip(batch["current"][here].astype(np.float64) - batch["proximal"][here], -20, 20)
        of_sequence = np.exp(log_ratio.sum() / len(here))
        for place, t in enumerate(here):
            ratio, advantage = np.exp(log_ratio[place]), float(batch["advantages"][t])
            if loss.policy == "ppo":
                values[t], clipped[t] = clip_by_hand(ratio, advantage, loss)
            elif loss.policy == "gspo":
                values[t], clipped[t] = clip_by_hand(of_sequence, advantage, loss)
            elif loss.policy == "cispo":
                weight = min(max(ratio, 1 - loss.clip_low), 1 + loss.clip_high)
                values[t], clipped[t] = -weight * advantage * batch["current"][t], weight != ratio
            elif loss.policy in MASKING:
                clipped[t] = mask_by_hand(loss, batch["proximal"][t], batch["current"][t], advantage)
                values[t] = 0.0 if clipped[t] else -ratio * advantage
            else:
                values[t] = -advantage * batch["current"][t]
    return values, clipped


def near_a_bound(batch, loss):
    """Where float32 may fall on the other side of a clip or bound than float64."""
    if loss.policy in MASKING:
        pairs = zip(batch["proximal"], batch["current"], strict=True)
        far = np.array([divergence_by_hand(loss, before, after) for before, after in pairs])
        return np.abs(far / loss.divergence_limit - 1) < 1e-4
    ratio = ratio_of(batch, "current", "proximal")
    if loss.policy == "gspo":
        for number in np.unique(batch["sequence"][batch["mask"]]):
            here = (batch["sequence"] == number) & batch["mask"]
            ratio[here] = np.exp(np.log(ratio[here]).mean())
    bounds = [1 - loss.clip_low, 1 + loss.clip_high, loss.dual_clip or np.inf]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.any([np.abs(ratio / bound - 1) < 1e-5 for bound in bounds], axis=0)


@pytest.mark.parametrize("loss", POLICIES, ids=NAMES)
@FAST
@given(batch=batches())
def test_a_policy_is_what_its_paper_says(loss, batch):
    tokens, _ = tokens_of(batch)
    found = load_policy(loss)(tokens, loss)
    values, clipped = by_hand(batch, loss)
    compared = ~near_a_bound(batch, loss) if loss.policy in MASKING else slice(None)  # these have a jump there
    assert found.loss.numpy()[compared] == pytest.approx(values[compared], rel=2e-4, abs=1e-4)
    assert (found.loss.numpy()[~batch["mask"]] == 0).all()
    sure = ~near_a_bound(batch, loss) & batch["mask"]
    assert found.clipped.numpy()[sure].tolist() == clipped[sure].tolist()
    assert not found.clipped.numpy()[~batch["mask"]].any()


@pytest.mark.parametrize("loss", POLICIES, ids=NAMES)
@FAST
@given(batch=batches())
def test_a_gradient_stops_where_it_is_clipped_and_nowhere_else(loss, batch):
    tokens, _ = tokens_of(batch, gradient=True)
    found = load_policy(loss)(tokens, loss)
    found.loss.sum().backward()
    gradient = tokens.current.grad.numpy()
    assert np.isfinite(gradient).all(), "NaN where the mask is off must not spread"
    assert (gradient[~batch["mask"]] == 0).all()
    if loss.policy in ("ppo", *MASKING):
        assert (gradient[found.clipped.numpy()] == 0).all()
        ratio = ratio_of(batch, "current", "proximal")
        free = batch["mask"] & ~found.clipped.numpy() & ~near_a_bound(batch, loss)
        inside = free & (np.abs(np.log(np.where(free, ratio, 1.0))) < MAX_LOG_RATIO - 1e-3)
        expected = -(ratio * batch["advantages"])
        assert gradient[inside] == pytest.approx(expected[inside], rel=1e-3, abs=1e-6)
    if loss.policy == "cispo":
        ratio = np.clip(ratio_of(batch, "current", "proximal"), 1 - loss.clip_low, 1 + loss.clip_high)
        expected = np.where(batch["mask"], -ratio * batch["advantages"], 0)
        assert gradient[batch["mask"]] == pytest.approx(expected[batch["mask"]], rel=1e-3, abs=1e-6)
    if loss.policy == "gspo":
        for number in np.unique(batch["sequence"]):
            here = (batch["sequence"] == number) & batch["mask"]
            if found.clipped.numpy()[here].all():  # a gradient comes from any token of the sequence that is not
                assert (gradient[here] == 0).all()
    if loss.policy == "reinforce":
        assert (gradient[batch["mask"]] == -batch["advantages"][batch["mask"]]).all()


DIFFERENTIABLE = {
    name: loss for name, loss in zip(NAMES, POLICIES, strict=True) if loss.policy in ("ppo", "gspo", *MASKING)
}


@pytest.mark.parametrize("kl", ["none", "k1", "k2", "k3"])
@pytest.mark.parametrize("loss", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_a_gradient_is_the_slope_of_the_loss(loss, kl):
    """Check gradients by central differences in float64, where no value is detached on purpose."""
    loss = loss.model_copy(update={"kl": kl, "kl_coef": 0.5})
    policy, step = load_policy(loss), 1e-6
    for seed in range(3):
        batch = ordinary_batch(seed)
        assert not near_a_bound(batch, loss)[batch["mask"]].any()

        def value(batch=batch):
            tokens, reference = tokens_of(batch)
            return float(policy_loss(tokens, loss, policy, reference).loss.sum())

        tokens, reference = tokens_of({name: array.copy() for name, array in batch.items()}, gradient=True)
        policy_loss(tokens, loss, policy, reference).loss.sum().backward()
        for t in range(len(batch["mask"])):
            here = batch["current"][t]
            batch["current"][t] = here + step
            above = value()
            batch["current"][t] = here - step
            below = value()
            batch["current"][t] = here
            assert float(tokens.current.grad[t]) == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("loss", POLICIES, ids=NAMES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_nothing_comes_of_tokens_that_do_not_count(loss, level):
    """None of the microbatch, and none of one of its sequences."""
    loss = loss.model_copy(
        update={"importance": ImportanceSection(level=level, mode="plain"), "kl": "k3", "kl_coef": 0.1}
    )
    for counting in (slice(0, 0), slice(0, 6)):
        batch = ordinary_batch(7, sequences=2)
        others = np.ones(12, bool)
        others[counting] = False
        batch["mask"][others] = False
        tokens, reference = tokens_of(batch, gradient=True)
        found = policy_loss(tokens, loss, load_policy(loss), reference)
        found.loss.sum().backward()
        for array in (found.loss.detach(), found.clipped, tokens.current.grad):
            assert not array.numpy()[~batch["mask"]].any()
        assert torch.isfinite(tokens.current.grad).all()


def test_gspo_gives_each_token_its_share_of_the_gradient_of_the_sequence():
    rng = np.random.default_rng(0)
    proximal = -rng.random(6).astype(np.float32)
    batch = {
        "behaviour": proximal,
        "proximal": proximal,
        "current": proximal + rng.normal(0, 0.05, 6).astype(np.float32),
        "reference": proximal,
        "advantages": np.repeat([1.0, -1.0], 3).astype(np.float32),
        "mask": np.array([1, 1, 1, 1, 1, 0], bool),
        "sequence": np.repeat([0, 1], 3),
        "staleness": np.zeros(6, int),
    }
    loss = LossSection(policy="gspo", clip_low=0.2, clip_high=0.2)
    tokens, _ = tokens_of(batch, gradient=True)
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2, 0])  # sequence_mean
    (load_policy(loss)(tokens, loss).loss * weights).sum().backward()
    for here, sign in ((slice(0, 3), 1.0), (slice(3, 5), -1.0)):
        ratio = np.exp((batch["current"][here] - batch["proximal"][here]).mean())
        expected = -sign * ratio / len(batch["current"][here])
        assert tokens.current.grad[here].tolist() == pytest.approx([expected] * len(batch["current"][here]), rel=1e-4)


def test_a_sequence_of_which_nothing_counts_leaves_the_gradient_finite():
    loss = LossSection(policy="gspo")
    tokens, _ = tokens_of(small(), gradient=True)
    load_policy(loss)(tokens, loss).loss.sum().backward()
    assert torch.isfinite(tokens.current.grad).all()
    assert tokens.current.grad[2:].tolist() == [0.0] * 4


def moves(loss, before, after, advantage):
    """Return whether the policy keeps a token whose probability has moved, and its gradient."""
    logs = np.log(np.array([[before], [after]], np.float32))
    batch = dict.fromkeys(("behaviour", "proximal", "reference"), logs[0]) | {
        "current": logs[1],
        "advantages": np.array([advantage], np.float32),
        "mask": np.ones(1, bool),
        "sequence": np.zeros(1, int),
        "staleness": np.zeros(1, int),
    }
    tokens, _ = tokens_of(batch, gradient=True)
    found = load_policy(loss)(tokens, loss)
    found.loss.sum().backward()
    assert bool(found.clipped) == (float(tokens.current.grad) == 0)
    return not bool(found.clipped)


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_dppo_judges_by_the_divergence_and_lets_a_token_come_back(divergence):
    loss = LossSection(policy="dppo", divergence=divergence)
    assert moves(loss, 1e-4, 1e-2, advantage=1.0), "a hundred times as likely, and still rare: PPO would clip it"
    assert not moves(loss, 0.6, 0.95, advantage=1.0), "half as likely again, and the distribution is another one"
    assert not moves(loss, 0.95, 0.6, advantage=-1.0)
    assert moves(loss, 0.6, 0.95, advantage=-1.0), "back to where it was"
    assert moves(loss, 0.95, 0.6, advantage=1.0)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_ipo_leaves_a_token_out_whichever_way_it_would_move(advantage):
    loss = LossSection(policy="ipo")
    assert moves(loss, 0.6, 0.89, advantage)
    assert not moves(loss, 0.6, 0.91, advantage)
    assert moves(loss, 0.6, 0.31, advantage)
    assert not moves(loss, 0.6, 0.29, advantage)


def test_the_bound_of_a_divergence_has_a_default_for_each_policy():
    assert LossSection(policy="ipo").divergence_limit == 0.3
    assert LossSection(policy="dppo").divergence_limit == 0.15
    assert LossSection(policy="dppo", divergence="kl").divergence_limit == 0.05
    assert LossSection(policy="dppo", divergence_bound=0.2).divergence_limit == 0.2
