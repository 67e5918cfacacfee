"""What is multiplied with a policy loss, and added to it: importance weights, the proximal policy, the KL penalty."""

import numpy as np
import pytest
from hypothesis import given

from async_rl.config.training import ImportanceSection, LossSection
from async_rl.trainer.losses import importance_weights, interpolated_proximal, kl_penalty, load_policy, policy_loss
from tests.support.loss_batches import FAST, batches, ratio_of, small, tokens_of


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["plain", "truncate", "mask"])
@FAST
@given(batch=batches())
def test_importance_weights(level, mode, batch):
    section = ImportanceSection(level=level, mode=mode, low=0.5, high=2.0)
    tokens, _ = tokens_of(batch, gradient=True)
    found = importance_weights(tokens, section, of=tokens.proximal)
    assert not found.requires_grad
    for t in np.flatnonzero(batch["mask"]):
        of = [t] if level == "token" else np.flatnonzero((batch["sequence"] == batch["sequence"][t]) & batch["mask"])
        logs = np.clip(batch["proximal"][of].astype(np.float64) - batch["behaviour"][of], -20, 20)
        weight = np.exp(np.clip(logs.sum(), -20, 20))
        if min(abs(weight / 0.5 - 1), abs(weight / 2.0 - 1)) < 1e-4:
            continue
        if mode == "truncate":
            weight = min(weight, 2.0)
        elif mode == "mask" and not 0.5 <= weight <= 2.0:
            weight = 0.0
        assert float(found[t]) == pytest.approx(weight, rel=1e-3)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@FAST
@given(batch=batches())
def test_kl_penalty(kind, batch):
    tokens, reference = tokens_of(batch)
    found = kl_penalty(tokens, reference, kind).numpy()
    x = np.clip(batch["reference"].astype(np.float64) - batch["current"], -20, 20)
    expected = {"k1": -x, "k2": x**2 / 2, "k3": np.exp(x) - 1 - x}[kind]
    assert found[batch["mask"]] == pytest.approx(expected[batch["mask"]], rel=1e-3, abs=1e-6)
    assert (found[~batch["mask"]] == 0).all()
    if kind != "k1":
        assert (found >= 0).all()


@FAST
@given(batch=batches())
def test_the_interpolated_proximal_policy_lies_between_by_version(batch):
    tokens, _ = tokens_of(batch, gradient=True)
    found = interpolated_proximal(tokens.behaviour, tokens.current, tokens.staleness)
    assert not found.requires_grad
    age = batch["staleness"]
    expected = (batch["behaviour"].astype(np.float64) + age * batch["current"]) / (age + 1)
    assert found.numpy()[batch["mask"]] == pytest.approx(expected[batch["mask"]], rel=1e-4, abs=1e-3)
    fresh = batch["mask"] & (age == 0)
    assert found.numpy()[fresh].tolist() == batch["behaviour"][fresh].tolist()


def test_decoupled_ppo_is_weight_times_clipped_ratio_plus_penalty():
    rng = np.random.default_rng(1)
    behaviour = -rng.random(30).astype(np.float32)
    batch = {
        "behaviour": behaviour,
        "proximal": behaviour + rng.normal(0, 0.5, 30).astype(np.float32),
        "current": behaviour + rng.normal(0, 0.5, 30).astype(np.float32),
        "reference": behaviour + rng.normal(0, 0.5, 30).astype(np.float32),
        "advantages": rng.normal(size=30).astype(np.float32),
        "mask": rng.random(30) < 0.8,
        "sequence": np.repeat(np.arange(5), 6),
        "staleness": np.ones(30, int),
    }
    section = LossSection(
        proximal="recompute",
        importance=ImportanceSection(level="token", mode="truncate", high=1.5),
        kl="k3",
        kl_coef=0.1,
    )
    tokens, reference = tokens_of(batch)
    found, *_ = policy_loss(tokens, section, load_policy(section), reference)
    weight = np.minimum(ratio_of(batch, "proximal", "behaviour"), 1.5)
    ratio, advantages = ratio_of(batch, "current", "proximal"), batch["advantages"]
    x = batch["reference"].astype(np.float64) - batch["current"]
    expected = -weight * np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
    expected = np.where(batch["mask"], expected + 0.1 * (np.exp(x) - 1 - x), 0)
    assert found.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_reinforce_is_weighted_by_the_current_policy():
    rng = np.random.default_rng(2)
    behaviour = -rng.random(8).astype(np.float32)
    current = behaviour + rng.normal(0, 0.5, 8).astype(np.float32)
    batch = dict.fromkeys(("behaviour", "proximal", "reference"), behaviour) | {
        "current": current,
        "advantages": rng.normal(size=8).astype(np.float32),
        "mask": np.ones(8, bool),
        "sequence": np.zeros(8, int),
        "staleness": np.zeros(8, int),
    }
    section = LossSection(policy="reinforce", importance=ImportanceSection(level="token", mode="plain"))
    tokens, _ = tokens_of(batch, gradient=True)
    loss, *_ = policy_loss(tokens, section, load_policy(section))
    loss.sum().backward()
    assert tokens.current.grad.numpy() == pytest.approx(-np.exp(current - behaviour) * batch["advantages"], rel=1e-4)


def test_the_weight_of_a_sequence_enters_the_loss():
    section = LossSection(proximal="recompute", importance=ImportanceSection(level="sequence", mode="plain"))
    tokens, _ = tokens_of(small(proximal=[0.5, 0.25, 0, 0, 0, 0], current=[0.5, 0.25, 0, 0, 0, 0]))
    found, *_ = policy_loss(tokens, section, load_policy(section))
    assert found[:2].tolist() == pytest.approx([-np.exp(0.75)] * 2)


def test_the_penalty_pulls_towards_the_reference():
    section = LossSection(kl="k2", kl_coef=0.5)
    tokens, reference = tokens_of(small(reference=[-1, 2, 0, 0, 0, 0], advantages=[0] * 6), gradient=True)
    found, *_ = policy_loss(tokens, section, load_policy(section), reference)
    found.sum().backward()
    # Half the square of reference - current, by current.
    assert tokens.current.grad.tolist() == pytest.approx([0.5 * 1, 0.5 * -2, 0, 0, 0, 0])
