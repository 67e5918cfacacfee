"""What an update counts of its groups, and what it says was kept out of the loss."""

from async_rl.config.training import TrainerSection
from async_rl.trainer.packing import Packer
from async_rl.trainer.policy_sums import PolicySums
from async_rl.trainer.samples import samples_of
from async_rl.trainer.step import COUNTS, Step, masked_tokens
from tests.support.layouts import make_groups


def counted(groups, oldest_version=3):
    step = Step(4, oldest_version, PolicySums.zero(2), Packer.of(TrainerSection(), None))
    step.count_groups(groups, [s for g in groups for t in g.trajectories for s in samples_of(t, oldest_version=3)])
    return step


def test_what_the_loss_rejects_is_counted_wherever_it_was_rejected():
    step = counted(make_groups(count=2))
    assert masked_tokens(step.counts, rejected=0.0).keys() == {"stale", "not_sampled"}
    step.count_rejected(3)
    assert masked_tokens(step.counts, rejected=4.0)["rejected"] == 7
    assert step.counts.keys() == set(COUNTS)


def test_groups_count_that_have_a_token_to_train():
    """Tokens of versions 2 to 4 are in the groups; those before the oldest version do not count."""
    groups = make_groups(count=3)
    step = Step(4, 3, PolicySums.zero(2), Packer.of(TrainerSection(), None))
    step.count_groups(groups, [s for t in groups[0].trajectories for s in samples_of(t, oldest_version=3)])
    assert (step.counts["groups"], step.counts["counting_groups"], step.counts["trajectories"]) == (3, 1, 9)
