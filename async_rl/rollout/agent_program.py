"""Agents that are programs, rollout.agent.command: starts one for a rollout, and takes the reward from its output.

Nothing that it starts outlives the rollout, nor the worker: see ``_SUPERVISOR``. Knows processes; neither sessions nor
the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from typing import Any

from async_rl.rollout.policy import Address

# What is kept of the end of an output: the line of the reward, and a traceback.
_KEPT_BYTES = 64 * 2**10

# Seconds for what was killed to end.
_END_S = 10.0

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

libc = ctypes.CDLL(None)
libc.prctl(36, 1)
signal.signal(signal.SIGTERM, lambda *_: end(143))
libc.prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    end(143)
child = os.fork()
if child == 0:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        os.execvp(sys.argv[2], sys.argv[2:])
    except OSError as error:
        os.write(2, f"{sys.argv[2]}: {error.strerror}".encode())
        os._exit(127)
for stream in 0, 1, 2:
    os.close(stream)
pid = None
while pid != child:
    pid, status = os.wait()
code = os.waitstatus_to_exitcode(status)
end(code if code >= 0 else 128 - code)
"""


class ProgramFailed(Exception):
    """A program has failed, or has written no reward."""


async def run_program(
    command: Sequence[str], row: Mapping[str, Any], address: Address, rollout_id: str, evaluation: str | None = None
) -> Any:
    """Run a program for one rollout, and return the reward that it writes as the last line of its output, as JSON.

    evaluation: the set that the row is of; None in training. When this is cancelled, nothing of the program is left.
    Raises ProgramFailed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _WITHHELD} | {
        "OPENAI_BASE_URL": address.base_url,
        "OPENAI_API_KEY": address.api_key,
        "OPENAI_MODEL": address.model,
        "ASYNC_RL_ROLLOUT_ID": rollout_id,
        **({} if evaluation is None else {"ASYNC_RL_EVALUATION": evaluation}),
    }
    starter = (sys.executable, "-I", "-S", "-c", _SUPERVISOR, str(os.getpid()))
    process = await asyncio.create_subprocess_exec(
        *starter, *command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment, start_new_session=True
    )
    written = asyncio.create_task(_write(process, json.dumps(dict(row), default=str).encode()))
    ends = [asyncio.create_task(_end_of(stream)) for stream in (process.stdout, process.stderr)]
    try:
        output, errors = await asyncio.gather(*ends)
        status = await process.wait()
    finally:
        await _end(process, [written, *ends])
    said = errors.decode(errors="replace").strip()[-2000:]
    if status != 0:
        raise ProgramFailed(f"ended with status {status}; its standard error ends with: {said or '(nothing)'}")
    return _reward(output.decode(errors="replace"))


def _reward(output: str) -> Any:
    lines = output.strip().splitlines()
    if not lines:
        raise ProgramFailed("wrote nothing; the last line of its standard output must be the reward as JSON")
    try:
        return json.loads(lines[-1])
    except (ValueError, RecursionError):
        shown = lines[-1][:200]
        raise ProgramFailed(f"wrote {shown!r} as its last line, which must be the reward as JSON") from None


async def _write(process: Process, data: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # It need not read.
        process.stdin.write(data)
        await process.stdin.drain()
    process.stdin.close()


async def _end_of(stream: asyncio.StreamReader | None) -> bytes:
    """Read a stream to its end, and return the last of it."""
    assert stream is not None
    kept = b""
    while chunk := await stream.read(_KEPT_BYTES):
        kept = (kept + chunk)[-_KEPT_BYTES:]
    return kept


async def _end(process: Process, streams: Sequence[asyncio.Task[Any]]) -> None:
    """End a program with all that it has started; returns when nothing is left, also if this task is cancelled."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        ended = asyncio.ensure_future(process.wait())
        _, late = await asyncio.wait({ended}, timeout=_END_S)
        if late:  # It hangs in the kernel.
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
