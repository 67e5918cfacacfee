"""The wire format of a group: ``encode`` to one contiguous buffer, ``decode`` to views on it.

    0         4        8          16       24            28    32        payload: the next multiple of 64
    | "ARLG"  | schema | checksum | length | table bytes | 0   | table   | array | pad | array | ...
      magic     u32      u64        u64      u32           u32   msgpack   raw little-endian bytes

All integers are little-endian. ``schema`` is the version of everything that follows; ``length`` is that of
the whole message; ``checksum`` is xxh3_64 of every byte from ``length`` to the end, so that no byte is
unprotected: the first eight are compared with what they must be. It detects accidents, it does not
authenticate.

The table is a msgpack map: what is not an array (ids, prompt text and fields, rewards, row layouts), and one
entry [name, dtype, shape, offset] per array. Offsets count from the start of the payload, which is
64-byte-aligned (a cache line, and how Ray aligns buffers), as is each array in it. Arrays lie in the order of
the table, each right behind the one before: a table that points outside, overlaps or leaves a gap is refused
by comparing one number. Lengths are real: nothing is padded to a maximum, only up to the next 64 bytes.

Decoding copies nothing and runs no code of the sender: no pickle. The size is bounded before anything is
read, and what is wrong with a message, whatever it is, is a ``WireError``. Knows ``types`` and ``errors``,
not the queue.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import msgpack
import numpy as np
import numpy.typing as npt
import xxhash

from async_rl.errors import InvalidTrajectory, WireError
from async_rl.types import Group, Prompt, RoutingSpec, Segment, Trajectory

SCHEMA_VERSION = 1
MAX_MESSAGE_BYTES = 2**30
"""Half of the queue's default byte bound; a group of 8 x 32k tokens with [48, 8] routing is a tenth of it."""

_MAGIC = b"ARLG"
_PREAMBLE = struct.Struct("<4sIQQII")
_CHECKED_FROM = 16  # right behind the checksum
_ALIGN = 64
_DTYPES = ("<i4", "<f4", "|u1", "<u2")
_MAX_NDIM = 3

Buffer = bytes | bytearray | memoryview | npt.NDArray[np.uint8]
Array = npt.NDArray[Any]
_T = TypeVar("_T")


def encode(group: Group, max_bytes: int = MAX_MESSAGE_BYTES) -> npt.NDArray[np.uint8]:
    """The message, uint8[N]: one allocation, each array copied once.

    Raises WireError where the message would exceed ``max_bytes`` or the prompt's fields are not JSON-like.
    """
    name = f"group {group.group_id}"
    arrays = dict(_arrays(group))
    entries: list[tuple[str, str, tuple[int, ...], int]] = []
    end = 0
    for field, array in arrays.items():
        if array.dtype.str not in _DTYPES or array.ndim > _MAX_NDIM:
            raise WireError(f"{name}: {field} is {array.dtype}{list(array.shape)}, which has no wire format")
        offset = _aligned(end)
        entries.append((field, array.dtype.str, array.shape, offset))
        end = offset + array.nbytes
    table = _pack_table(name, group, entries)
    payload = _aligned(_PREAMBLE.size + len(table))
    length = payload + end
    if length > max_bytes:
        raise WireError(f"{name}: {length} bytes, more than the {max_bytes} allowed for one message")

    message = np.empty(length, dtype=np.uint8)
    filled = _PREAMBLE.size + len(table)
    message[_PREAMBLE.size : filled] = np.frombuffer(table, dtype=np.uint8)
    for (_, dtype, shape, offset), array in zip(entries, arrays.values(), strict=True):
        start = payload + offset
        message[filled:start] = 0  # padding is checksummed, and must not leak what lay in memory before
        filled = start + array.nbytes
        message[start:filled].view(np.dtype(dtype)).reshape(shape)[...] = array
    _PREAMBLE.pack_into(message.data, 0, _MAGIC, SCHEMA_VERSION, 0, length, len(table), 0)
    checksum = xxhash.xxh3_64_intdigest(message[_CHECKED_FROM:].data)
    _PREAMBLE.pack_into(message.data, 0, _MAGIC, SCHEMA_VERSION, checksum, length, len(table), 0)
    return message


def decode(buffer: Buffer, max_bytes: int = MAX_MESSAGE_BYTES) -> Group:
    """The group, validated; its arrays are read-only views that keep ``buffer`` alive.

    Raises WireError for anything but a whole, intact message of this schema and at most ``max_bytes``.
    """
    message = _as_bytes(buffer)
    length = len(message)
    if length > max_bytes:
        raise WireError(f"message of {length} bytes, more than the {max_bytes} allowed")
    if length < _PREAMBLE.size:
        raise WireError(f"message of {length} bytes is truncated: the preamble alone has {_PREAMBLE.size}")
    magic, schema, checksum, stated, table_bytes, _ = _PREAMBLE.unpack_from(message.data)
    if magic != _MAGIC:
        raise WireError(f"not a group: the message starts with {magic!r} instead of {_MAGIC!r}")
    if schema != SCHEMA_VERSION:
        raise WireError(f"message of schema version {schema}; this reader knows version {SCHEMA_VERSION}")
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
    return _build_group(table, _views(message[payload:], _get(table, "arrays", list), max_bytes))


def _arrays(group: Group) -> Iterator[tuple[str, Array]]:
    """Every array of the group under its name on the wire; ``_build_group`` asks for the same names."""
    yield "prompt", group.prompt.token_ids
    for t, trajectory in enumerate(group.trajectories):
        yield f"{t}.prompt_ids", trajectory.prompt_ids
        yield f"{t}.response_ids", trajectory.response_ids
        yield f"{t}.logprobs", trajectory.logprobs
        yield f"{t}.versions", trajectory.versions
        rows = [(segment.start, segment.stop, segment.version) for segment in trajectory.segments]
        yield f"{t}.segments", np.array(rows, dtype=np.int32)
        if trajectory.routed_experts is not None:
            yield f"{t}.routed_experts", trajectory.routed_experts
        for s, segment in enumerate(trajectory.segments):
            if segment.routed_experts is not None:
                yield f"{t}.segment_routing.{s}", segment.routed_experts


def _pack_table(name: str, group: Group, entries: list[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    prompt = group.prompt
    table = {
        "group_id": group.group_id,
        "prompt_id": prompt.prompt_id,
        "row": prompt.row,
        "text": prompt.text,
        "fields": dict(prompt.fields),
        "trajectories": [
            {
                "trajectory_id": t.trajectory_id,
                "reward": float(t.reward),
                "finish_reason": t.finish_reason,
                "routing": t.routing and [t.routing.num_moe_layers, t.routing.top_k, t.routing.num_experts],
            }
            for t in group.trajectories
        ],
        "arrays": entries,
    }
    try:
        _check_json_like(table["fields"], "fields")
        # JSON text may hold lone surrogates, which strict UTF-8 refuses.
        packed: bytes = msgpack.packb(table, unicode_errors="surrogatepass")
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WireError(f"{name}: the prompt of row {prompt.row} cannot be carried: {error}") from None
    return packed


def _unpack_table(packed: Array) -> dict[str, Any]:
    try:
        table = msgpack.unpackb(packed, unicode_errors="surrogatepass")
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
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
            raise WireError(f"array entry {_short(entry)}: expected [name, dtype, shape, offset]")
        name, dtype, shape, offset = entry
        if type(name) is not str or name in views:
            raise WireError(f"array name {_short(name)}: not a string, or taken by an array before")
        if dtype not in _DTYPES:
            raise WireError(f"array {name}: dtype {_short(dtype)} is not one of {', '.join(_DTYPES)}")
        # Empty arrays may have any other dimensions, but not ones whose product NumPy cannot hold.
        if (
            not isinstance(shape, list)
            or len(shape) > _MAX_NDIM
            or not all(type(n) is int and n >= 0 for n in shape)
            or math.prod(max(n, 1) for n in shape) > max_bytes
        ):
            raise WireError(f"array {name}: shape {_short(shape)} is not one that a message can hold")
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if type(offset) is not int or offset != _aligned(end) or offset + nbytes > len(payload):
            raise WireError(
                f"array {name}: {nbytes} bytes at offset {_short(offset)} of a payload of {len(payload)}; "
                f"expected offset {_aligned(end)}"
            )
        end = offset + nbytes
        views[name] = payload[offset:end].view(np.dtype(dtype)).reshape(shape)
    if end != len(payload):
        raise WireError(f"the message's arrays end at byte {end} of a payload of {len(payload)} bytes")
    return views


def _build_group(table: dict[str, Any], views: dict[str, Array]) -> Group:
    def take(name: str) -> Array:
        if name not in views:
            raise WireError(f"the message has no array {name}")
        return views.pop(name)

    try:
        prompt = Prompt(
            prompt_id=_get(table, "prompt_id", str),
            row=_get(table, "row", int),
            text=_get(table, "text", str),
            token_ids=take("prompt"),
            fields=MappingProxyType(_get(table, "fields", dict)),
        )
        trajectories = []
        for t, entry in enumerate(_get(table, "trajectories", list)):
            if not isinstance(entry, dict):
                raise WireError(f"the message's trajectory {t} is {_short(entry)}, not a map")
            rows = take(f"{t}.segments")
            if rows.ndim != 2 or rows.shape[1] != 3 or rows.dtype != np.int32:
                raise WireError(f"array {t}.segments is {rows.dtype}{list(rows.shape)}, expected int32[S, 3]")
            segments = tuple(
                Segment(start, stop, version, views.pop(f"{t}.segment_routing.{s}", None))
                for s, (start, stop, version) in enumerate(rows.tolist())
            )
            trajectories.append(
                Trajectory(
                    trajectory_id=_get(entry, "trajectory_id", str),
                    prompt_ids=take(f"{t}.prompt_ids"),
                    response_ids=take(f"{t}.response_ids"),
                    logprobs=take(f"{t}.logprobs"),
                    versions=take(f"{t}.versions"),
                    segments=segments,
                    reward=_get(entry, "reward", float),
                    finish_reason=_get(entry, "finish_reason", str),  # type: ignore[arg-type]  # Trajectory checks it
                    routed_experts=views.pop(f"{t}.routed_experts", None),
                    routing=_routing_spec(entry.get("routing")),
                )
            )
        group = Group(_get(table, "group_id", str), prompt, tuple(trajectories))
    except InvalidTrajectory as error:
        raise WireError(f"the message's checksum holds, but what it carries is invalid: {error}") from None
    if views:
        raise WireError(f"the message has arrays that belong to nothing: {', '.join(list(views)[:3])}")
    return group


def _routing_spec(value: Any) -> RoutingSpec | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 3 or not all(type(n) is int and n > 0 for n in value):
        raise WireError(f"routing is {_short(value)}; expected [layers, top_k, experts]")
    return RoutingSpec(*value)


def _get(table: Mapping[str, Any], key: str, kind: type[_T]) -> _T:
    value = table.get(key)
    if type(value) is not kind:  # exactly: a bool is no int here
        raise WireError(f"the message's {key} is {_short(value)}, expected {kind.__name__}")
    return value


def _as_bytes(buffer: Buffer) -> Array:
    try:
        message = np.frombuffer(buffer, dtype=np.uint8)
    except (ValueError, TypeError, BufferError) as error:
        raise WireError(f"a message must be one contiguous buffer of bytes: {error}") from None
    message.flags.writeable = False  # this view's flag, inherited by every view on it; the buffer itself stays as it is
    return message


def _check_json_like(value: Any, where: str) -> None:
    if value is None or type(value) in (bool, int, float, str):
        return
    if type(value) is list:
        for i, item in enumerate(value):
            _check_json_like(item, f"{where}[{i}]")
    elif type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"{where} has the key {key!r}; keys must be strings")
            _check_json_like(item, f"{where}.{key}")
    else:
        raise TypeError(f"{where} is a {type(value).__name__}; expected a JSON value")


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN


def _short(value: Any) -> str:
    """For messages: a hostile value must not become a huge error."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
