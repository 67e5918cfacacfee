"""What a user's function may return: the number of a reward, the answer of an environment. Pure.

Each function here raises ValueError for all else, and says what was returned and what is expected.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

from async_rl.data.messages import Message, checked_answer
from async_rl.errors import RowFault
from async_rl.queue.wire import check_json_like

_NUMBER = "one finite real number, or None where the reward does not apply"

# Far more text than a response can take: it is tokenized on the event loop.
MAX_TEXT = 2**20


def real_number(value: Any) -> float | None:
    """Return a reward as a float: Python's numbers, and the scalars and arrays without axes of NumPy and torch.

    None stays None.
    """
    if value is None:
        return None
    number = _item(value)
    if not isinstance(number, numbers.Real):
        raise ValueError(f"returned {_shown(value)} of type {type(value).__name__}; expected {_NUMBER}")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"returned {_shown(value)}; expected {_NUMBER}")
    return number


def is_real(value: Any) -> bool:
    """Return whether ``real_number`` takes this for a number, be it finite or not."""
    return isinstance(_item(value), numbers.Real)


def text_or_none(value: Any) -> str | None:
    """Return an environment's text, or None, which ends the response."""
    if value is not None and not isinstance(value, str):
        raise ValueError(
            f"returned {_shown(value)} of type {type(value).__name__}; expected a string, a list of messages or None"
        )
    if value is None:
        return None
    if len(value) > MAX_TEXT:
        raise ValueError(f"returned {len(value)} characters; expected at most {MAX_TEXT}")
    try:
        value.encode()
    except UnicodeEncodeError:
        # The tokenizer would raise an error that does not name the function.
        raise ValueError(f"returned {_shown(value)}, which has half of a surrogate pair; expected text") from None
    return str(value)


def answer(value: Any) -> str | list[Message] | None:
    """Return an environment's answer: text, messages for the chat template, or None, which ends the response."""
    if not isinstance(value, list):
        return text_or_none(value)
    try:
        messages = checked_answer(value, "the list")
        check_json_like(messages, "the list")
    except (RowFault, TypeError) as fault:
        raise ValueError(f"returned {_shown(value)}: {fault}") from None
    size = sum(len(message["content"]) for message in messages)
    if size > MAX_TEXT:
        raise ValueError(f"returned {size} characters in messages; expected at most {MAX_TEXT}")
    return messages


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.200}"
    except Exception:  # noqa: BLE001 - the user's __repr__
        return "a value"


def _item(value: Any) -> Any:
    """Return the number in an array without axes, which NumPy's scalars and torch's tensors can be; else ``value``."""
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except Exception:  # noqa: BLE001 - a tensor of the meta device, for example, has none
        return value
