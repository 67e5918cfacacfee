"""The wire format of everything that carries arrays: ``pack`` to one contiguous buffer, ``unpack`` to views on it.

    0         4        8          16       24            28    32        payload: the next multiple of 64
    | magic   | schema | checksum | length | table bytes | 0   | table   | array | pad | array | ...
      4 bytes   u32      u64        u64      u32           u32   msgpack   raw little-endian bytes

All integers are little-endian. ``magic`` says what is carried, ``schema`` is the version of everything that follows;
``length`` is that of the whole message; ``checksum`` is xxh3_64 of every byte from ``length`` to the end, so that no
byte is unprotected: the first eight are compared with what they must be. It detects accidents, it does not
authenticate.

The table is a msgpack map: what is not an array, and under "arrays" one entry [name, dtype, shape, offset] per array.
Offsets count from the start of the payload, which is 64-byte-aligned (a cache line, and how Ray aligns buffers), as is
each array in it. Arrays lie in the order of the table, each right behind the one before: a table that points outside,
overlaps or leaves a gap is refused by comparing one number. Lengths are real: nothing is padded to a maximum, only up
to the next 64 bytes.

Unpacking copies nothing and runs no code of the sender: no pickle. The size is bounded before anything is read, and
what is wrong with a message, whatever it is, is a ``WireError``. Knows ``errors`` alone; what the table and the arrays
mean is ``codec``'s for groups, ``rollout.in_flight``'s for groups that are not finished.
"""

from __future__ import annotations

import math
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgpack
import numpy as np
import numpy.typing as npt
import xxhash

from async_rl.errors import WireError

MAX_MESSAGE_BYTES = 2**30
"""Half of the queue's default byte bound; a group of 8 x 32k tokens with [48, 8] routing is a tenth of it."""

_PREAMBLE = struct.Struct("<4sIQQII")
_CHECKED_FROM = 16  # right behind the checksum
_ALIGN = 64
_DTYPES = ("<i4", "<f4", "|u1", "<u2")
_MAX_NDIM = 3

Buffer = bytes | bytearray | memoryview | npt.NDArray[np.uint8]
Array = npt.NDArray[Any]
_T = TypeVar("_T")
_REPR = reprlib.Repr()  # it stops at a depth and a length, where repr itself would not
_REPR.maxstring = _REPR.maxother = 80
_MAX_DEPTH = 64  # of what a table holds


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of message. what: its name in error messages."""

    magic: bytes
    schema: int
    what: str


def pack(
    kind: Kind, name: str, table: Mapping[str, Any], arrays: Mapping[str, Array], max_bytes: int = MAX_MESSAGE_BYTES
) -> npt.NDArray[np.uint8]:
    """The message, uint8[N]: one allocation, each array copied once. ``name`` is for error messages.

    Raises WireError where the message would exceed ``max_bytes``, or holds what msgpack or the format cannot carry.
    """
    entries: list[tuple[str, str, tuple[int, ...], int]] = []
    end = 0
    for field, array in arrays.items():
        if array.dtype.str not in _DTYPES or array.ndim > _MAX_NDIM:
            raise WireError(f"{name}: {field} is {array.dtype}{list(array.shape)}, which has no wire format")
        offset = _aligned(end)
        entries.append((field, array.dtype.str, array.shape, offset))
        end = offset + array.nbytes
    packed = _pack_table(name, {**table, "arrays": entries})
    payload = _aligned(_PREAMBLE.size + len(packed))
    length = payload + end
    if length > max_bytes:
        raise WireError(f"{name}: {length} bytes, more than the {max_bytes} allowed for one message")

    message = np.empty(length, dtype=np.uint8)
    filled = _PREAMBLE.size + len(packed)
    message[_PREAMBLE.size : filled] = np.frombuffer(packed, dtype=np.uint8)
    for (_, dtype, shape, offset), array in zip(entries, arrays.values(), strict=True):
        start = payload + offset
        message[filled:start] = 0  # padding is checksummed, and must not leak what lay in memory before
        filled = start + array.nbytes
        message[start:filled].view(np.dtype(dtype)).reshape(shape)[...] = array
    message[filled:] = 0  # where there is no array, what follows the table
    _PREAMBLE.pack_into(message.data, 0, kind.magic, kind.schema, 0, length, len(packed), 0)
    checksum = xxhash.xxh3_64_intdigest(message[_CHECKED_FROM:].data)
    _PREAMBLE.pack_into(message.data, 0, kind.magic, kind.schema, checksum, length, len(packed), 0)
    return message


def unpack(kind: Kind, buffer: Buffer, max_bytes: int = MAX_MESSAGE_BYTES) -> tuple[dict[str, Any], dict[str, Array]]:
    """(table, arrays by name); the arrays are read-only views that keep ``buffer`` alive.

    Raises WireError for anything but a whole, intact message of this kind and schema and at most ``max_bytes``.
    """
    message = _as_bytes(buffer)
    length = len(message)
    if length > max_bytes:
        raise WireError(f"message of {length} bytes, more than the {max_bytes} allowed")
    if length < _PREAMBLE.size:
        raise WireError(f"message of {length} bytes is truncated: the preamble alone has {_PREAMBLE.size}")
    magic, schema, checksum, stated, table_bytes, _ = _PREAMBLE.unpack_from(message.data)
    if magic != kind.magic:
        raise WireError(f"not a {kind.what}: the message starts with {magic!r} instead of {kind.magic!r}")
    if schema != kind.schema:
        raise WireError(f"message of schema version {schema}; this reader knows version {kind.schema}")
    if stated != length:
        fault = "truncated" if length < stated else "followed by foreign bytes"
        raise WireError(f"message of {length} bytes is {fault}: it states a length of {stated}")
    payload = _aligned(_PREAMBLE.size + table_bytes)
    if payload > length:
        raise WireError(f"message of {length} bytes states a table of {table_bytes} bytes")
    actual = xxhash.xxh3_64_intdigest(message[_CHECKED_FROM:].data)
    if actual != checksum:
        raise WireError(f"message is corrupted: checksum {actual:016x}, stated {checksum:016x}")
    table = _unpack_table(message[_PREAMBLE.size : _PREAMBLE.size + table_bytes])
    return table, _views(message[payload:], get(table, "arrays", list), max_bytes)


def _pack_table(name: str, table: Mapping[str, Any]) -> bytes:
    try:
        # JSON text may hold lone surrogates, which strict UTF-8 refuses.
        packed: bytes = msgpack.packb(table, unicode_errors="surrogatepass")
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WireError(f"{name} cannot be carried: {error}") from None
    return packed


def _unpack_table(packed: Array) -> dict[str, Any]:
    try:
        table = msgpack.unpackb(packed, unicode_errors="surrogatepass")
    except (ValueError, TypeError, RecursionError, MemoryError, msgpack.UnpackException) as error:
        raise WireError(f"the message's table cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise WireError(f"the message's table is a {type(table).__name__}, not a map")
    return table


def _views(payload: Array, entries: list[Any], max_bytes: int) -> dict[str, Array]:
    """Name to view, for each table entry; the entries must tile the payload, without gap or overlap."""
    views: dict[str, Array] = {}
    end = 0
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 4:
            raise WireError(f"array entry {short(entry)}: expected [name, dtype, shape, offset]")
        name, dtype, shape, offset = entry
        if type(name) is not str or name in views:
            raise WireError(f"array name {short(name)}: not a string, or taken by an array before")
        if dtype not in _DTYPES:
            raise WireError(f"array {short(name)}: dtype {short(dtype)} is not one of {', '.join(_DTYPES)}")
        # Empty arrays may have any other dimensions, but not ones whose product NumPy cannot hold.
        if (
            not isinstance(shape, list)
            or len(shape) > _MAX_NDIM
            or not all(type(n) is int and n >= 0 for n in shape)
            or math.prod(max(n, 1) for n in shape) > max_bytes
        ):
            raise WireError(f"array {short(name)}: shape {short(shape)} is not one that a message can hold")
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if type(offset) is not int or offset != _aligned(end) or offset + nbytes > len(payload):
            raise WireError(
                f"array {short(name)}: {nbytes} bytes at offset {short(offset)} of a payload of {len(payload)}; "
                f"expected offset {_aligned(end)}"
            )
        end = offset + nbytes
        views[name] = payload[offset:end].view(np.dtype(dtype)).reshape(shape)
    if end != len(payload):
        raise WireError(f"the message's arrays end at byte {end} of a payload of {len(payload)} bytes")
    return views


def get(table: Mapping[str, Any], key: str, kind: type[_T]) -> _T:
    """The value of ``key``, of exactly that type. Raises WireError."""
    value = table.get(key)
    if type(value) is not kind:  # exactly: a bool is no int here
        raise WireError(f"the message's {key} is {short(value)}, expected {kind.__name__}")
    return value


def _as_bytes(buffer: Buffer) -> Array:
    try:
        message = np.frombuffer(buffer, dtype=np.uint8)
    except (ValueError, TypeError, BufferError) as error:
        raise WireError(f"a message must be one contiguous buffer of bytes: {error}") from None
    message.flags.writeable = False  # this view's flag, inherited by every view on it; the buffer itself stays as it is
    return message


def check_json_like(value: Any, where: str, depth: int = _MAX_DEPTH) -> None:
    """Raise TypeError unless ``value`` is what JSON can say, which is what comes back as it went."""
    if value is None or type(value) in (bool, float, str):
        return
    if type(value) is int:
        if not -(2**63) <= value < 2**64:
            raise TypeError(f"{where} is an integer of more than 64 bits")
        return
    if depth == 0:
        raise TypeError(f"{short(where)} is nested too deeply")
    if type(value) is list:
        for i, item in enumerate(value):
            check_json_like(item, f"{where}[{i}]", depth - 1)
    elif type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"{short(where)} has the key {short(key)}; keys must be strings")
            check_json_like(item, f"{where}.{key}", depth - 1)
    else:
        raise TypeError(f"{short(where)} is a {type(value).__name__}; expected a JSON value")


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN


def short(value: Any) -> str:
    """For messages: a hostile value must not become a huge error."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
