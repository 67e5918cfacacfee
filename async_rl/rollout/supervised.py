"""Programs of a user's own as child processes, of which nothing outlives this process: see ``_SUPERVISOR``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import Mapping, Sequence
from typing import Any

# Seconds for what was killed to end.
_END_S = 30.0

# Who has it can run any code as the user of the run (docs/reference/ports.md), and an agent runs what a model wrote.
_WITHHELD = ("RAY_AUTH_TOKEN",)

# Starts the program, and ends whatever is left of it, also in process groups of its own, when it has ended, on SIGTERM,
# and when the worker is gone: it is the parent of each orphan among them (PR_SET_CHILD_SUBREAPER), and the kernel tells
# it of the worker's end (PR_SET_PDEATHSIG). A preexec_fn would run in a copy of the worker, with its threads' locks.
_SUPERVISOR = """
import ctypes, os, signal, sys

def end(code):
    try:
        while True:
            for pid in open(f"/proc/self/task/{os.getpid()}/children").read().split():
                os.kill(int(pid), signal.SIGKILL)
            os.wait()
    except OSError:
        pass  # There are none left.
    os._exit(code)

# Blocked, not handled: a handler would not run for a signal that comes as a wait begins.
awaited = signal.SIGTERM, signal.SIGCHLD
before = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
libc = ctypes.CDLL(None)
libc.prctl(36, 1)
libc.prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    end(143)
child = os.fork()
if child == 0:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        os.execvp(sys.argv[2], sys.argv[2:])
    except OSError as error:
        os.write(2, f"{sys.argv[2]}: {error.strerror}".encode())
        os._exit(127)
for stream in 0, 1, 2:
    os.close(stream)
pid = 0
while pid != child:
    if pid == 0 and signal.sigwait(awaited) == signal.SIGTERM:
        end(143)
    pid, status = os.waitpid(-1, os.WNOHANG)
code = os.waitstatus_to_exitcode(status)
end(code if code >= 0 else 128 - code)
"""


def inherited() -> dict[str, str]:
    """Return the environment of this process, without what a program of a user must not have."""
    return {name: value for name, value in os.environ.items() if name not in _WITHHELD}


def supervised(command: Sequence[str]) -> list[str]:
    """Return the command that starts a program below a supervisor, for what starts it by itself."""
    return [sys.executable, "-I", "-S", "-c", _SUPERVISOR, str(os.getpid()), *command]


async def start_program(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    stdin: int = DEVNULL,
    stderr: int = STDOUT,
    pass_fds: Sequence[int] = (),
) -> Process:
    """Start a program below a supervisor, with a pipe for its output; end it with ``end_program``.

    One that cannot be started says so on its standard error, and has status 127. One that a signal ends has 128 and the
    number of the signal.
    """
    pipes: dict[str, Any] = {"stdin": stdin, "stdout": PIPE, "stderr": stderr}
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *supervised(command), **pipes, env=environment, start_new_session=True, pass_fds=pass_fds
        )
    )
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        # Were this one cancelled, asyncio would kill the supervisor, which may have started the program already.
        while not starting.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({starting})
        if not starting.cancelled() and starting.exception() is None:
            await end_program(starting.result(), [])
        raise


async def end_program(process: Process, streams: Sequence[asyncio.Task[Any]]) -> None:
    """End a program with all that it has started; returns when nothing is left, also if this task is cancelled.

    Were it left before, asyncio would kill the supervisor with the last reference to it, and the others would live on.
    """
    until, cancelled = time.monotonic() + _END_S, False
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    while process.returncode is None:
        try:
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                await process.wait()
        except TimeoutError:  # It hangs in the kernel.
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            break
        except asyncio.CancelledError:
            cancelled = True
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    if cancelled:
        raise asyncio.CancelledError
