"""Every parallel layout computes what one rank computes.

Compared are loss, gradient norm, parameters after three updates, log-probs, recorded routing, fingerprints and exported
weights. Real Megatron over gloo, float32.

`pytest -s` prints the table that docs/evidence/trainer.md quotes.
"""

import numpy as np
import pytest

from tests.support.layouts import (
    LAYOUTS,
    QUICK,
    TOLERANCE,
    config_of,
    differences,
    largest,
    make_groups,
    relative,
    shared_out,
    train_and_probe,
)

pytestmark = pytest.mark.megatron

UPDATES = 3
SLOW = pytest.mark.slow
CASES = [
    pytest.param(name, recompute, marks=() if name in QUICK and recompute == "full" else SLOW)
    for name in LAYOUTS
    for recompute in ("none", "full")
]


@pytest.fixture(scope="module")
def batches():
    # The last rank of a data-parallel layout gets nothing in the third update.
    return [make_groups(seed=seed, count=count) for seed, count in ((0, 6), (1, 6), (2, 1))][:UPDATES]


@pytest.fixture(scope="module")
def alone(ranks, checkpoint, batches):
    (result,) = ranks.run(train_and_probe, config_of(checkpoint, {}), [shared_out(batch, 1) for batch in batches])
    return result


@pytest.mark.parametrize(("name", "recompute"), CASES)
def test_a_layout_computes_what_one_rank_computes(ranks, checkpoint, batches, alone, name, recompute):
    layout = LAYOUTS[name]
    updates = [shared_out(batch, layout.get("dp", 1)) for batch in batches]
    results = ranks.run(train_and_probe, config_of(checkpoint, layout, trainer__recompute=recompute), updates)
    found = results[0]
    (reports, weights, probed), (expected_reports, _, expected_probed) = found, alone
    apart = differences(found, alone)
    print(f"\n  {name:16} {recompute:5} " + " ".join(f"{what} {value:.1e}" for what, value in apart.items()))
    assert list(found[1]) == list(alone[1])
    assert max(apart.values()) < TOLERANCE
    recorded, expected_recorded = (np.sort(np.concatenate(side[1]), -1) for side in (probed, expected_probed))
    # A row may fall the other way where two experts' scores are equal but for rounding, and move those after it.
    assert (recorded == expected_recorded).all(-1).mean() > 0.98
    for report, expected in zip(reports, expected_reports, strict=True):
        for field in ("ppo_kl_k3", "entropy", "clip_fraction", "effective_sample_size_ratio"):
            assert getattr(report, field) == pytest.approx(getattr(expected, field), rel=1e-5, abs=1e-7), field
        for field in ("groups", "trajectories", "tokens_masked", "router_fallback_rows", "extra_positions"):
            assert getattr(report, field) == getattr(expected, field), field
        assert report.temperature == pytest.approx(expected.temperature, rel=1e-5)
        assert report.router_disagreement == pytest.approx(expected.router_disagreement, abs=0.02), "near ties as well"
    for other in results[1:]:
        assert [r.loss for r in other[0]] == [r.loss for r in reports], "every rank reports the same"
        assert other[1].keys() == weights.keys()
        assert all(tensor is None for tensor in other[1].values()), "only rank 0 gathers"


@pytest.mark.slow
@pytest.mark.parametrize("modules", [["moe"], ["core_attn", "mlp"], ["layernorm"]])
@pytest.mark.parametrize("name", ["EP2", "VPP2", "TP2 x EP2 x PP2"])
def test_selective_recomputation_changes_nothing(ranks, checkpoint, batches, alone, name, modules):
    """With module moe the router runs again, and replays; with others it does not, and nothing may be left over."""
    settings = {"trainer__recompute": "selective", "trainer__recompute_modules": modules}
    updates = [shared_out(batch, LAYOUTS[name].get("dp", 1)) for batch in batches]
    _, weights, _ = ranks.run(train_and_probe, config_of(checkpoint, LAYOUTS[name], **settings), updates)[0]
    assert max(relative(weights[key], alone[1][key]) for key in weights) < TOLERANCE


# Losses that look at more than a token: at its sequence, which context parallelism cuts, at the batch, at other passes.
LOSSES = {
    "GSPO": {"trainer__loss__policy": "gspo", "trainer__loss__aggregation": "sequence_mean"},
    "decoupled, KL, REINFORCE++": {
        "trainer__loss__proximal": "recompute",
        "trainer__loss__importance__level": "sequence",
        "trainer__loss__kl": "k3",
        "trainer__loss__kl_coef": 0.2,
        "trainer__loss__advantage": "reinforce_plus_plus",
        "trainer__loss__aggregation": "fixed_length",
        "rollout__temperature": 0.8,
    },
    "R2, interpolated": {"trainer__router_replay": "R2", "trainer__loss__proximal": "interpolate"},
    "sequences left out, groups": {
        "trainer__loss__rejection__rule": "geometric_mean",
        "trainer__loss__rejection__low": 0.5,
        "trainer__loss__rejection__high": 1.2,
        "trainer__loss__aggregation": "group_mean",
    },
    "M2PO": {
        "trainer__loss__proximal": "recompute",
        "trainer__loss__importance__level": "token",
        "trainer__loss__rejection__rule": "second_moment",
        "trainer__loss__rejection__bound": 0.3,
        "trainer__loss__aggregation": "sequence_sum",
    },
}


def train_twice(trainer, updates):
    """Make several updates of one training step: the second uses what was computed before the first."""
    groups = [group for shares in updates for group in shares[trainer._place.dp]]
    trainer.prepare(groups, oldest_version=3)
    return train_and_probe(trainer, updates)


@pytest.fixture(scope="module")
def alone_with(ranks, checkpoint, batches):
    done = {}

    def result(name):
        if name not in done:
            (done[name],) = ranks.run(
                train_twice, config_of(checkpoint, {}, **LOSSES[name]), [shared_out(batch, 1) for batch in batches]
            )
        return done[name]

    return result


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["DP2", "CP2", "TP2 x EP2 x PP2"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_the_same_in_every_layout(ranks, checkpoint, batches, alone_with, name, layout):
    sizes = LAYOUTS[layout]
    updates = [shared_out(batch, sizes.get("dp", 1)) for batch in batches]
    reports, weights, _ = ranks.run(train_twice, config_of(checkpoint, sizes, **LOSSES[name]), updates)[0]
    expected_reports, expected_weights, _ = alone_with(name)
    # Advantages that are centred on 0 leave of the loss a difference of what is 1e4 times as large.
    assert [r.loss for r in reports] == pytest.approx([r.loss for r in expected_reports], rel=TOLERANCE, abs=1e-7)
    # Two passes' log-probs are subtracted, and round apart by as much as they differ in the first update.
    assert largest([r.grad_norm for r in reports], [r.grad_norm for r in expected_reports]) < 5 * TOLERANCE
    assert max(relative(weights[key], expected_weights[key]) for key in weights) < TOLERANCE


@pytest.mark.slow
def test_the_losses_differ(alone, alone_with):
    norms = [[r.grad_norm for r in result[0]] for result in (alone, *map(alone_with, LOSSES))]
    assert len({tuple(np.round(norm, 4)) for norm in norms}) == len(norms)


@pytest.mark.slow
@pytest.mark.parametrize("microbatch", [60, 1000])
def test_a_loss_does_not_depend_on_microbatches(ranks, checkpoint, batches, alone_with, microbatch):
    name = "decoupled, KL, REINFORCE++"
    config = config_of(checkpoint, {}, **LOSSES[name] | {"trainer__tokens_per_microbatch": microbatch})
    ((reports, weights, _),) = ranks.run(train_twice, config, [shared_out(batch, 1) for batch in batches])
    assert [r.loss for r in reports] == pytest.approx([r.loss for r in alone_with(name)[0]], rel=TOLERANCE, abs=1e-7)
    assert max(relative(weights[key], alone_with(name)[1][key]) for key in weights) < TOLERANCE


# ---- streaming ----


def train_in_parts(trainer, updates, parts):
    """Accumulate each update's groups in so many calls."""
    for shares in updates:
        groups = shares[trainer._place.dp]
        trainer.begin_step(version=4, oldest_version=3)
        for part in np.array_split(np.arange(len(groups)), parts):
            trainer.accumulate([groups[index] for index in part])
        report = trainer.finish_step()
    gradients = [p.main_grad.numpy().copy() for chunk in trainer._chunks for p in chunk.parameters()]
    return report, gradients, {name: w if w is None else w.detach().numpy().copy() for name, w in trainer.weights()}


@pytest.mark.parametrize(
    "aggregation", ["token_mean", *(pytest.param(name, marks=SLOW) for name in ("sequence_mean", "fixed_length"))]
)
def test_a_streamed_step_is_the_unstreamed_one_bit_for_bit(ranks, checkpoint, batches, aggregation):
    """What the loss is divided by is known at the end of the step only."""
    settings = {"trainer__tokens_per_microbatch": 100, "trainer__recompute": "full"}
    config = config_of(checkpoint, {}, **settings, trainer__loss__aggregation=aggregation)
    updates = [shared_out(batch, 1) for batch in batches]
    whole, *streamed = (ranks.run(train_in_parts, config, updates, parts)[0] for parts in (1, 2, 6))
    assert whole[0].microbatches > 1
    for report, gradients, weights in streamed:
        assert report.loss == whole[0].loss
        assert report.microbatches == whole[0].microbatches
        for a, b in zip(gradients, whole[1], strict=True):
            np.testing.assert_array_equal(a, b)
        for name, weight in weights.items():
            np.testing.assert_array_equal(weight, whole[2][name])


@pytest.mark.parametrize("layout", [pytest.param("EP2", marks=SLOW), "TP2 x EP2 x PP2"])
def test_a_streamed_step_in_a_layout(ranks, checkpoint, batches, alone, layout):
    """Ranks fill different numbers of microbatches in each call."""
    updates = [shared_out(batch, LAYOUTS[layout].get("dp", 1)) for batch in batches]
    weights = ranks.run(train_in_parts, config_of(checkpoint, LAYOUTS[layout]), updates, 3)[0][2]
    assert max(relative(weights[key], alone[1][key]) for key in weights) < TOLERANCE


def schedules_in_parts(trainer, groups, parts):
    """Return how many microbatches each schedule of a step gets, whose groups come in so many calls; see below."""
    sizes, accumulate = [], trainer._executor.accumulate

    def counted(batches, *arguments, **keywords):
        sizes.append(len(batches))
        return accumulate(batches, *arguments, **keywords)

    trainer._executor.accumulate = counted
    return sizes, *train_in_parts(trainer, [[groups]], parts)[:2]


def test_a_streamed_step_in_a_pipeline_waits_for_four_microbatches_per_stage(ranks, checkpoint):
    """Nor does it change the gradient."""
    groups = make_groups(seed=3, count=8)
    config = config_of(checkpoint, LAYOUTS["PP2"], trainer__tokens_per_microbatch=20)
    whole, streamed = (ranks.run(schedules_in_parts, config, groups, parts) for parts in (1, 8))
    for (sizes, report, gradients), (_, whole_report, whole_gradients) in zip(streamed, whole, strict=True):
        assert len(sizes) > 1, "it streams nevertheless"
        assert all(size >= 8 for size in sizes[:-1])
        assert sum(sizes) == report.microbatches == whole_report.microbatches
        assert report.loss == whole_report.loss
        for a, b in zip(gradients, whole_gradients, strict=True):
            np.testing.assert_array_equal(a, b)
