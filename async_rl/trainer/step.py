"""An optimizer update under way: what was counted of this rank's groups, summed over its tokens, and timed. Pure: knows
``packing`` and ``policy_sums``; neither the model nor other ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from async_rl.errors import TrainerError
from async_rl.trainer import packing
from async_rl.trainer.packing import Microbatch, Packer
from async_rl.trainer.policy_sums import PolicySums
from async_rl.trainer.samples import Sample
from async_rl.types import Group

COUNTS = (
    "tokens",
    "sampled",
    "not_sampled",
    "sequences",
    "extra_positions",
    "groups",
    "trajectories",
    "microbatches",
    "fallback",
    "positions",
    "padding",
    "cost",
)


@dataclass(slots=True)
class Step:
    """counts: of this rank's groups, by the names in ``COUNTS``; seconds: by phase."""

    version: int
    oldest_version: int
    sums: PolicySums
    packer: Packer
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    seconds: dict[str, float] = field(default_factory=dict)

    def check_versions(self, groups: Sequence[Group]) -> None:
        """Raise TrainerError for a token of a policy later than the one that consumes it."""
        for group in groups:
            for trajectory in group.trajectories:
                newest = int(trajectory.versions.max())
                if newest > self.version:
                    raise TrainerError(
                        f"trajectory {trajectory.trajectory_id}: tokens of version {newest}, consumed at version "
                        f"{self.version}; its stamps or the trainer's version are wrong"
                    )

    def count_groups(self, groups: Sequence[Group], samples: Sequence[Sample]) -> None:
        """samples: what these groups are trained on."""
        trajectories = [t for group in groups for t in group.trajectories]
        sampled = sum(int(t.sampled.sum()) for t in trajectories)
        views: dict[str, list[int]] = {}
        for sample in samples:
            views.setdefault(sample.trajectory_id, []).append(sample.positions)
        self._add(
            tokens=sum(int(sample.loss_mask.sum()) for sample in samples),
            sampled=sampled,
            not_sampled=sum(len(t.response_ids) for t in trajectories) - sampled,
            # The last view of a trajectory is all of it that is trained, the others are prefixes of that.
            extra_positions=sum(sum(positions[:-1]) for positions in views.values()),
            sequences=len(views),
            groups=len(groups),
            trajectories=len(trajectories),
        )

    def count_microbatches(self, batches: Sequence[Microbatch], sequence_cost: Callable[[int], float]) -> None:
        """sequence_cost: of a sequence of so many positions; see ModelConfig."""
        self._add(
            microbatches=len(batches),
            padding=sum(batch.padding for batch in batches),
            positions=sum(len(batch) for batch in batches),
            cost=sum(sequence_cost(positions) for batch in batches for positions in batch.positions),
            fallback=sum(packing.rows_without_routing(batch) for batch in batches),
        )

    def lap(self, phase: str, started: float) -> float:
        """Add the time since ``started`` (of time.perf_counter) to ``phase``. Returns the time now."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - started
        return now

    def _add(self, **counts: float) -> None:
        for name, value in counts.items():
            self.counts[name] += value
