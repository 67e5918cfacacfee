"""``async-rl chat``: one engine and the gateway, and a prompt in the terminal to talk to the model through it.

The conversation is an agent like a user's own, in one rollout without limits, which asks over HTTP. Other programs may
use its address and key as long as it lasts.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from async_rl.config.inputs import EvalSection, RewardSection
from async_rl.config.rollouts import AgentSection, EnvironmentSection
from async_rl.config.schema import RunConfig
from async_rl.data import reading
from async_rl.data.chat import CheckpointEncoder
from async_rl.driver.lone_worker import prepared, with_worker
from async_rl.errors import DatasetError
from async_rl.queue.records import Ticket
from async_rl.rollout.in_flight import InFlight
from async_rl.rollout.outcome import Context
from async_rl.rollout.policy import Policy
from async_rl.rollout.worker import RolloutWorker
from async_rl.types import Prompt

NEW = "/new"
"""The line that begins another conversation."""

# An agent of the user's that never sends back what was said makes a branch with each request.
_BRANCHES = 1_000_000


def run(config: RunConfig, *, checkpoint: Path | None = None, moved: Path | None = None) -> int:
    """Answer the lines of standard input until it ends. Returns the exit code.

    checkpoint, moved: as in ``eval_command.run``. Raises AsyncRLError.
    """
    with prepared(config, "chat", checkpoint, moved) as settled:
        encoder = reading.encoder(settled)
        settled, prompt = _conversation(settled), _prompt(settled, encoder)
        sys.stderr.write(f"starting the engine of {settled.model.path}\n")

        async def work(worker: RolloutWorker) -> None:
            await worker.rollouts(InFlight.begin(Ticket("chat", prompt, 0), 1))

        return 0 if with_worker(settled, encoder.tokenizer, work) else 130


def _conversation(config: RunConfig) -> RunConfig:
    """Return the config with ``converse`` as its agent: no dataset, and no limit but the engine's."""
    rollout, whole = config.rollout, config.data.max_prompt_tokens + config.longest_response
    agent = AgentSection(
        function=f"{__name__}:{converse.__name__}", gateway_host=rollout.agent.gateway_host, max_branches=_BRANCHES
    )
    changed = {
        "n": 1,
        "agent": agent,
        "agents": {},
        "environment": EnvironmentSection(),
        "group_timeout_s": None,
        "min_group_size": None,
        # A context has as many tokens as in the run, and all may follow the first message.
        "max_response_tokens": whole - 1,
    }
    data = config.data.model_copy(update={"max_prompt_tokens": 1, "sources": {}, "sampling_field": None, "eval": None})
    return config.model_copy(
        update={
            "data": data,
            "eval": EvalSection(),
            "reward": RewardSection(),
            "rollout": rollout.model_copy(update=changed),
        }
    )


def _prompt(config: RunConfig, encoder: CheckpointEncoder) -> Prompt:
    """Return what ``converse`` has to know, as the row that an agent gets."""
    try:
        encoder.template()
    except DatasetError:
        templated = False
    else:
        templated = True
    fields = {
        "max_tokens": config.rollout.max_response_tokens,
        "system_prompt": config.data.system_prompt,
        "templated": templated,
    }
    return Prompt("chat", 1, "", np.zeros(1, np.int32), fields)


async def converse(prompt: Prompt, policy: Policy, context: Context) -> float:  # noqa: ARG001  as agents are called
    """Answer each line of standard input, until it ends."""
    import openai

    terminal, fields = sys.stdin.isatty(), prompt.fields
    ask = "> " if terminal else ""
    sys.stderr.write(
        f"OPENAI_BASE_URL={policy.base_url}\nOPENAI_API_KEY={policy.api_key}\nOPENAI_MODEL={policy.model}\n"
        + ("" if fields["templated"] else "the checkpoint has no chat template: each line is continued as text\n")
        + (f"{NEW} begins another conversation, Ctrl-D ends\n" if terminal else "")
    )
    system = [{"role": "system", "content": fields["system_prompt"]}] if fields["system_prompt"] else []
    history: list[Any] = [*system]
    async with openai.AsyncOpenAI(
        base_url=policy.base_url, api_key=policy.api_key, timeout=None, max_retries=0
    ) as client:
        _write(ask)
        async for line in _lines(sys.stdin.fileno()):
            if line.strip() == NEW:
                history = [*system]
            elif line.strip():
                try:
                    history = await _answered(client, policy.model, history, line, fields)
                except openai.APIStatusError as error:
                    hint = f"; {NEW} begins another conversation" if error.code == "context_length_exceeded" else ""
                    sys.stderr.write(f"async-rl: {_why(error)}{hint}\n")
            _write(ask)
    return 0.0


async def _answered(client: Any, model: str, history: list[Any], line: str, fields: Mapping[str, Any]) -> list[Any]:
    """Print the answer to a line, and return the conversation with both. Raises openai.APIStatusError."""
    if not fields["templated"]:
        continued = await client.completions.create(model=model, prompt=line, max_tokens=fields["max_tokens"])
        _write(f"{continued.choices[0].text}\n")
        return history
    asked = [*history, {"role": "user", "content": line}]
    answer = await client.chat.completions.create(model=model, messages=asked, max_tokens=fields["max_tokens"])
    message = answer.choices[0].message
    _write(f"{message.content or ''}\n")
    for call in message.tool_calls or ():
        _write(f"{call.function.name}({call.function.arguments})\n")
    return [*asked, message.model_dump(exclude_none=True)]


def _why(error: Any) -> str:
    body = error.body if isinstance(error.body, Mapping) else {}
    return str(body.get("message", error))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


async def _lines(descriptor: int) -> AsyncIterator[str]:
    """Yield the lines of a file descriptor as they come, without their ends, until it ends.

    A thread reads it, which may wait until the process ends, and holds no lock of Python's files.
    """
    loop, found = asyncio.get_running_loop(), asyncio.Queue[bytes]()

    def read() -> None:
        data = b"?"
        while data:
            try:
                data = os.read(descriptor, 65_536)
            except OSError:  # the terminal is gone
                data = b""
            try:
                loop.call_soon_threadsafe(found.put_nowait, data)
            except RuntimeError:  # the loop has ended
                return

    threading.Thread(target=read, name="standard-input", daemon=True).start()
    rest = b""
    while data := await found.get():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")
