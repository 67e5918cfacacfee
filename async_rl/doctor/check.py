"""One line of doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from async_rl.errors import AsyncRLError, ResourceError

Status = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check."""

    name: str
    status: Status
    """ok, warn (the run starts, with a drawback) or FAIL (the run could not start)."""
    detail: str
    fix: str = ""
    """What to do about it."""
    error: type[AsyncRLError] = ResourceError
    """The type that ``require`` raises for a FAIL."""
    cause: AsyncRLError | None = None
    """The error that ``require`` raises instead for a FAIL, if there is one."""


def refused(name: str, error: AsyncRLError) -> Check:
    """Return a FAIL with the error that the run itself would raise, whose message names key and fix already."""
    return Check(name, "FAIL", str(error), cause=error)
