"""What an engine call reads that was computed before: the beginning of its context, by an earlier call of its rollout.

An engine that has lost it from its cache computes it again. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from async_rl.rollout.partial import PartialRollout
from async_rl.types import Int32Array


class Computed(NamedTuple):
    """The first tokens of a context, which an earlier call has computed."""

    tokens: int = 0
    version: int = -1
    """The policy version of the weights that computed the last of them."""


def computed(partial: PartialRollout) -> Computed:
    """Return what the calls of a trajectory have computed of it: all before the token that was sampled last."""
    if not partial.segments:
        return Computed()
    last = partial.segments[-1]
    return Computed(len(partial.prompt_ids) + last.stop - 1, last.version)


def in_common(prompt: Int32Array, others: Iterable[PartialRollout]) -> tuple[int, Computed]:
    """Return how many tokens of a ``prompt``, int32[P], another trajectory begins with, and what of these it computed.

    It is the one that has the most of them.
    """
    best, found = 0, Computed()
    for other in others:
        count = _common(prompt, other)
        if count > best:
            done = computed(other)
            best, found = count, Computed(min(count, done.tokens), done.version)
    return best, found


def _common(prompt: Int32Array, other: PartialRollout) -> int:
    count = 0
    for part in (other.prompt_ids, other.response_ids):
        rest = prompt[count : count + len(part)]
        differ = np.flatnonzero(rest != part[: len(rest)])
        if len(differ):
            return count + int(differ[0])
        count += len(rest)
    return count
