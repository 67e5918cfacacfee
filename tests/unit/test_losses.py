"""Policy losses against plain NumPy in float64, with ratios at and beyond every edge."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.config.schema import ImportanceSection, LossSection
from async_rl.errors import TrainerError
from async_rl.trainer.losses import (
    MAX_LOG_RATIO,
    TokenLoss,
    Tokens,
    denominator,
    importance_weights,
    interpolated_proximal,
    kl_penalty,
    load_policy,
    policy_loss,
    sequence_sums,
    token_weight,
)
from tests.support.examples import examples

# A ratio of exactly 1, at either clip, one ulp of float32 around them, 0 and infinity for all that float32 knows.
LOG_RATIOS = st.one_of(
    st.floats(-3, 3, width=32),
    st.sampled_from([0.0, float(np.log(0.8)), float(np.log(1.3)), -1e4, 1e4, MAX_LOG_RATIO, -MAX_LOG_RATIO]),
)
FAST = settings(max_examples=examples(60), deadline=None)


@st.composite
def batches(draw):
    """Arrays of a microbatch of some sequences, the first of which may be one token; NaN where the mask is off."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    count = sum(lengths)

    def each(values):
        return np.array(draw(st.lists(values, min_size=count, max_size=count)), np.float32)

    behaviour = each(st.floats(-8, 0, width=32))
    proximal = behaviour + each(LOG_RATIOS)
    arrays = {
        "behaviour": behaviour,
        "proximal": proximal,
        "current": proximal + each(LOG_RATIOS),
        "reference": behaviour + each(LOG_RATIOS),
        "advantages": each(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.5])),
    }
    mask = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    for array in arrays.values():
        array[~mask] = np.nan
    return arrays | {
        "mask": mask,
        "sequence": np.repeat(np.arange(len(lengths)), lengths),
        "staleness": np.array(draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))),
    }


def tokens_of(batch, gradient=False):
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in batch.items()}
    sums = sequence_sums(tensors.pop("sequence"), tensors["mask"])
    reference = tensors.pop("reference")
    tensors["current"].requires_grad_(gradient)
    return Tokens(**tensors, sequence_sum=sums), reference


def ratio_of(batch, above, below):
    return np.exp(np.clip(batch[above].astype(np.float64) - batch[below], -MAX_LOG_RATIO, MAX_LOG_RATIO))


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
            else:
                values[t] = -advantage * batch["current"][t]
    return values, clipped


POLICIES = [
    LossSection(policy="ppo", clip_low=0.2, clip_high=0.3),
    LossSection(policy="ppo", clip_low=0.2, clip_high=0.3, dual_clip=3.0),
    LossSection(policy="gspo", clip_low=0.2, clip_high=0.3),
    LossSection(policy="cispo", clip_low=0.5, clip_high=2.0),
    LossSection(policy="reinforce"),
]
NAMES = ["ppo", "dual clip", "gspo", "cispo", "reinforce"]


def near_a_bound(batch, loss):
    """Where float32 may fall on the other side of a clip than float64."""
    ratio = ratio_of(batch, "current", "proximal")
    if loss.policy == "gspo":
        for number in np.unique(batch["sequence"][batch["mask"]]):
            here = (batch["sequence"] == number) & batch["mask"]
            ratio[here] = np.exp(np.log(ratio[here]).mean())
    bounds = [1 - loss.clip_low, 1 + loss.clip_high, loss.dual_clip or np.inf]
    with np.errstate(invalid="ignore"):
        return np.any([np.abs(ratio / bound - 1) < 1e-5 for bound in bounds], axis=0)


@pytest.mark.parametrize("loss", POLICIES, ids=NAMES)
@FAST
@given(batch=batches())
def test_a_policy_is_what_its_paper_says(loss, batch):
    tokens, _ = tokens_of(batch)
    found = load_policy(loss)(tokens, loss)
    values, clipped = by_hand(batch, loss)
    assert found.loss.numpy() == pytest.approx(values, rel=2e-4, abs=1e-4)
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
    if loss.policy == "ppo":
        assert (gradient[found.clipped.numpy()] == 0).all()
        ratio = ratio_of(batch, "current", "proximal")
        free = batch["mask"] & ~found.clipped.numpy() & ~near_a_bound(batch, loss)
        inside = free & (np.abs(np.log(np.where(free, ratio, 1.0))) < MAX_LOG_RATIO - 1e-3)
        expected = -(ratio * batch["advantages"])
        assert gradient[inside] == pytest.approx(expected[inside], rel=1e-3, abs=1e-6)
    if loss.policy == "cispo":
        ratio = np.clip(ratio_of(batch, "current", "proximal"), 0.5, 3.0)
        expected = np.where(batch["mask"], -ratio * batch["advantages"], 0)
        assert gradient[batch["mask"]] == pytest.approx(expected[batch["mask"]], rel=1e-3, abs=1e-6)
    if loss.policy == "gspo":
        for number in np.unique(batch["sequence"]):
            here = (batch["sequence"] == number) & batch["mask"]
            if found.clipped.numpy()[here].all():  # a gradient comes from any token of the sequence that is not
                assert (gradient[here] == 0).all()
    if loss.policy == "reinforce":
        assert (gradient[batch["mask"]] == -batch["advantages"][batch["mask"]]).all()


def ordinary_batch(seed, sequences=4, length=6):
    """Moderate ratios on either side of the clips, in float64; a fifth of the tokens is NaN and does not count."""
    rng = np.random.default_rng(seed)
    count = sequences * length
    behaviour = -3 * rng.random(count)
    proximal = behaviour + rng.normal(0, 0.3, count)
    batch = {
        "behaviour": behaviour,
        "proximal": proximal,
        "current": proximal + rng.normal(0, 0.6, count),
        "reference": behaviour + rng.normal(0, 0.5, count),
        "advantages": rng.normal(size=count),
    }
    mask = rng.random(count) < 0.8
    for array in batch.values():
        array[~mask] = np.nan
    return batch | {
        "mask": mask,
        "sequence": np.repeat(np.arange(sequences), length),
        "staleness": rng.integers(0, 4, count),
    }


DIFFERENTIABLE = [loss for loss in POLICIES if loss.policy in ("ppo", "gspo")]


@pytest.mark.parametrize("kl", ["none", "k1", "k2", "k3"])
@pytest.mark.parametrize("loss", DIFFERENTIABLE, ids=["ppo", "dual clip", "gspo"])
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
    found, _ = policy_loss(tokens, section, load_policy(section), reference)
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
    loss, _ = policy_loss(tokens, section, load_policy(section))
    loss.sum().backward()
    assert tokens.current.grad.numpy() == pytest.approx(-np.exp(current - behaviour) * batch["advantages"], rel=1e-4)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "fixed_length"])
@FAST
@given(batch=batches(), cut=st.integers(0, 4))
def test_aggregation_is_the_mean_it_is_named_for_however_the_batch_is_cut(aggregation, batch, cut):
    values = np.where(batch["mask"], np.arange(len(batch["mask"])) + 1.0, 0.0)
    parts = [values[(batch["sequence"] == s) & batch["mask"]] for s in np.unique(batch["sequence"])]
    parts = [part for part in parts if len(part)]
    if not parts:
        return
    limit = 16
    expected = {
        "token_mean": np.concatenate(parts).mean(),
        "sequence_mean": np.mean([part.mean() for part in parts]),
        "fixed_length": np.mean([part.sum() / limit for part in parts]),
    }[aggregation]
    total = 0.0
    for microbatch in (parts[:cut], parts[cut:]):
        for part in microbatch:
            total += token_weight(aggregation, len(part), limit) * part.sum()
    divisor = denominator(aggregation, sum(len(part) for part in parts), len(parts))
    assert total / divisor == pytest.approx(expected)


def small(**changes):
    """Two sequences of three tokens, of the second of which nothing counts."""
    zeros = np.zeros(6, np.float32)
    batch = dict.fromkeys(("behaviour", "proximal", "current", "reference"), zeros) | {
        "advantages": np.ones(6, np.float32),
        "mask": np.array([1, 1, 0, 0, 0, 0], bool),
        "sequence": np.repeat([0, 1], 3),
        "staleness": np.zeros(6, int),
    }
    return batch | {name: np.asarray(values, np.float32) for name, values in changes.items()}


def test_a_sum_over_a_sequence_leaves_out_what_does_not_count():
    tokens, _ = tokens_of(small())
    assert tokens.sequence_sum(torch.arange(6.0)).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_a_sequence_of_which_nothing_counts_leaves_the_gradient_finite():
    loss = LossSection(policy="gspo")
    tokens, _ = tokens_of(small(), gradient=True)
    load_policy(loss)(tokens, loss).loss.sum().backward()
    assert torch.isfinite(tokens.current.grad).all()
    assert tokens.current.grad[2:].tolist() == [0.0] * 4


def test_the_weight_of_a_sequence_enters_the_loss():
    section = LossSection(proximal="recompute", importance=ImportanceSection(level="sequence", mode="plain"))
    tokens, _ = tokens_of(small(proximal=[0.5, 0.25, 0, 0, 0, 0], current=[0.5, 0.25, 0, 0, 0, 0]))
    found, _ = policy_loss(tokens, section, load_policy(section))
    assert found[:2].tolist() == pytest.approx([-np.exp(0.75)] * 2)


def test_the_penalty_pulls_towards_the_reference():
    section = LossSection(kl="k2", kl_coef=0.5)
    tokens, reference = tokens_of(small(reference=[-1, 2, 0, 0, 0, 0], advantages=[0] * 6), gradient=True)
    found, _ = policy_loss(tokens, section, load_policy(section), reference)
    found.sum().backward()
    # Half the square of reference - current, by current.
    assert tokens.current.grad.tolist() == pytest.approx([0.5 * 1, 0.5 * -2, 0, 0, 0, 0])


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "fixed_length"])
@pytest.mark.parametrize("loss", POLICIES, ids=NAMES)
def test_two_microbatches_have_the_loss_and_the_gradient_of_one(loss, aggregation):
    proximal = "behaviour" if loss.policy == "reinforce" else "recompute"
    importance = ImportanceSection(level="sequence", mode="truncate")
    loss = loss.model_copy(update={"proximal": proximal, "importance": importance, "kl": "k3", "kl_coef": 0.1})
    batch = ordinary_batch(5)
    counts = [int((batch["mask"] & (batch["sequence"] == number)).sum()) for number in range(4)]
    assert all(counts)
    of_sequence = np.array([token_weight(aggregation, count, 16) for count in counts])
    batch["weights"] = of_sequence[batch["sequence"]]
    divisor = denominator(aggregation, sum(counts), len(counts))

    def computed(part):
        part = dict(part)
        weights = torch.from_numpy(part.pop("weights"))
        part["sequence"] = part["sequence"] - part["sequence"][0]
        tokens, reference = tokens_of(part, gradient=True)
        total = (policy_loss(tokens, loss, load_policy(loss), reference).loss * weights).sum() / divisor
        total.backward()
        return float(total.detach()), tokens.current.grad.numpy()

    def cut(where):
        return {name: array[where].copy() for name, array in batch.items()}

    whole, gradient = computed(cut(slice(None)))
    first, second = computed(cut(slice(0, 6))), computed(cut(slice(6, None)))
    assert first[0] + second[0] == pytest.approx(whole)
    assert np.concatenate([first[1], second[1]]) == pytest.approx(gradient)


# ---- a user's own ----


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
