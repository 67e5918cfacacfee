"""Tokens and sequences that are left out because two policies differ too much on them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.config.training import ImportanceSection, LossSection, RejectionSection
from async_rl.trainer.losses import load_policy, policy_loss
from async_rl.trainer.rejection import largest_kept_square
from tests.support.data_ranks import DataRanks
from tests.support.loss_batches import FAST, batches, ordinary_batch, tokens_of

SEQUENCES = {
    "geometric mean": RejectionSection(rule="geometric_mean", low=0.8, high=1.25),
    "k3": RejectionSection(rule="k3", bound=0.1),
}


def of_sequence_by_hand(rejection, log_ratios):
    """Return (whether a sequence with these log ratios is rejected, whether that is too close to call in float32)."""
    logs = np.clip(np.asarray(log_ratios, np.float64), -20, 20)
    if rejection.rule == "geometric_mean":
        value, bounds = np.exp(logs.mean()), (rejection.low, rejection.high)
        return not bounds[0] <= value <= bounds[1], min(abs(value / bound - 1) for bound in bounds) < 1e-4
    value = np.mean(np.exp(logs) - 1 - logs)
    return value > rejection.limit, abs(value / rejection.limit - 1) < 1e-3


def by_hand(batch, rejection, other):
    """(rejected, too close to call) of each token, sequence by sequence."""
    rejected, close = np.zeros((2, len(batch["mask"])), bool)
    for number in np.unique(batch["sequence"]):
        here = (batch["sequence"] == number) & batch["mask"]
        if here.any():
            logs = batch[other][here].astype(np.float64) - batch["behaviour"][here]
            rejected[here], close[here] = of_sequence_by_hand(rejection, logs)
    return rejected, close


@pytest.mark.parametrize(("proximal", "other"), [("recompute", "proximal"), ("behaviour", "current")])
@pytest.mark.parametrize("rejection", SEQUENCES.values(), ids=SEQUENCES)
@FAST
@given(batch=batches())
def test_a_sequence_that_differs_too_much_has_no_loss_and_the_others_keep_theirs(rejection, proximal, other, batch):
    if proximal == "behaviour":
        batch["proximal"] = batch["behaviour"].copy()
    settings = LossSection(policy="ppo", proximal=proximal)
    tokens, _ = tokens_of(batch, gradient=True)
    whole = policy_loss(tokens, settings, load_policy(settings))
    found = policy_loss(tokens, settings.model_copy(update={"rejection": rejection}), load_policy(settings))
    rejected, close = by_hand(batch, rejection, other)
    sure = batch["mask"] & ~close
    assert found.rejected.numpy()[sure].tolist() == rejected[sure].tolist()
    assert not found.rejected.numpy()[~batch["mask"]].any()
    assert (found.loss.detach().numpy() == np.where(found.rejected, 0, whole.loss.detach())).all()
    found.loss.sum().backward()
    gradient = tokens.current.grad.numpy()
    assert np.isfinite(gradient).all()
    assert (gradient[found.rejected.numpy()] == 0).all()


@pytest.mark.parametrize("policy", ["ppo", "gspo", "reinforce"])
@pytest.mark.parametrize("rejection", SEQUENCES.values(), ids=SEQUENCES)
def test_a_gradient_is_the_slope_of_what_is_left(rejection, policy):
    """Check by central differences in float64: rejection itself has no gradient."""
    settings = LossSection(policy=policy, rejection=rejection, proximal="recompute", kl="k2", kl_coef=0.3)
    step, seen = 1e-6, set()
    for seed in range(4):
        batch = ordinary_batch(seed, length=4)

        def value(batch=batch):
            tokens, reference = tokens_of(batch)
            return float(policy_loss(tokens, settings, load_policy(settings), reference).loss.sum())

        tokens, reference = tokens_of({name: array.copy() for name, array in batch.items()}, gradient=True)
        found = policy_loss(tokens, settings, load_policy(settings), reference)
        found.loss.sum().backward()
        seen |= set(found.rejected.numpy()[batch["mask"]].tolist())
        for t in range(len(batch["mask"])):
            here = batch["current"][t]
            batch["current"][t] = here + step
            above = value()
            batch["current"][t] = here - step
            below = value()
            batch["current"][t] = here
            assert float(tokens.current.grad[t]) == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-6)
    assert seen == {True, False}


def test_the_penalty_stays_on_what_is_rejected():
    rejection = RejectionSection(rule="k3", bound=1e-9)
    settings = LossSection(proximal="recompute", rejection=rejection, kl="k2", kl_coef=0.5)
    batch = ordinary_batch(3)
    tokens, reference = tokens_of(batch)
    found = policy_loss(tokens, settings, load_policy(settings), reference)
    expected = 0.25 * (batch["reference"] - batch["current"]) ** 2
    assert found.rejected.numpy()[batch["mask"]].all()
    assert found.loss.numpy()[batch["mask"]] == pytest.approx(expected[batch["mask"]])


def test_tokens_whose_weight_is_masked_are_reported():
    importance = ImportanceSection(level="token", mode="mask", low=0.5, high=1.25)
    settings = LossSection(proximal="recompute", importance=importance)
    batch = ordinary_batch(4)
    tokens, _ = tokens_of(batch)
    found = policy_loss(tokens, settings, load_policy(settings))
    weights = np.exp(batch["proximal"] - batch["behaviour"])
    outside = batch["mask"] & ~((weights >= 0.5) & (weights <= 1.25))
    assert found.rejected.numpy().tolist() == outside.tolist()
    assert 0 < outside.sum() < batch["mask"].sum()
    assert (found.loss.numpy()[outside] == 0).all()


# ---- second moment ----

SQUARES = st.one_of(
    st.floats(0, 4, width=32), st.sampled_from([0.0, 0.25, float(np.nextafter(np.float32(0.25), np.float32(0))), 400.0])
)


def kept_by_hand(squares, bound):
    """Take away the largest, with its equals, until the mean of the others is below the bound."""
    left = np.sort(np.asarray(squares, np.float64))
    while len(left) and not left.mean() < bound:
        left = left[left < left.max()]
    return left.tolist()


@FAST
@given(squares=st.lists(SQUARES, max_size=30), bound=st.sampled_from([0.25, 0.04, 1.0, 3.0]), ranks=st.integers(1, 3))
def test_the_largest_squares_go_until_the_mean_of_the_others_is_below_the_bound(squares, bound, ranks):
    dealt = [np.array(squares[rank::ranks], np.float32) for rank in range(ranks)]
    crew = DataRanks(ranks)
    found = crew.run(lambda rank: largest_kept_square(dealt[rank], bound, crew.sum_over_data(rank)))
    assert len(set(found)) == 1, "every rank finds the same"
    kept = np.sort([value for value in squares if value <= found[0]]).tolist()
    assert kept == kept_by_hand(squares, bound)


def test_nothing_is_rejected_below_the_bound_and_one_sum_says_so():
    asked = []

    def alone(**values):
        asked.append(values)
        return values

    assert largest_kept_square(np.full(5, 0.03, np.float32), 0.04, alone) == np.inf
    assert len(asked) == 2, "how many tokens there are, and their sum"
    assert largest_kept_square(np.zeros(0, np.float32), 0.04, alone) == np.inf
    largest_kept_square(np.array([0.03, 9.0], np.float32), 0.04, alone)
    assert len(asked) < 3 + 2 + 32
