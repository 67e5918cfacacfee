"""Keeps the state of one optimizer update between its calls: counts, sums over tokens, and times of this rank.

Pure: knows ``samples``, ``packing`` and ``policy_sums``; knows neither the model nor other ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from async_rl.errors import TrainerError
from async_rl.trainer import packing
from async_rl.trainer.packing import Microbatch, Packer
from async_rl.trainer.policy_sums import PolicySums
from async_rl.trainer.samples import Sample, trained_tokens
from async_rl.types import Group, RolloutRecord

COUNTS = (
    "tokens",
    "sampled",
    "not_sampled",
    "zero_advantage",
    "truncated",
    "rejected",
    "not_trainable",
    "counting_rollouts",
    "extra_positions",
    "groups",
    "counting_groups",
    "trajectories",
    "microbatches",
    "fallback",
    "positions",
    "padding",
    "cost",
)


@dataclass(slots=True)
class Step:
    """One optimizer update of this rank, from ``begin_step`` to ``finish_step``."""

    version: int
    """The policy version that consumes the tokens."""
    oldest_version: int
    """Tokens of earlier versions contribute nothing."""
    sums: PolicySums
    """Sums over the tokens computed so far."""
    packer: Packer
    """Holds the samples that have not been computed yet."""
    ready: list[Microbatch] = field(default_factory=list)
    """Full microbatches that have not been computed yet."""
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    """Counts over this rank's groups, by the names in ``COUNTS``."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by phase."""

    def take_ready(self) -> list[Microbatch]:
        """Return the microbatches that are ready, and keep none."""
        taken, self.ready = self.ready, []
        return taken

    def check_versions(self, groups: Sequence[Group]) -> None:
        """Raise TrainerError for a token of a policy later than the one that consumes it."""
        for group in groups:
            for trajectory in group.trajectories:
                newest = int(trajectory.versions.max())
                if newest > self.version:
                    raise TrainerError(
                        f"trajectory {trajectory.trajectory_id}: tokens of version {newest}, consumed at version "
                        f"{self.version}; either the engine's version stamps or the trainer's version counter is wrong"
                    )

    def count_groups(self, groups: Sequence[Group], samples: Sequence[Sample]) -> None:
        """Count these groups, which are trained as ``samples``."""
        trajectories = [t for group in groups for t in group.trajectories]
        rollouts = [rollout for group in groups for rollout in group.trainable]
        trained = [t for rollout in rollouts for t in rollout.trajectories]
        sampled = sum(int(t.sampled.sum()) for t in trajectories)
        positions: dict[str, list[int]] = {}  # of each trajectory's samples
        for sample in samples:
            positions.setdefault(sample.trajectory_id, []).append(sample.positions)

        def counts(rollout: RolloutRecord) -> bool:
            return any(t.trajectory_id in positions for t in rollout.trajectories)

        self._add(
            tokens=sum(int(sample.loss_mask.sum()) for sample in samples),
            sampled=sampled,
            not_sampled=sum(len(t.response_ids) for t in trajectories) - sampled,
            not_trainable=sampled - sum(int(t.sampled.sum()) for t in trained),
            # A truncated rollout has samples unless trainer.mask_truncated leaves it out, or all of it is stale.
            truncated=sum(
                int(trained_tokens(t, self.oldest_version).sum())
                for rollout in rollouts
                if rollout.end == "truncated" and not counts(rollout)
                for t in rollout.trajectories
            ),
            # A trajectory's last sample is all of it that is trained, the others are prefixes of that.
            extra_positions=sum(sum(of_samples[:-1]) for of_samples in positions.values()),
            counting_rollouts=sum(map(counts, rollouts)),
            groups=len(groups),
            counting_groups=sum(any(map(counts, group.trainable)) for group in groups),
            trajectories=len(trajectories),
        )

    def count_rejected(self, tokens: int) -> None:
        """Count tokens that were left out before any loss was computed."""
        self._add(rejected=tokens)

    def with_gradient(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples that have an advantage, and count the tokens of the others."""
        kept = [sample for sample in samples if sample.advantages.any()]
        tokens = sum(int(sample.loss_mask.sum()) for sample in samples) - sum(int(s.loss_mask.sum()) for s in kept)
        self._add(zero_advantage=tokens)
        return kept

    def count_microbatches(self, batches: Sequence[Microbatch], sequence_cost: Callable[[int], float]) -> None:
        """Count these microbatches. sequence_cost: ModelConfig.sequence_cost."""
        self._add(
            microbatches=len(batches),
            padding=sum(batch.padding for batch in batches),
            positions=sum(len(batch) for batch in batches),
            cost=sum(sequence_cost(positions) for batch in batches for positions in batch.positions),
            fallback=sum(packing.rows_without_routing(batch) for batch in batches),
        )

    def lap(self, phase: str, started: float) -> float:
        """Add the seconds since ``started`` (a time.perf_counter) to ``phase``, and return the time now."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - started
        return now

    def _add(self, **counts: float) -> None:
        for name, value in counts.items():
            self.counts[name] += value


def masked_tokens(total: Mapping[str, float], *, rejected: float) -> dict[str, int]:
    """Return the response tokens kept out of the loss by reason, from the counts of all ranks.

    rejected: those that the loss itself left out.
    """
    stale = int(total["sampled"] - total["tokens"] - total["truncated"] - total["not_trainable"])
    masked = {"stale": stale, "not_sampled": int(total["not_sampled"])}
    further = {reason: int(total[reason]) for reason in ("zero_advantage", "truncated", "not_trainable")}
    further["rejected"] = int(total["rejected"] + rejected)
    return masked | {reason: tokens for reason, tokens in further.items() if tokens}
