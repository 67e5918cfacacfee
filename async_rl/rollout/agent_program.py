"""Agents that are programs, rollout.agent.command: starts one for a rollout, and takes the reward from its output.

Nothing that it starts outlives the rollout, nor the worker: see ``supervised``. Knows processes; neither sessions nor
the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from typing import Any

from async_rl.rollout.policy import Address
from async_rl.rollout.supervised import end_program, inherited, start_program

# What is kept of the end of an output: the line of the reward, and a traceback.
_KEPT_BYTES = 64 * 2**10


class ProgramFailed(Exception):
    """A program has failed, or has written no reward."""


async def run_program(
    command: Sequence[str], row: Mapping[str, Any], address: Address, rollout_id: str, evaluation: str | None = None
) -> Any:
    """Run a program for one rollout, and return the reward that it writes as the last line of its output, as JSON.

    evaluation: the set that the row is of; None in training. When this is cancelled, nothing of the program is left.
    Raises ProgramFailed.
    """
    environment = inherited() | {
        "OPENAI_BASE_URL": address.base_url,
        "OPENAI_API_KEY": address.api_key,
        "OPENAI_MODEL": address.model,
        "ASYNC_RL_ROLLOUT_ID": rollout_id,
        **({} if evaluation is None else {"ASYNC_RL_EVALUATION": evaluation}),
    }
    process = await start_program(command, environment, stdin=PIPE, stderr=PIPE)
    written = asyncio.create_task(_write(process, json.dumps(dict(row), default=str).encode()))
    ends = [asyncio.create_task(_end_of(stream)) for stream in (process.stdout, process.stderr)]
    try:
        output, errors = await asyncio.gather(*ends)
        status = await process.wait()
    finally:
        await end_program(process, [written, *ends])
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
