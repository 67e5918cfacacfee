"""One line of what doctor says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from async_rl.errors import AsyncRLError, ResourceError

Status = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line. Of a FAIL, ``require`` raises ``cause`` as it is, or else an ``error`` made of the line."""

    name: str
    status: Status
    detail: str
    mend: str = ""
    error: type[AsyncRLError] = ResourceError
    cause: AsyncRLError | None = None


def refused(name: str, error: AsyncRLError) -> Check:
    """A FAIL that says what the run itself would say: the message names its key and mend already."""
    return Check(name, "FAIL", str(error), cause=error)
