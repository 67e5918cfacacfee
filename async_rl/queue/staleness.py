"""The staleness budget, pure: how much may be outstanding, and how old a token may be.

Two settings with two meanings. A training step consumes ``required`` groups (trainer.groups_per_step x
async_training.require_batches), weights are synced every ``trigger_parameter_sync_step`` steps, and the time
between two weight syncs is a *version window*.

Admission (soft, ``staleness_threshold``) bounds how far generation may run ahead. Per window at most

    limit = required x (1 + staleness_threshold) x trigger_parameter_sync_step

groups are admitted: those still outstanding (in flight, queued or leased) when the window opened, plus those
issued since, minus those returned, failed or filtered since. Only training ends a group otherwise, so that count is
always "outstanding now + trained in this window", and is computed as that.

Bound (hard, ``max_staleness``) says what may contribute a gradient: a token sampled under version v may be
trained under version c only if c - v <= max_staleness. Admission makes old tokens rare, the bound makes them
harmless.

Example: required = 16, trigger_parameter_sync_step = 1, staleness_threshold = 0.5, max_staleness = 1; limit =
24. Window 0 opens with nothing outstanding and admits 24 groups. The trainer takes the first 16 that finish;
nothing replaces them, since a trained group keeps its place in the window: 8 outstanding + 16 trained = 24.
The weight sync opens window 1 with 8 outstanding, which admits 16 new ones. If one of the 8 were still unfinished in
window 2, its tokens of version 0 would be two versions old, over the bound: they are masked (on_stale=mask),
or the group is dropped and its prompt issued again (drop). With staleness_threshold = 0 the limit is 16: once
the 16 are trained, nothing is admitted until the weight sync. That is synchronous training, where every token has
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
    """Return the groups admitted per version window, never fewer than the window's training steps consume.

    Exact for the decimal that the user wrote: in floating point, 100 x (1 + 0.15) is 114.99999999999999.
    """
    if not 0 <= staleness_threshold < math.inf:
        raise ConfigError(f"async_training.staleness_threshold: {staleness_threshold} is not a finite number >= 0")
    consumed = required_groups * trigger_parameter_sync_step
    return math.floor(consumed * (1 + Fraction(repr(float(staleness_threshold)))))


def free_slots(limit: int, outstanding: int, trained_in_window: int) -> int:
    """Return the number of groups that may be issued now."""
    return max(0, limit - outstanding - trained_in_window)


def oldest_allowed_version(consuming_version: int, max_staleness: int) -> int:
    """Return the oldest version whose tokens may contribute to a training step of ``consuming_version``."""
    return consuming_version - max_staleness


def staleness_mask(versions: Int32Array, oldest_allowed: int) -> npt.NDArray[np.bool_]:
    """Return bool[G], True where a token may contribute a gradient, from the versions int32[G] that sampled them."""
    return versions >= oldest_allowed


def is_stale(oldest_version: int, newest_version: int, oldest_allowed: int, on_stale: OnStale) -> bool:
    """Return whether a group must be dropped: for ``drop`` if any token is over the bound, for ``mask`` if all are."""
    return (oldest_version if on_stale == "drop" else newest_version) < oldest_allowed
