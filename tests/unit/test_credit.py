"""What the tokens of a rank's groups get: advantages and weights, the same however groups are spread over ranks."""

from dataclasses import replace

import numpy as np
import pytest

from async_rl.config.training import LossSection, RejectionSection
from async_rl.errors import TrainerError
from async_rl.trainer.advantages import group_advantages, load_advantages
from async_rl.trainer.credit import with_credit
from async_rl.trainer.samples import samples_of
from tests.support.data_ranks import DataRanks
from tests.support.groups import rewarded
from tests.support.layouts import make_groups

LIMIT = 64


def prepared(groups, per_segment=False):
    """Return the groups with their samples: tokens of versions 3 and 4 count."""
    return [
        (group, [s for t in group.trajectories for s in samples_of(t, oldest_version=3, per_segment=per_segment)])
        for group in groups
    ]


def credited(groups, settings, ranks=1):
    """Return (the samples by name, how many tokens were rejected), with the groups dealt out to so many ranks."""
    crew = DataRanks(ranks)

    def of_rank(rank):
        return with_credit(
            groups[rank::ranks],
            settings,
            load_advantages(settings),
            max_response_tokens=LIMIT,
            sum_over_data=crew.sum_over_data(rank),
        )

    parts = crew.run(of_rank)
    return {sample.name: sample for part in parts for sample in part.samples}, sum(part.rejected for part in parts)


@pytest.mark.parametrize("per_segment", [False, True])
@pytest.mark.parametrize("aggregation", ["token_mean", "group_mean", "sequence_mean", "sequence_sum", "fixed_length"])
def test_tokens_get_the_weight_of_their_trajectory_and_its_advantage(aggregation, per_segment):
    groups = prepared(make_groups(count=3), per_segment)
    found, _ = credited(groups, LossSection(aggregation=aggregation, normalize_by_std=False))
    for group, samples in groups:
        of_group = sum(int(s.loss_mask.sum()) for s in samples)
        for trajectory, reward in rewarded(group):
            own = [s for s in samples if s.trajectory_id == trajectory.trajectory_id]
            tokens = sum(int(s.loss_mask.sum()) for s in own)
            weight = {
                "token_mean": 1.0,
                "group_mean": 1 / of_group,
                "sequence_mean": 1 / max(tokens, 1),
                "sequence_sum": 1.0,
                "fixed_length": 1 / LIMIT,
            }[aggregation]
            advantage = reward - group.rewards.mean()
            for sample in own:
                assert found[sample.name].weight == pytest.approx(weight)
                assert found[sample.name].advantages == pytest.approx(np.full(sample.positions, advantage), rel=1e-5)
    assert len(found) == sum(len(samples) for _, samples in groups)


@pytest.mark.parametrize("per_segment", [False, True])
@pytest.mark.parametrize("advantage", ["grpo", "rloo"])
def test_each_response_is_compared_with_its_own_group_whatever_the_sizes(advantage, per_segment):
    """Time limits and failed responses leave groups of any size."""
    whole = make_groups(count=3, n=5)
    batch = [replace(group, rollouts=group.rollouts[:n]) for group, n in zip(whole, (2, 5, 3), strict=True)]
    settings = LossSection(advantage=advantage)
    found, _ = credited(prepared(batch, per_segment), settings)
    for group, samples in prepared(batch, per_segment):
        values = group_advantages(group.group_id, group.rewards, load_advantages(settings))
        expected = dict(zip((t.trajectory_id for t in group.trajectories), values, strict=True))
        assert samples
        for sample in samples:
            value = expected[sample.trajectory_id]
            assert found[sample.name].advantages == pytest.approx(np.full(sample.positions, value), rel=1e-5)


def test_advantages_over_the_mini_batch_do_not_depend_on_the_ranks():
    groups = prepared(make_groups(count=5))
    settings = LossSection(advantage="reinforce_plus_plus")
    (alone, _), (spread, _) = credited(groups, settings), credited(groups, settings, ranks=2)
    assert alone.keys() == spread.keys()
    for name, sample in alone.items():
        assert spread[name].advantages == pytest.approx(sample.advantages, rel=1e-5)
    counted = np.concatenate([s.advantages[s.loss_mask] for s in alone.values()])
    assert counted.mean() == pytest.approx(0, abs=1e-5)
    assert counted.std() == pytest.approx(1, rel=1e-5)


def moved(groups, seed=0):
    """Give the samples proximal log-probs that lie apart from the behaviour's, a few of them far apart."""
    rng = np.random.default_rng(seed)

    def apart(sample):
        distance = rng.normal(0, 0.1, sample.positions) * np.where(rng.random(sample.positions) < 0.1, 20, 1)
        return sample.with_logprobs(proximal=sample.logprobs + distance.astype(np.float32))

    return [(group, [apart(sample) for sample in samples]) for group, samples in groups]


@pytest.mark.parametrize("per_segment", [False, True])
def test_the_second_moment_takes_the_advantages_of_the_tokens_that_differ_most(per_segment):
    groups = moved(prepared(make_groups(count=4), per_segment))
    settings = LossSection(proximal="recompute", rejection=RejectionSection(rule="second_moment", bound=0.04))
    plain, none = credited(groups, settings.model_copy(update={"rejection": RejectionSection()}))
    found, rejected = credited(groups, settings)
    assert none == 0 < rejected
    squares, kept = [], []
    for name, sample in found.items():
        counts = sample.loss_mask
        apart = (sample.proximal - sample.logprobs)[counts] ** 2
        squares.append(apart)
        kept.append((sample.advantages[counts] != 0) | (plain[name].advantages[counts] == 0))
        assert (sample.advantages[counts][kept[-1]] == plain[name].advantages[counts][kept[-1]]).all()
        assert (sample.advantages[~counts] == plain[name].advantages[~counts]).all()
    squares, kept = np.concatenate(squares), np.concatenate(kept)
    assert rejected == (~kept).sum()
    assert squares[kept].max() < squares[~kept].min(), "the largest go"
    assert squares[kept].mean() < 0.04 < np.append(squares[kept], squares[~kept].min()).mean(), "no more than must go"


def test_what_the_second_moment_rejects_does_not_depend_on_the_ranks():
    groups = moved(prepared(make_groups(count=5)))
    settings = LossSection(proximal="recompute", rejection=RejectionSection(rule="second_moment"))
    (alone, rejected), (spread, rejected_too) = credited(groups, settings), credited(groups, settings, ranks=3)
    assert rejected == rejected_too > 0
    for name, sample in alone.items():
        assert spread[name].advantages.tolist() == sample.advantages.tolist()


def test_a_rank_without_a_group_takes_part():
    groups = moved(prepared(make_groups(count=1)))
    settings = LossSection(proximal="recompute", rejection=RejectionSection(rule="second_moment"))
    assert credited(groups, settings)[1] == credited(groups, settings, ranks=2)[1] > 0


def test_samples_without_proximal_log_probs_are_named():
    groups = prepared(make_groups(count=1))
    settings = LossSection(proximal="recompute", rejection=RejectionSection(rule="second_moment"))
    with pytest.raises(TrainerError, match=r"0-0/0.*no proximal log-probs"):
        credited(groups, settings)
