"""The staleness budget, pure: how much may be outstanding, and how old a token may be.

Two knobs with two meanings. A training step consumes ``required`` groups (trainer.groups_per_step x
async_training.require_batches), weights are pushed every ``trigger_parameter_sync_step`` steps, and the time
between two pushes is a *version window*.

Admission (soft, ``staleness_threshold``) bounds how far generation may run ahead. Per window at most

    limit = required x (1 + staleness_threshold) x trigger_parameter_sync_step

groups are admitted: those still outstanding (running, queued or leased) when the window opened, plus those
issued since, minus those given back or failed since. Nothing else ends a group but training, so that count is
always "outstanding now + trained in this window", and is computed so.

Bound (hard, ``max_staleness``) says what may contribute a gradient: a token sampled under version v may be
trained under version c only if c - v <= max_staleness. Admission makes old tokens rare, the bound makes them
harmless.

Example: required = 16, trigger_parameter_sync_step = 1, staleness_threshold = 0.5, max_staleness = 1; limit =
24. Window 0 opens with nothing outstanding and admits 24 groups. The trainer takes the first 16 that finish;
nothing replaces them, since a trained group keeps its place in the window: 8 outstanding + 16 trained = 24.
The push opens window 1 with 8 outstanding, which admits 16 new ones. If one of the 8 were still unfinished in
window 2, its tokens of version 0 would be two versions old, over the bound: they are masked (on_stale=mask),
or the group is dropped and its prompt issued again (drop). With staleness_threshold = 0 the limit is 16: once
the 16 are trained, nothing is admitted until the push. That is synchronous training, where every token has
staleness 0.

Knows no queue, no actor and no clock.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

from async_rl.errors import ConfigError
from async_rl.types import Int32Array

OnStale = Literal["mask", "drop"]


def window_limit(required_groups: int, staleness_threshold: float, trigger_parameter_sync_step: int) -> int:
    """Groups admitted per version window; never fewer than the window's training steps consume.

    Exact for the decimal that the user wrote: in floating point, 100 x (1 + 0.15) is 114.99999999999999.
    """
    if not 0 <= staleness_threshold < math.inf:
        raise ConfigError(f"async_training.staleness_threshold: {staleness_threshold} is not a finite number >= 0")
    consumed = required_groups * trigger_parameter_sync_step
    return math.floor(consumed * (1 + Fraction(repr(float(staleness_threshold)))))


def free_slots(limit: int, outstanding: int, trained_in_window: int) -> int:
    """Groups that may be issued now."""
    return max(0, limit - outstanding - trained_in_window)


def oldest_allowed_version(consuming_version: int, max_staleness: int) -> int:
    """The oldest version whose tokens may contribute to a step that ``consuming_version`` takes."""
    return consuming_version - max_staleness


def staleness_mask(versions: Int32Array, oldest_allowed: int) -> npt.NDArray[np.bool_]:
    """bool[G]: True where a token, by the version that sampled it (int32[G]), may contribute a gradient."""
    return versions >= oldest_allowed


def is_stale(oldest_version: int, newest_version: int, oldest_allowed: int, on_stale: OnStale) -> bool:
    """Whether a group must go: ``drop`` if any of its tokens is over the bound, ``mask`` if all are."""
    return (oldest_version if on_stale == "drop" else newest_version) < oldest_allowed
