"""What has changed in a stretch of memory, as blocks: the elements whose bits differ, and their new bits. Pure.

    block    head, index, values
    head     position in the memory, elements, elements that have changed, bytes of the index, element width, index kind
    index    which elements have changed, in the smallest of the forms below
    values   the new bits of those, in order

Elements are compared and carried as unsigned integers, so that a NaN, a negative zero or a type without arithmetic is
a pattern of bits like any other: memory to which the blocks are applied is equal to the new memory bit for bit.

    all      no index: every element is given
    mask     a bit for each element
    gaps     before each changed element, how many have not: a number of 1 or 2 bytes. The largest number stands for as
             many unchanged elements and no changed one, so that a gap may have any length
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from async_rl.errors import WeightSyncError
from async_rl.weights.buckets import Array

# What is computed of a block stays in a core's caches, while the head's 22 bytes are nothing beside it.
BLOCK_BYTES = 2 * 2**20

_HEAD = struct.Struct("<QIIIBB")
_ALL, _MASK, _GAPS_8, _GAPS_16 = range(4)
_GAPS: dict[int, npt.DTypeLike] = {_GAPS_8: np.dtype("<u1"), _GAPS_16: np.dtype("<u2")}
_WIDTHS: dict[int, npt.DTypeLike] = {width: np.dtype(f"<u{width}") for width in (1, 2, 4, 8)}

Indices = np.ndarray[Any, np.dtype[np.int64]]


def width_of(itemsize: int) -> int:
    """Return the width at which elements of so many bytes are compared."""
    return min(itemsize, max(_WIDTHS))


def changed(old: Array, new: Array, width: int) -> Indices:
    """Return the indices int64[k] of the elements of ``width`` bytes whose bits differ in uint8[n] and uint8[n]."""
    return np.flatnonzero(old.view(_WIDTHS[width]) != new.view(_WIDTHS[width]))


def encode(new: Array, where: Indices, width: int, position: int) -> bytes:
    """Return the block that sets the elements at ``where`` int64[k], k > 0, to those of ``new`` uint8[n].

    ``position`` is that of the stretch in the memory. At most ``BLOCK_BYTES`` have a block.
    """
    values = new.view(_WIDTHS[width])
    count, total = len(where), len(values)
    gaps = np.diff(where, prepend=-1) - 1
    sizes = {_ALL: (total - count) * width, _MASK: -(-total // 8)}
    sizes |= {kind: _gap_bytes(gaps, kind) for kind in _GAPS}
    kind = min(sizes, key=lambda each: sizes[each])
    if kind == _ALL:
        count, index, given = total, b"", values
    else:
        given = values[where]
        index = _mask(where, total) if kind == _MASK else _gaps(gaps, kind)
    return _HEAD.pack(position, total, count, len(index), width, kind) + index + given.tobytes()


def apply(blocks: Array, memory: Array) -> None:
    """Apply blocks, one after the other in uint8[n], to ``memory`` uint8[m] in place.

    Raises WeightSyncError for what is not a series of blocks for such a memory.
    """
    at = 0
    while at < len(blocks):
        try:
            position, total, count, index_bytes, width, kind = _HEAD.unpack_from(blocks.data, at)
            index = blocks[at + _HEAD.size : at + _HEAD.size + index_bytes]
            at += _HEAD.size + index_bytes
            values = blocks[at : at + count * width].view(_WIDTHS[width])
            at += count * width
            target = memory[position : position + total * width].view(_WIDTHS[width])
            if len(index) != index_bytes or len(values) != count or len(target) != total:
                raise ValueError("a block is cut off, or lies outside of the memory")
            if kind == _ALL and count == total:
                target[:] = values
                continue
            where = _unmask(index, total) if kind == _MASK else _positions(index, kind)
            if len(where) != count:
                raise ValueError("the index of a block names more or fewer elements than it has values")
            target[where] = values
        except (struct.error, ValueError, KeyError, IndexError) as error:
            raise WeightSyncError(f"weights: no delta of a memory of {len(memory)} bytes: {error}") from error


def _mask(where: Indices, total: int) -> bytes:
    flags = np.zeros(total, dtype=np.bool_)
    flags[where] = True
    return np.packbits(flags, bitorder="little").tobytes()


def _unmask(index: Array, total: int) -> Indices:
    return np.flatnonzero(np.unpackbits(index, count=total, bitorder="little"))


def _gap_bytes(gaps: Indices, kind: int) -> int:
    number = np.dtype(_GAPS[kind])
    return int(len(gaps) + (gaps // np.iinfo(number).max).sum()) * number.itemsize


def _gaps(gaps: Indices, kind: int) -> bytes:
    most = np.iinfo(np.dtype(_GAPS[kind])).max
    whole, rest = np.divmod(gaps, most)
    ends = np.cumsum(whole + 1) - 1  # where the number of each changed element is, after those that only skip
    numbers = np.full(ends[-1] + 1, most, dtype=_GAPS[kind])
    numbers[ends] = rest
    return numbers.tobytes()


def _positions(index: Array, kind: int) -> Indices:
    numbers = index.view(_GAPS[kind])
    changes = numbers != np.iinfo(numbers.dtype).max
    positions: Indices = (np.cumsum(numbers.astype(np.int64) + changes) - 1)[changes]
    return positions
