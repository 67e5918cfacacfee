"""One call of a user's function, and how it ended, as plain data that can travel between processes.

This is what a worker process imports, so it knows little: ``config.functions``, ``errors``, ``types``, ``runtime``.
"""

from __future__ import annotations

import asyncio
import faulthandler
import inspect
import os
import signal
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from async_rl.config.functions import load_function
from async_rl.errors import AsyncRLError
from async_rl.runtime.process import signal_on_parent_death
from async_rl.types import Prompt

# What is kept of an exception's text: some carry the whole output of a program.
MAX_MESSAGE = 2000

# Seconds past the time limit of a call after which a worker process ends itself, because the process that should have
# killed it has not: that one may be about to exit, and wait for this one.
KILL_MARGIN_S = 10.0

Convert = Callable[[Any], Any]
"""Turns what a function returned into what is wanted of it. Raises ValueError, saying what was returned instead."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended: with a value, or with a failure that says what the function did.

    An exception becomes text: it may not survive the way between processes, and asyncio gives some a meaning of its
    own (StopIteration, CancelledError, SystemExit).
    """

    value: Any = None
    failure: str | None = None
    may_pass: bool = False
    """Whether another attempt may succeed: the function raised an exception, as one that asks a service does."""
    trace: str = ""

    @classmethod
    def of(cls, error: BaseException) -> Outcome:
        """Return the outcome of a call that raised ``error``."""
        trace = "".join(traceback.format_exception(error))
        try:
            message = str(error)[:MAX_MESSAGE]
        except Exception:  # noqa: BLE001 - the user's __str__
            message = ""
        if isinstance(error, AsyncRLError):  # Written for the user.
            return cls(failure=message, trace=trace)
        what = f"raised {type(error).__name__}" + (f": {message}" if message else "")
        return cls(failure=what, may_pass=isinstance(error, Exception), trace=trace)


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """A user's function by name, so that any process can import it: see ``load_function``."""

    setting: str
    name: str
    arguments: tuple[str, ...]
    convert: Convert

    def load(self) -> Callable[..., Any]:
        """Import the function. Raises AsyncRLError, naming the setting and the fix."""
        return load_function(self.setting, self.name, self.arguments, AsyncRLError)


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether calling the function only makes a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def converted(convert: Convert, value: Any) -> Outcome:
    """Return the outcome of a call that returned ``value``."""
    try:
        return Outcome(convert(value))
    except ValueError as error:
        return Outcome(failure=str(error)[:MAX_MESSAGE])


def call(convert: Convert, function: Callable[..., Any], *arguments: Any) -> Outcome | Awaitable[Any]:
    """Call the function, whatever it raises. Returns an awaitable where the function did."""
    try:
        value = function(*arguments)
        if inspect.isawaitable(value):
            return value
    except BaseException as error:  # noqa: BLE001 - whatever the user's function raises goes to the caller
        return Outcome.of(error)
    return converted(convert, value)


async def call_async(convert: Convert, function: Callable[..., Any], *arguments: Any) -> Outcome:
    """Call the function, and await what it returns if that can be awaited."""
    value = call(lambda value: value, function, *arguments)
    if isinstance(value, Outcome):
        return value if value.failure is not None else converted(convert, value.value)
    try:
        return converted(convert, await value)
    except BaseException as error:  # noqa: BLE001 - as above
        return Outcome.of(error)


# -- in a worker process ----------------------------------------------------------------------------------------------

_function: Callable[..., Any] | None = None


def begin_worker(parent: int) -> None:
    """Prepare this process, in which nothing has run yet: it ends with its parent, and signals work as usual."""
    signal_on_parent_death(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends this process.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # What the thread that started this process had blocked.
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)


def prepare(spec: FunctionSpec) -> Outcome:
    """Import the function, unless that was done. It takes no part in the time limit of a call."""
    global _function
    try:
        if _function is None:
            _function = spec.load()
    except BaseException as error:  # noqa: BLE001 - as above
        what = Outcome.of(error)
        return replace(what, failure=f"not called, because a worker process cannot import it: {what.failure}")
    return Outcome()


def run(spec: FunctionSpec, prompt: Prompt, argument: Any, timeout_s: float) -> Outcome:
    """Call the function in this process, which ``prepare`` has made ready."""
    assert _function is not None
    here = os.getpid()
    faulthandler.dump_traceback_later(timeout_s + KILL_MARGIN_S, exit=True)
    try:
        outcome = call(spec.convert, _function, prompt, argument)
        if isinstance(outcome, Outcome):
            return outcome
        return asyncio.run(call_async(spec.convert, lambda: outcome))
    except BaseException as error:  # noqa: BLE001 - a signal's handler may raise at any point
        return Outcome.of(error)
    finally:
        if os.getpid() != here:
            os._exit(0)  # A process that the function has forked: this one answers.
        signal.setitimer(signal.ITIMER_REAL, 0)  # Left over, it would end this process later.
        faulthandler.cancel_dump_traceback_later()
