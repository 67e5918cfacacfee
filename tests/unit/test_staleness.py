"""The staleness budget: what a window admits, and which tokens may contribute."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.errors import ConfigError
from async_rl.queue.staleness import free_slots, is_stale, oldest_allowed_version, staleness_mask, window_limit


@pytest.mark.parametrize(
    ("required", "threshold", "steps", "limit"),
    [
        (16, 0.5, 1, 24),  # the docstring's example
        (16, 0.0, 1, 16),
        (16, 0.0, 4, 64),
        (3, 0.5, 1, 4),  # floor of 4.5
        (1, 0.9, 1, 1),
        (100, 0.15, 1, 115),  # 114.99999999999999 in floating point
        (10, 1e-05, 1, 10),
        (8, 2.0, 3, 72),
    ],
)
def test_window_limit(required, threshold, steps, limit):
    assert window_limit(required, threshold, steps) == limit


@pytest.mark.parametrize("threshold", [-0.1, float("inf"), float("nan")])
def test_window_limit_refuses_what_is_no_threshold(threshold):
    with pytest.raises(ConfigError, match=r"async_training\.staleness_threshold"):
        window_limit(16, threshold, 1)


@given(st.integers(1, 512), st.floats(0, 8), st.integers(1, 8))
def test_window_limit_never_below_what_the_window_consumes(required, threshold, steps):
    limit = window_limit(required, threshold, steps)
    assert limit >= required * steps
    assert limit <= required * steps * (1 + threshold) * (1 + 1e-12)


def test_the_docstrings_example_window_by_window():
    limit = window_limit(16, 0.5, 1)
    assert free_slots(limit, outstanding=0, trained_in_window=0) == 24
    assert free_slots(limit, outstanding=8, trained_in_window=16) == 0  # trained groups keep their place
    assert free_slots(limit, outstanding=8, trained_in_window=0) == 16  # until the push


def test_free_slots_is_never_negative():
    assert free_slots(4, outstanding=3, trained_in_window=3) == 0


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(0, 50), st.integers(0, 10))
def test_invariant_4_mask_passes_no_token_over_the_bound(versions, consuming, max_staleness):
    mask = staleness_mask(np.array(versions, dtype=np.int32), oldest_allowed_version(consuming, max_staleness))
    assert mask.dtype == np.bool_
    assert mask.tolist() == [consuming - version <= max_staleness for version in versions]


@pytest.mark.parametrize(
    ("oldest", "newest", "drop", "mask"),
    [(5, 7, False, False), (4, 5, True, False), (4, 4, True, True), (1, 9, True, False)],
)
def test_a_group_goes_with_any_stale_token_or_with_all(oldest, newest, drop, mask):
    assert is_stale(oldest, newest, oldest_allowed=5, on_stale="drop") is drop
    assert is_stale(oldest, newest, oldest_allowed=5, on_stale="mask") is mask
