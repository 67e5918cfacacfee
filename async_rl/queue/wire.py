"""The wire format of everything that carries arrays: ``pack`` to one contiguous buffer, ``unpack`` to views on it.

    0         4        8          16       24            28    32        payload: the next multiple of 64
    | magic   | schema | checksum | length | table bytes | 0   | table   | array | pad | array | ...
      4 bytes   u32      u64        u64      u32           u32   msgpack   raw little-endian bytes

All integers are little-endian. ``magic`` names the kind of message, ``schema`` the version of everything that follows.
``length`` is that of the whole message. ``checksum`` is xxh3_64 of every byte from ``length`` to the end; the first
eight bytes are compared with their only valid values, so no byte is unprotected. It detects accidents, it does not
authenticate.

The table is a msgpack map of everything that is not an array, with one entry [name, dtype, shape, offset] per array
under "arrays".
Offsets count from the start of the payload, which is 64-byte-aligned (a cache line, and how Ray aligns buffers), as is
each array in it. Arrays lie in the order of the table, each directly after the one before. A table that points outside,
overlaps or leaves a gap is refused by comparing one number. Lengths are real: nothing is padded to a maximum, only up
to the next 64 bytes.

Unpacking copies nothing and runs no code of the sender: no pickle. The size is bounded before anything is read, and
every fault of a message is a ``WireError``. Knows only ``errors``. ``codec`` knows what table and arrays mean for
finished groups, ``rollout.in_flight`` for groups in flight.
"""

from __future__ import annotations

import math
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import msgpack
import numpy as np
import numpy.typing as npt
import xxhash

from async_rl.errors import WireError

MAX_MESSAGE_BYTES = 2**40
"""More than any group has: 64 responses of a million tokens, at 1.5 kB of routed experts a token, are a tenth of it.

It only keeps sizes within what NumPy can count. No memory is allocated for what a message says of itself: the length is
that of the buffer, and arrays are views on it. How many messages are held at once is bounded by queue.max_bytes."""

_PREAMBLE = struct.Struct("<4sIQQII")
_CHECKED_FROM = 16  # directly after the checksum
_ALIGN = 64
_DTYPES = ("<i4", "<f4", "|u1", "<u2")
_MAX_NDIM = 3

Buffer = bytes | bytearray | memoryview | npt.NDArray[np.uint8]
Array = npt.NDArray[Any]
_T = TypeVar("_T")
_REPR = reprlib.Repr()  # bounded in depth and length, unlike repr
_REPR.maxstring = _REPR.maxother = 80
_MAX_DEPTH = 64  # of nested values in a table


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of message."""

    magic: bytes
    """The first four bytes."""
    schema: int
    """Version of the format in which messages are written."""
    what: str
    """Name of the kind in error messages."""
    earlier: tuple[int, ...] = ()
    """Earlier versions that are read too."""


class Message(NamedTuple):
    """What a message holds."""

    schema: int
    """Version of the format in which it was written."""
    table: dict[str, Any]
    arrays: dict[str, Array]
    """By name: read-only views that keep the buffer alive."""


def pack(
    kind: Kind, name: str, table: Mapping[str, Any], arrays: Mapping[str, Array], max_bytes: int = MAX_MESSAGE_BYTES
) -> npt.NDArray[np.uint8]:
    """Return the message, uint8[N], made in one allocation with one copy of each array; errors mention ``name``.

    Raises WireError when the message would exceed ``max_bytes``, or contains values that msgpack or the format cannot
    carry.
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
        message[filled:start] = 0  # padding is checksummed, and must not leak earlier contents of the memory
        filled = start + array.nbytes
        message[start:filled].view(np.dtype(dtype)).reshape(shape)[...] = array
    message[filled:] = 0  # without arrays: the padding after the table
    _PREAMBLE.pack_into(message.data, 0, kind.magic, kind.schema, 0, length, len(packed), 0)
    checksum = xxhash.xxh3_64_intdigest(message[_CHECKED_FROM:].data)
    _PREAMBLE.pack_into(message.data, 0, kind.magic, kind.schema, checksum, length, len(packed), 0)
    return message


def unpack(kind: Kind, buffer: Buffer, max_bytes: int = MAX_MESSAGE_BYTES) -> Message:
    """Return what the message holds.

    Raises WireError for anything but a whole, intact message of this kind, in a schema that is read, of at most
    ``max_bytes``.
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
    known = (*kind.earlier, kind.schema)
    if schema not in known:
        raise WireError(
            f"message of schema version {schema}; this reader knows version {' and '.join(map(str, known))}"
        )
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
    return Message(schema, table, _views(message[payload:], get(table, "arrays", list), max_bytes))


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
    """Return {name: view}; the table's entries must tile the payload without gap or overlap."""
    views: dict[str, Array] = {}
    end = 0
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 4:
            raise WireError(f"array entry {short(entry)}: expected [name, dtype, shape, offset]")
        name, dtype, shape, offset = entry
        if type(name) is not str or name in views:
            raise WireError(f"array name {short(name)}: not a string, or used by an earlier array")
        if dtype not in _DTYPES:
            raise WireError(f"array {short(name)}: dtype {short(dtype)} is not one of {', '.join(_DTYPES)}")
        # Empty arrays may have any other dimensions, as long as NumPy can represent their product.
        if (
            not isinstance(shape, list)
            or len(shape) > _MAX_NDIM
            or not all(type(n) is int and n >= 0 for n in shape)
            or math.prod(max(n, 1) for n in shape) > max_bytes
        ):
            raise WireError(f"array {short(name)}: shape {short(shape)} is not one that a message can have")
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
    """Return the value of ``key``. Raises WireError unless it has exactly that type."""
    value = table.get(key)
    if type(value) is not kind:  # exactly: bool is a subclass of int
        raise WireError(f"the message's {key} is {short(value)}, expected {kind.__name__}")
    return value


def _as_bytes(buffer: Buffer) -> Array:
    try:
        message = np.frombuffer(buffer, dtype=np.uint8)
    except (ValueError, TypeError, BufferError) as error:
        raise WireError(f"a message must be one contiguous buffer of bytes: {error}") from None
    message.flags.writeable = False  # of this view and every view on it; the buffer itself is unchanged
    return message


def check_json_like(value: Any, where: str, depth: int = _MAX_DEPTH) -> None:
    """Raise TypeError unless ``value`` is a JSON value, so that it is received exactly as it was sent."""
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
    """Return a value shortened for a message, so that a hostile value does not become a huge error."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
