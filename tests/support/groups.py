"""Groups of rollouts that have one trajectory each, as every task has them in which no agent branches."""

from dataclasses import replace

from async_rl.types import Group, Prompt, RolloutRecord, Trajectory


def grouped(group_id: str, prompt: Prompt, trajectories, rewards=None) -> Group:
    """Return the group of these trajectories, in which each is a rollout with one of these rewards; None for 1."""
    rewards = [1.0] * len(trajectories) if rewards is None else rewards
    return Group(group_id, prompt, tuple(map(RolloutRecord.of, trajectories, rewards)))


def with_trajectories(group: Group, change) -> Group:
    """Return the group with each trajectory as ``change`` returns it."""
    rollouts = (
        replace(rollout, trajectories=tuple(change(t) for t in rollout.trajectories)) for rollout in group.rollouts
    )
    return replace(group, rollouts=tuple(rollouts))


def rewarded(group: Group) -> list[tuple[Trajectory, float]]:
    """Return each trajectory of a group with the reward of its rollout."""
    return [(t, rollout.reward) for rollout in group.rollouts for t in rollout.trajectories]
