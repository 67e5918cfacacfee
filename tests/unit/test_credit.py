"""What the tokens of a rank's groups get: advantages and weights, the same however groups are spread over ranks."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from async_rl.config.schema import LossSection
from async_rl.trainer.advantages import load_advantages
from async_rl.trainer.credit import with_credit
from async_rl.trainer.samples import samples_of
from tests.support.layouts import make_groups

LIMIT = 64


class Ranks:
    """Data-parallel ranks as threads that add up their numbers, as ``Collectives.sum_over_data`` does."""

    def __init__(self, count):
        self.count = count
        self.barrier = threading.Barrier(count, timeout=10)
        self.given = [None] * count

    def sum_over_data(self, rank):
        def added(**values):
            self.given[rank] = values
            self.barrier.wait()
            total = {name: sum(given[name] for given in self.given) for name in values}
            self.barrier.wait()
            return total

        return added

    def run(self, function):
        """Return function(rank) of each rank, called at one time."""
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(function, range(self.count)))


def prepared(groups, per_segment=False):
    """Return the groups with their samples: tokens of versions 3 and 4 count."""
    return [
        (group, [s for t in group.trajectories for s in samples_of(t, oldest_version=3, per_segment=per_segment)])
        for group in groups
    ]


def credited(groups, settings, ranks=1):
    """Return the samples by name, with the groups dealt out to so many ranks."""
    crew = Ranks(ranks)

    def of_rank(rank):
        return with_credit(
            groups[rank::ranks],
            settings,
            load_advantages(settings),
            max_response_tokens=LIMIT,
            sum_over_data=crew.sum_over_data(rank),
        )

    return {sample.name: sample for samples in crew.run(of_rank) for sample in samples}


@pytest.mark.parametrize("per_segment", [False, True])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "fixed_length"])
def test_tokens_get_the_weight_of_their_trajectory_and_its_advantage(aggregation, per_segment):
    groups = prepared(make_groups(count=3), per_segment)
    found = credited(groups, LossSection(aggregation=aggregation, normalize_by_std=False))
    for group, samples in groups:
        for trajectory in group.trajectories:
            own = [s for s in samples if s.trajectory_id == trajectory.trajectory_id]
            tokens = sum(int(s.loss_mask.sum()) for s in own)
            weight = {"token_mean": 1.0, "sequence_mean": 1 / max(tokens, 1), "fixed_length": 1 / LIMIT}[aggregation]
            advantage = trajectory.reward - group.rewards.mean()
            for sample in own:
                assert found[sample.name].weight == pytest.approx(weight)
                assert found[sample.name].advantages == pytest.approx(np.full(sample.positions, advantage), rel=1e-5)
    assert len(found) == sum(len(samples) for _, samples in groups)


def test_advantages_over_the_mini_batch_do_not_depend_on_the_ranks():
    groups = prepared(make_groups(count=5))
    settings = LossSection(advantage="reinforce_plus_plus")
    alone, spread = credited(groups, settings), credited(groups, settings, ranks=2)
    assert alone.keys() == spread.keys()
    for name, sample in alone.items():
        assert spread[name].advantages == pytest.approx(sample.advantages, rel=1e-5)
    counted = np.concatenate([s.advantages[s.loss_mask] for s in alone.values()])
    assert counted.mean() == pytest.approx(0, abs=1e-5)
    assert counted.std() == pytest.approx(1, rel=1e-5)
