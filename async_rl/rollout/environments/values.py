"""What a user's class returns, as plain data that any message can carry. Imports the standard library alone. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

# Deeper than any observation; what is nested further, itself included, is written as text.
_MAX_DEPTH = 16

_MAX_INT = 2**63

# Of a state that is JSON; json itself ends at the depth of Python's stack.
_MAX_STATE_DEPTH = 200


def plain(value: Any, depth: int = 0) -> Any:
    """Return a value as None, booleans, numbers, text, lists and dicts with keys of text.

    Bytes become text as ``as_text`` says, scalars of NumPy and torch their numbers, other objects their ``str``.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, int):
        return int(value) if -_MAX_INT <= value < _MAX_INT else str(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).decode(errors="replace")
    if depth < _MAX_DEPTH:
        if isinstance(value, Mapping):
            return {whole(str(key)): plain(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [plain(item, depth + 1) for item in value]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return plain(value.item(), _MAX_DEPTH)
    return whole(str(value))


def as_text(value: Any, most: int) -> str:
    """Return what a tool returned as text of about ``most`` characters, with a note where it was cut.

    Text stays as it is, bytes are read as UTF-8 with a mark for what is none, None is empty, all else is JSON.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        text = bytes(value).decode(errors="replace")
        return cut(text, most, f"{len(bytes(value))} bytes")
    if value is None:
        return ""
    text = whole(value) if isinstance(value, str) else _json(plain(value))
    return cut(text, most, f"{len(text)} characters")


def cut(text: str, most: int, size: str) -> str:
    """Return a text, cut after ``most`` characters with a note that names its ``size``."""
    return text if len(text) <= most else f"{text[:most]}\n[cut here: {size} are more than the {most} that are shown]"


def json_text(value: Any) -> str:
    """Return a value as JSON, from which it comes back as it was. Raises TypeError for one that would not."""
    _check_json(value, _MAX_STATE_DEPTH)
    return json.dumps(value)


def _check_json(value: Any, depth: int) -> None:
    if value is None or type(value) in (bool, int, float, str):
        return
    if depth and type(value) is list:
        for item in value:
            _check_json(item, depth - 1)
    elif depth and type(value) is dict and all(type(key) is str for key in value):
        for item in value.values():
            _check_json(item, depth - 1)
    else:
        kind = "dict with keys that are no text" if type(value) is dict else type(value).__name__
        raise TypeError(f"a {kind} does not come back from JSON as it was")


def whole(text: str) -> str:
    """Return a text without halves of surrogate pairs, which are no characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def number(value: Any) -> float | None:
    """Return a value as a finite number; None for anything else."""
    value = plain(value)
    if isinstance(value, (bool, int, float)) and math.isfinite(value):
        return float(value)
    return None


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
