"""Deltas of memory: applied to the old bits they give the new ones, whatever these are, in the smallest form."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from async_rl.errors import WeightSyncError
from async_rl.weights import delta

HEAD_BYTES = 22
# Elements without a change between two that have one: at the borders of what one number of a gap can say.
GAPS = st.sampled_from([0, 1, 7, 254, 255, 256, 509, 510, 511, 65534, 65535, 65536, 131070])
# Of bfloat16: quiet and signalling NaNs of both signs, zeros, infinities, the smallest number.
SPECIAL = (0x7FC0, 0xFFC0, 0x7F81, 0xFFFF, 0x0000, 0x8000, 0x7F80, 0xFF80, 0x0001)


def trip(old, new, width, position=0):
    """Apply the delta of a stretch at ``position`` to memory that holds the old one; return memory and block."""
    where = delta.changed(old, new, width)
    block = delta.encode(new, where, width, position)
    memory = np.concatenate([np.full(position, 7, np.uint8), old, np.full(5, 9, np.uint8)])
    delta.apply(np.frombuffer(block, np.uint8), memory)
    assert (memory[:position] == 7).all()
    assert (memory[position + len(old) :] == 9).all()
    return memory[position : position + len(old)], block


@given(st.lists(GAPS, min_size=1, max_size=6), GAPS, st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**32))
def test_gaps_of_any_length_survive(gaps, rest, width, seed):
    where = np.cumsum(np.array(gaps) + 1) - 1
    old = np.random.default_rng(seed).integers(0, 256, (int(where[-1]) + 1 + rest) * width, dtype=np.uint8)
    new = old.copy()
    new.view(f"<u{width}")[where] += 1
    assert delta.changed(old, new, width).tolist() == where.tolist()
    found, _ = trip(old, new, width, position=8 * (seed % 3))
    assert found.tobytes() == new.tobytes()


@given(st.data(), st.sampled_from(["bfloat16", "float32", "float8_e4m3fn", "int64", "bool"]), st.floats(0, 1))
def test_updates_of_any_share_of_any_type_are_exact(data, dtype, share):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    width = delta.width_of(getattr(torch, dtype).itemsize)
    old = rng.integers(0, 256, int(rng.integers(1, 3000)) * width, dtype=np.uint8)
    new = np.where(np.repeat(rng.random(len(old) // width) < share, width), rng.integers(0, 256, len(old)), old)
    new = new.astype(np.uint8)
    if not len(delta.changed(old, new, width)):
        assert new.tobytes() == old.tobytes()
        return
    found, block = trip(old, new, width)
    assert found.tobytes() == new.tobytes()
    assert len(block) <= HEAD_BYTES + len(new)


def test_bits_decide_and_not_values():
    """A NaN that stays is no change; a zero that changes its sign, and a NaN that changes its bits, are."""
    old = np.array([a for a in SPECIAL for _ in SPECIAL], dtype="<u2")
    new = np.array([b for _ in SPECIAL for b in SPECIAL], dtype="<u2")
    a, b = (torch.from_numpy(each.view(np.int16).copy()).view(torch.bfloat16) for each in (old, new))
    assert bool((a != b)[0])  # as values, a NaN differs from itself
    assert len(delta.changed(old.view(np.uint8), new.view(np.uint8), 2)) == len(SPECIAL) * (len(SPECIAL) - 1)
    found, _ = trip(old.view(np.uint8), new.view(np.uint8), 2)
    assert found.tobytes() == new.tobytes()


@pytest.mark.parametrize(
    ("share", "index_bytes"),
    [
        (1.0, lambda n, k: 0),  # all
        (0.5, lambda n, k: n // 8),  # a mask
        (0.01, lambda n, k: 1.2 * k),  # one byte for nearly each
        (0.0005, lambda n, k: 2 * k),  # two bytes
    ],
)
def test_the_index_takes_its_smallest_form(share, index_bytes):
    rng, n = np.random.default_rng(0), 2**20
    where = np.flatnonzero(rng.random(n) < share)
    old, new = np.zeros(n, "<u2"), np.zeros(n, "<u2")
    new[where] = 1
    found, block = trip(old.view(np.uint8), new.view(np.uint8), 2)
    assert found.tobytes() == new.tobytes()
    assert len(block) <= HEAD_BYTES + 2 * len(where) + index_bytes(n, len(where))


def test_blocks_are_applied_one_after_the_other():
    old = np.zeros(64, np.uint8)
    new = np.arange(64, dtype=np.uint8)
    blocks = [delta.encode(new[a : a + 16], delta.changed(old[:16], new[a : a + 16], 2), 2, a) for a in (48, 0, 16, 32)]
    memory = old.copy()
    delta.apply(np.frombuffer(b"".join(blocks), np.uint8), memory)
    assert memory.tobytes() == new.tobytes()


def block(*, position=0, total=8, count=2, index=b"\x00\x02", width=2, kind=2, values=b"abcd"):
    return struct.pack("<QIIIBB", position, total, count, len(index), width, kind) + index + values


@pytest.mark.parametrize(
    "data",
    [
        block()[:-1],
        block()[:10],
        block(values=b""),
        block() + b"x",
        block(position=2**40),
        block(position=6),  # reaches beyond the memory
        block(total=2),  # names the fourth element of two
        block(count=1, values=b"ab"),
        block(kind=0, count=1, index=b"", values=b"ab"),
        block(width=3),
        block(kind=0),
        block(kind=7),
        block(index=b"\xff\xff"),
        block(index=b"\x00", kind=1),
    ],
)
def test_what_is_no_delta_of_this_memory_is_refused(data):
    delta.apply(np.frombuffer(block(), np.uint8), np.zeros(16, np.uint8))
    with pytest.raises(WeightSyncError, match="no delta of a memory of 16 bytes"):
        delta.apply(np.frombuffer(data, np.uint8), np.zeros(16, np.uint8))
