"""Messages between a rollout worker and its environment hosts: a length of four bytes, then msgpack. No pickle.

Imports msgpack and the standard library alone.

    worker to host     {"id", "op": "load" | "write_rows" | "setup" | "step" | "use" | "play" | "reward" | "close"
                        | "ping", "of", "args"}
                       {"op": "cancel", "id"}
    host to worker     {"id", "value"} or {"id", "fault", "trace"}
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import msgpack

_LENGTH = struct.Struct(">I")

MAX_BYTES = 64 * 2**20
"""More than a context has room for, in any language."""


class FrameTooLarge(Exception):
    """A message is too large to be sent; nothing was."""


def packed(message: dict[str, Any]) -> bytes:
    """Return a message as bytes. Raises FrameTooLarge, and TypeError or ValueError for what is no plain data."""
    body = msgpack.packb(message, use_bin_type=True)
    if len(body) > MAX_BYTES:
        raise FrameTooLarge(f"{len(body)} bytes, and at most {MAX_BYTES} can be sent")
    return _LENGTH.pack(len(body)) + bytes(body)


async def read(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """Return the next message; None once the other side is gone, or sends what is none."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > MAX_BYTES:
            return None
        body = await reader.readexactly(length)
        message = msgpack.unpackb(body, raw=False, strict_map_key=False)
    except (asyncio.IncompleteReadError, OSError, ValueError, msgpack.exceptions.UnpackException):
        return None
    return message if isinstance(message, dict) else None
