"""Reads values from a row of metrics.jsonl: a missing value, or one that is no number, is None, and nothing raises.

A row is one training step (``metrics.publish.step_row``), perhaps of another version, perhaps damaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from async_rl.config.inputs import HELD_OUT

Row = dict[str, Any]
Number = float | None
Read = Callable[[Row], Number]


def as_number(value: Any) -> Number:
    """Return the value if it is a finite number below 1e300, beyond which no scale can be drawn; else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e300 else None


def of(*keys: str) -> Read:
    """Return a function that reads the number that a row has under ``keys``, one mapping in the other."""

    def read(row: Row) -> Number:
        value: Any = row
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return as_number(value)

    return read


def split(row: Row, key: str) -> dict[str, float]:
    """Return the numbers of a row's mapping by name."""
    found = row.get(key)
    known = {name: as_number(value) for name, value in found.items()} if isinstance(found, dict) else {}
    return {name: value for name, value in known.items() if value is not None}


def evals(row: Row) -> dict[str, float]:
    """Return the mean rewards of the evaluations that ended in the step, by set; the set of data.eval is the first."""
    held_out = as_number(row.get("eval_reward_mean"))
    return ({} if held_out is None else {HELD_OUT: held_out}) | split(row, "eval_avg")


def tokens(row: Row) -> dict[int, float]:
    """Return trained tokens by staleness."""
    # A longer key is no version, and may have more digits than an int can be parsed from.
    ages = split(row, "token_staleness").items()
    return {int(age): count for age, count in ages if age.isdecimal() and len(age) < 10}


def kl(row: Row, *, stale: bool) -> Number:
    """Return the mean ppo_kl over the tokens of staleness 0, or over all older ones; None if there are none."""
    values, counts = split(row, "ppo_kl_by_staleness"), tokens(row)
    parts = [(values[str(age)], counts[age]) for age in counts if (age > 0) == stale and str(age) in values]
    weight = math.fsum(count for _, count in parts)
    return math.fsum(value * count for value, count in parts) / weight if weight > 0 else None


def kl_size(*, stale: bool) -> Read:
    """Return a function that reads |``kl``|: estimates of either sign would cancel in a mean."""

    def read(row: Row) -> Number:
        value = kl(row, stale=stale)
        return None if value is None else abs(value)

    return read


def partial_share(row: Row) -> Number:
    """Return the share of the step's trajectories that were cut and resumed."""
    partial, trajectories = as_number(row.get("partial_rollouts")), as_number(row.get("trajectories"))
    return partial / trajectories if partial is not None and trajectories else None
