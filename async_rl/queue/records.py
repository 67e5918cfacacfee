"""The records that travel between the queue and its clients: tickets, group metadata, statistics. Plain frozen data.

Knows ``types``, and the counts that ``metrics`` shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from async_rl.metrics.records import GroupCounts
from async_rl.types import FinishReason, Group, Int32Array, Prompt, RolloutEnd, RolloutRecord, Trajectory

FORKS = ("edited", "parallel", "cut", "stop_mismatch")
"""Origins of a trajectory whose prompt is tokens of another one, and what was added to them."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to generate one group."""

    group_id: str
    prompt: Prompt
    version: int
    """The policy version when the ticket was issued."""


@dataclass(frozen=True, slots=True)
class GroupMeta:
    """What the queue knows of a group without decoding it. Journals hold the fields' values in this order."""

    group_id: str
    num_tokens: int
    """Prompt and response tokens of all trajectories."""
    nbytes: int
    """Size of the encoded group."""
    oldest_version: int
    """The oldest policy version that sampled a token to be trained."""
    newest_version: int
    """The newest policy version that sampled a token of the group."""
    num_trajectories: int
    num_partial: int
    """Trajectories of more than one segment."""
    lengths: tuple[int, ...] = ()
    """Prompt and response tokens of each trajectory."""
    address: str = ""
    """Address of the encoded group in a store that has addresses (Redis); "" for the object store."""
    rewards: tuple[float, ...] = ()
    """Reward of each trainable rollout; this and the fields below are empty in journals and checkpoints of release
    0.1."""
    response_tokens: tuple[int, ...] = ()
    """Number of response tokens of each trajectory."""
    segments: tuple[int, ...] = ()
    """Number of segments of each trajectory."""
    interruptions: tuple[int, ...] = ()
    """Number of resume points of each trajectory."""
    finish_reasons: tuple[FinishReason, ...] = ()
    reward_parts: tuple[str, ...] = ()
    """Names of the parts of the rewards, ascending; with them, as tuples of the same length:"""
    part_sums: tuple[float, ...] = ()
    """The sum of each part over the trainable rollouts that have it."""
    part_counts: tuple[int, ...] = ()
    """The number of trainable rollouts that have the part."""
    metrics: tuple[str, ...] = ()
    """Names of the metrics of rollouts, ascending; with them, as for the parts of rewards:"""
    metric_sums: tuple[float, ...] = ()
    metric_counts: tuple[int, ...] = ()
    ends: tuple[RolloutEnd, ...] = ()
    """How each rollout ended; with it, as tuples of the same length:"""
    branches: tuple[int, ...] = ()
    """Number of trajectories of each rollout."""
    turns: tuple[int, ...] = ()
    """Number of turns of the policy in each rollout."""
    repeated_tokens: int = 0
    """Tokens with which trajectories begin as an earlier one of their rollout does, so that they are computed again."""

    @classmethod
    def from_fields(cls, found: Sequence[Any]) -> GroupMeta:
        """Build the record from the values of its fields in order, as ``to_fields`` gives them.

        The last ones may be missing: journals of earlier releases lack them.
        """
        values: Sequence[Any] = [tuple(value) if isinstance(value, list) else value for value in found]
        return cls(*values)

    def to_fields(self) -> list[Any]:
        """Return the values of the fields in order. ``dataclasses.astuple`` would copy each value of each tuple."""
        return [getattr(self, each.name) for each in fields(self)]

    @classmethod
    def of(cls, group: Group, nbytes: int) -> GroupMeta:
        """Describe a group whose encoded message has ``nbytes`` bytes."""
        parts, part_sums, part_counts = _totals([rollout.reward_parts for rollout in group.trainable])
        metrics, metric_sums, metric_counts = _totals([rollout.metrics for rollout in group.trainable])
        return cls(
            group_id=group.group_id,
            num_tokens=group.num_tokens,
            nbytes=nbytes,
            oldest_version=group.oldest_version,
            newest_version=max(int(t.versions.max()) for t in group.trajectories),
            num_trajectories=len(group.trajectories),
            num_partial=sum(t.is_partial for t in group.trajectories),
            lengths=tuple(t.num_tokens for t in group.trajectories),
            rewards=tuple(float(rollout.reward) for rollout in group.trainable),
            response_tokens=tuple(len(t.response_ids) for t in group.trajectories),
            segments=tuple(len(t.segments) for t in group.trajectories),
            interruptions=tuple(len(t.resume_points) for t in group.trajectories),
            finish_reasons=tuple(t.finish_reason for t in group.trajectories),
            reward_parts=parts,
            part_sums=part_sums,
            part_counts=part_counts,
            metrics=metrics,
            metric_sums=metric_sums,
            metric_counts=metric_counts,
            ends=tuple(rollout.end for rollout in group.rollouts),
            branches=tuple(len(rollout.trajectories) for rollout in group.rollouts),
            turns=tuple(sum(map(_turns, rollout.trajectories)) for rollout in group.rollouts),
            repeated_tokens=sum(_repeated_tokens(rollout) for rollout in group.rollouts),
        )


def _turns(trajectory: Trajectory) -> int:
    """Return the number of its longest runs of sampled tokens."""
    sampled = trajectory.sampled
    return int(sampled[0]) + int((sampled[1:] & ~sampled[:-1]).sum())


def _repeated_tokens(rollout: RolloutRecord) -> int:
    """Return how many tokens its trajectories have at their beginnings in common with an earlier one, in total."""
    total, earlier = 0, list[Int32Array]()
    for trajectory in rollout.trajectories:
        whole = np.concatenate([trajectory.prompt_ids, trajectory.response_ids])
        total += max((_in_common(trajectory.prompt_ids, other) for other in earlier), default=0)
        earlier.append(whole)
    return total


def _in_common(some: Int32Array, other: Int32Array) -> int:
    shorter = min(len(some), len(other))
    differ = some[:shorter] != other[:shorter]
    return int(differ.argmax()) if differ.any() else shorter


def _totals(numbers: Sequence[Mapping[str, float]]) -> tuple[tuple[str, ...], tuple[float, ...], tuple[int, ...]]:
    """Return the names in ``numbers``, ascending, the sum of each, and how many mappings have it."""
    found: dict[str, list[float]] = {}
    for each in numbers:
        for name, value in each.items():
            found.setdefault(name, []).append(value)
    names = tuple(sorted(found))
    return names, tuple(math.fsum(found[name]) for name in names), tuple(len(found[name]) for name in names)


@dataclass(frozen=True, slots=True)
class BranchExcerpt:
    """One trajectory of a rollout, to be shown, without what it repeats of an earlier one."""

    trajectory_id: str
    origin: str
    """As in ``Trajectory``."""
    tools: tuple[str, ...]
    forks: int | None
    """Index of the trajectory that it forks; None for none."""
    shared_tokens: int
    """Tokens that it shares with that one."""
    prompt_ids: Int32Array
    """int32[P - shared_tokens]: the tokens behind those."""
    response_ids: Int32Array
    """int32[G]."""
    segments: tuple[tuple[int, int, int], ...]
    """(start, stop, policy version) of each segment."""
    finish_reason: FinishReason

    @classmethod
    def of(cls, rollout: RolloutRecord) -> tuple[BranchExcerpt, ...]:
        """Return the trajectories of a rollout; they share no memory with it."""
        made: list[BranchExcerpt] = []
        for number, trajectory in enumerate(rollout.trajectories):
            forks, shared = None, 0
            if trajectory.origin in FORKS:
                lengths = [_forked(earlier, trajectory) for earlier in rollout.trajectories[:number]]
                shared = max(lengths, default=0)
                forks = lengths.index(shared) if shared else None
            made.append(
                cls(
                    trajectory.trajectory_id,
                    trajectory.origin,
                    trajectory.tools,
                    forks,
                    shared,
                    trajectory.prompt_ids[shared:].copy(),
                    trajectory.response_ids.copy(),
                    _stamps(trajectory),
                    trajectory.finish_reason,
                )
            )
        return tuple(made)


@dataclass(frozen=True, slots=True)
class Excerpt:
    """One trajectory of a group, to be shown: text, and where it was resumed, without log-probs and routed experts."""

    trajectory_id: str
    prompt: str
    response_ids: Int32Array
    """int32[G]."""
    segments: tuple[tuple[int, int, int], ...]
    """(start, stop, policy version) of each segment."""
    reward: float
    """That of the rollout."""
    finish_reason: FinishReason
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    rollout_id: str = ""
    end: RolloutEnd = "done"
    """How the rollout ended."""
    branches: tuple[BranchExcerpt, ...] = ()
    """All trajectories of the rollout, this one among them, where there is more to tell of it than of one response: it
    is an agent's, or has several turns."""

    @classmethod
    def of(cls, group: Group, index: int) -> Excerpt:
        """Return the excerpt of one trajectory of a group; it shares no memory with the group."""
        rollout, trajectory = [(r, t) for r in group.rollouts for t in r.trajectories][index]
        return cls(
            trajectory.trajectory_id,
            group.prompt.text,
            trajectory.response_ids.copy(),
            _stamps(trajectory),
            rollout.reward,
            trajectory.finish_reason,
            dict(rollout.reward_parts),
            dict(rollout.metrics),
            rollout.rollout_id,
            rollout.end,
            BranchExcerpt.of(rollout) if trajectory.origin or not trajectory.sampled.all() else (),
        )


def _stamps(trajectory: Trajectory) -> tuple[tuple[int, int, int], ...]:
    return tuple((segment.start, segment.stop, segment.version) for segment in trajectory.segments)


def _forked(earlier: Trajectory, fork: Trajectory) -> int:
    """Return how many tokens a fork has of an earlier trajectory, up to the end of one of its turns; 0 for none.

    What the agent has added behind that may begin alike in both. Of a turn that ended by another token than the
    template writes, this one is left out.
    """
    left_out, prompt_ids = int(fork.origin == "stop_mismatch"), fork.prompt_ids
    whole = np.concatenate([earlier.prompt_ids, earlier.response_ids])
    shorter = min(len(whole), len(prompt_ids))
    differ = np.flatnonzero(whole[:shorter] != prompt_ids[:shorter])
    common = int(differ[0]) if len(differ) else shorter
    starts = {segment.start for segment in earlier.segments}
    ends = (len(earlier.prompt_ids) + segment.stop for segment in earlier.segments if segment.stop not in starts)
    return max((end - left_out for end in ends if end - left_out <= common), default=0)


@dataclass(frozen=True, slots=True)
class QueueStats:
    """The queue's figures at one moment, for metrics and for the watchdog."""

    version: int
    """The policy version whose window is open."""
    window_limit: int
    """Groups that the window admits."""
    window_groups: int
    """How much of window_limit is taken: outstanding groups, and those trained since the window opened."""
    counts: GroupCounts
    """The terms of invariant 5, since the run began."""
    queued_groups: int
    queued_bytes: int
    leased_groups: int
    held_bytes: int
    """Encoded bytes of queued and leased groups. Above max_bytes, there are no more than a training step needs."""
    max_groups: int
    """Bound on queued and leased groups together."""
    max_bytes: int
    in_flight: Mapping[str, int]
    """{worker: groups in flight}."""
    oldest_version: int | None
    """The oldest version of a group in flight (when it was issued) or queued (its oldest token); None without any."""
    returned: Mapping[str, int]
    """{reason: groups} whose prompts went back into circulation; ``dropped`` are those of them that were finished."""
    dropped: Mapping[str, int]
    failed: Mapping[str, int]
    """{reason: groups} whose prompts were given up."""
    filtered: Mapping[str, int]
    """{reason: groups} that would have taught nothing (rollout.filter), and whose prompts are done."""
    refusal: str | None
    """Why no ticket can be issued now; None if one can."""
    exhausted: bool
    """Whether the dataset had no prompt left when last asked."""
    issued_by_source: Mapping[str, int] = field(default_factory=dict)
    """{source: groups issued} of data.sources; empty without them."""
    take_wait_s: float = 0.0
    """Seconds that workers have waited for tickets so far, summed over workers."""
    pid: int = 0
    """The queue process."""
