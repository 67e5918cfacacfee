"""A loss of the user's own, named by module:function."""

import numpy as np
import pytest
import torch
from hypothesis import given

from async_rl.config.training import LossSection
from async_rl.errors import TrainerError
from async_rl.trainer.losses import TokenLoss, load_policy, policy_loss
from tests.support.loss_batches import FAST, batches, small, tokens_of


def half(tokens, settings):
    return -0.5 * tokens.advantages * tokens.current


def with_clipping(tokens, settings):
    return TokenLoss(half(tokens, settings), ~(tokens.advantages <= 0))  # true where it is NaN, too


def plain_ratio(tokens, settings):
    return -torch.exp(tokens.current - tokens.behaviour) * tokens.advantages


def a_mean(tokens, settings):
    return half(tokens, settings).mean()


def in_float64(tokens, settings):
    return half(tokens, settings).double()


def fraction_clipped(tokens, settings):
    return TokenLoss(half(tokens, settings), torch.tensor(0.5))


def nothing(tokens, settings):
    return None


def wants_more(tokens, settings, other):
    return half(tokens, settings)


@FAST
@given(batch=batches())
def test_a_users_own_loss(batch):
    tokens, _ = tokens_of(batch)
    for name in ("half", "with_clipping"):
        section = LossSection(policy=f"{__name__}:{name}")
        found = policy_loss(tokens, section, load_policy(section))
        expected = np.where(batch["mask"], -0.5 * batch["advantages"] * batch["current"], 0)
        assert found.loss.numpy() == pytest.approx(expected)
        clipped = batch["mask"] & (batch["advantages"] > 0) & (name == "with_clipping")
        assert found.clipped.numpy().tolist() == clipped.tolist()


def test_a_users_loss_is_not_shown_what_would_poison_its_gradient():
    """Tokens that were not sampled have a behaviour log-prob of NaN."""
    tokens, _ = tokens_of(small(behaviour=[0, 0, np.nan, np.nan, np.nan, np.nan]), gradient=True)
    section = LossSection(policy=f"{__name__}:plain_ratio")
    policy_loss(tokens, section, load_policy(section)).loss.sum().backward()
    assert tokens.current.grad.tolist() == [-1.0, -1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [("no_such", "no function"), ("wants_more", "cannot be called as f(tokens, settings)")],
)
def test_a_users_loss_that_cannot_be_called_is_refused_at_the_start(name, words):
    with pytest.raises(TrainerError, match=r"trainer\.loss\.policy") as caught:
        load_policy(LossSection(policy=f"{__name__}:{name}"))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a_mean", "a loss of torch.float32 []; expected torch.float32 [3]"),
        ("in_float64", "a loss of torch.float64 [3]; expected torch.float32 [3]"),
        ("nothing", "a loss of NoneType"),
        ("fraction_clipped", "a clipped of torch.float32 []; expected torch.bool [3]"),
    ],
)
def test_a_users_loss_that_returns_something_else_is_named(name, words):
    tokens, _ = tokens_of(
        {name: np.zeros(3, np.float32) for name in ("behaviour", "proximal", "current", "reference", "advantages")}
        | {"mask": np.ones(3, bool), "sequence": np.zeros(3, int), "staleness": np.zeros(3, int)}
    )
    section = LossSection(policy=f"{__name__}:{name}")
    with pytest.raises(TrainerError, match=rf"trainer\.loss\.policy .*:{name}: returned") as caught:
        load_policy(section)(tokens, section)
    assert words in str(caught.value)
