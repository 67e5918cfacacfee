"""The environments of one worker, rollout.agent.environment: plays a rollout with one, and closes it whatever happens.

``hosts`` has the processes in which they run, ``drive`` what happens in a rollout. Knows the settings and the gate;
neither groups nor sessions.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from async_rl.config.functions import import_function
from async_rl.config.schema import RunConfig
from async_rl.data.messages import Message, with_system
from async_rl.errors import AgentFailure
from async_rl.metrics.exporter import Metrics
from async_rl.rollout.environments.drive import Counts, Late, Played, Stages, drive
from async_rl.rollout.environments.hosts import Hosts, Remote
from async_rl.rollout.environments.instance import Failed, Instance, prepare
from async_rl.rollout.environments.interface import Context, Task
from async_rl.rollout.environments.rows import write_rows
from async_rl.rollout.gate import Gate
from async_rl.rollout.policy import Policy
from async_rl.types import Prompt, source_of

log = structlog.get_logger(__name__)

SETTING = "rollout.agent.environment"


class Here(Instance):
    """An environment in this process."""

    async def check(self) -> None:
        """Do nothing: the process is the worker's own."""

    def leave(self, *, abandoned: bool) -> None:
        """Do nothing: it has no place in a host."""


class Environments:
    """Plays rollouts with environments of the class that the settings name."""

    def __init__(self, config: RunConfig) -> None:
        """Import the class, if it is to run here. Raises AgentFailure."""
        settings = config.rollout.agent
        assert settings.environment is not None
        self._config = config
        self._settings = settings
        self._names = itertools.count()
        self._hosts = None if settings.inline else Hosts(settings)
        self._make: Callable[..., Any] | None = None
        if settings.inline:
            self._make = import_function(SETTING, settings.environment, AgentFailure)
        self.counts = Counts()
        self._left: set[asyncio.Task[Any]] = set()
        self._places = asyncio.Semaphore(settings.concurrent)
        self._playing: set[asyncio.Task[Any]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self.open = 0
        """Environments that have begun and are not closed."""

    async def start(self) -> None:
        """Start a host, so that what is wrong with it is known before the first rollout. Raises AgentFailure."""
        try:
            if self._hosts is not None:
                (await self._hosts.open()).leave(abandoned=False)
            elif self._make is not None:
                await prepare(self._make, self._settings.arguments)
        except Failed as error:
            raise AgentFailure(f"{SETTING} {self._settings.environment}: {error}") from None

    async def write_rows(self, split: str, path: Path) -> int:
        """Write the rows that the class has itself as JSONL, and return how many they are. Raises AgentFailure."""
        try:
            if self._hosts is None:
                assert self._make is not None
                await prepare(self._make, self._settings.arguments)
                return await asyncio.to_thread(write_rows, self._make, self._settings.arguments, split, str(path))
            remote = await self._hosts.open()
            try:
                return await remote.write_rows(split, path)
            finally:
                remote.leave(abandoned=False)
        except Failed as error:
            raise AgentFailure(f"{SETTING} {self._settings.environment}: {error}") from None

    async def play(self, prompt: Prompt, policy: Policy, rollout_id: str, seed: int, gate: Gate) -> Played:
        """Make one rollout; ``seed`` is its own, and pauses of the engine behind ``gate`` count for no time limit.

        Raises Failed for a fault of the environment, and as ``drive``.
        """
        playing = asyncio.current_task()
        assert playing is not None
        self._playing.add(playing)
        try:
            return await self._play(prompt, policy, Context(rollout_id, seed), gate)
        finally:
            self._playing.discard(playing)

    async def _play(self, prompt: Prompt, policy: Policy, context: Context, gate: Gate) -> Played:
        began = time.monotonic()
        await self._places.acquire()
        self.counts.seconds["place"] += time.monotonic() - began
        try:
            held = await self._opened()
        except BaseException:
            self._places.release()
            raise
        self.open += 1
        late = False
        try:
            stages = Stages(self._settings, gate, self.counts, self._left)
            return await drive(held, self._task(prompt), context, prompt.token_ids, policy, stages)
        except Late:
            late = True
            raise
        finally:
            closing = asyncio.create_task(self._close(held, prompt, late=late))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            await asyncio.shield(closing)

    async def close(self) -> None:
        """End all rollouts, have their environments close as long as they may, and end the hosts."""
        for playing in self._playing:
            playing.cancel()
        until = time.monotonic() + self._settings.close_s
        # A rollout that is cancelled twice is over before its environment is closed.
        while (pending := {*self._playing, *self._closing}) and (left := until - time.monotonic()) > 0:
            await asyncio.wait(pending, timeout=left)
        if self._hosts is not None:
            await self._hosts.close()

    def publish(self, metrics: Metrics) -> None:
        """Bring the counters of environments on /metrics up to date."""
        counts = self.counts
        for result, calls in counts.tool_calls.items():
            metrics.count_to("agent_tool_calls_total", calls, result=result)
        for stage, calls in counts.late.items():
            metrics.count_to("agent_environment_late_total", calls, stage=stage)
        for stage, seconds in counts.seconds.items():
            metrics.count_to("agent_environment_seconds_total", seconds, stage=stage)
        for reason, hosts in (self._hosts.lost if self._hosts is not None else {}).items():
            metrics.count_to("agent_environment_hosts_lost_total", hosts, reason=reason)
        metrics.set("agent_environments", self.open)

    async def _opened(self) -> Here | Remote:
        if self._hosts is not None:
            return await self._hosts.open()
        assert self._make is not None
        settings, name = self._settings, f"environment {next(self._names)}"
        return Here(self._make, settings.arguments, settings.tool_answer_chars, name)

    async def _close(self, held: Here | Remote, prompt: Prompt, *, late: bool) -> None:
        """Close an environment; one that takes too long or fails is counted and left, and never fails a rollout."""
        began = time.monotonic()
        if late:
            await held.check()
        closing = asyncio.create_task(held.close())
        _, over = await asyncio.wait({closing}, timeout=self._settings.close_s)
        if over:
            closing.cancel()
            self.counts.late["close"] += 1
            log.warning("environment_abandoned", prompt=prompt.prompt_id, limit_s=self._settings.close_s)
            await held.check()
        elif (error := closing.exception()) is not None:
            log.warning("environment_close_failed", prompt=prompt.prompt_id, error=str(error))
        held.leave(abandoned=bool(over))
        self.counts.seconds["close"] += time.monotonic() - began
        self.open -= 1
        self._places.release()

    def _task(self, prompt: Prompt) -> Task:
        """Return the row as an environment gets it."""
        fields = dict(prompt.fields)
        seed = zlib.crc32(prompt.prompt_id.encode())
        return Task(prompt.prompt_id, prompt.row, prompt.text, self._messages(prompt), fields, seed)

    def _messages(self, prompt: Prompt) -> list[Message] | None:
        """Return the messages of a row; None where its prompt is text as the policy is to see it."""
        data = self._config.data
        source = data.sources.get(source_of(prompt.prompt_id))
        field = (source and source.prompt_field) or data.prompt_field
        system = (source and source.system_prompt) or data.system_prompt
        found = prompt.fields.get(field)  # A prompt that is text is no field of the row.
        if isinstance(found, str):
            found = [{"role": "user", "content": found}]
        return None if found is None else with_system([dict(message) for message in found], system)


def probe(config: RunConfig) -> None:
    """Start a host as a run does, and end it. Raises AgentFailure, for a class that cannot be used."""
    environments = Environments(config)

    async def tried() -> None:
        try:
            await environments.start()
        finally:
            await environments.close()

    asyncio.run(tried())
