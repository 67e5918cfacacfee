"""The environments of one agent in one worker: plays a rollout with one, and closes it whatever happens.

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
from typing import Any, get_args

import structlog

from async_rl.config.functions import import_function
from async_rl.config.rollouts import AGENT, agent_name, in_section
from async_rl.config.schema import RunConfig
from async_rl.data.messages import Message, with_system
from async_rl.errors import AgentFailure
from async_rl.metrics.exporter import Metrics
from async_rl.rollout.environments.drive import Counts, Differs, Keep, Late, Played, Stage, Stages, drive
from async_rl.rollout.environments.hosts import LOST, Hosts, Remote
from async_rl.rollout.environments.instance import Failed, Gone, Instance, check_state, prepare
from async_rl.rollout.environments.interface import Context, Task
from async_rl.rollout.environments.progress import Progress
from async_rl.rollout.environments.rows import write_rows
from async_rl.rollout.gate import Gate
from async_rl.rollout.policy import Policy
from async_rl.types import Prompt, source_of

log = structlog.get_logger(__name__)


class Here(Instance):
    """An environment in this process."""

    async def check(self) -> None:
        """Do nothing: the process is the worker's own."""

    def leave(self, *, abandoned: bool) -> None:
        """Do nothing: it has no place in a host."""


class Environments:
    """Plays rollouts with environments of the class that the settings name."""

    def __init__(self, config: RunConfig, section: str = AGENT) -> None:
        """Import the class that the settings of a section name, if it is to run here. Raises AgentFailure."""
        settings = config.rollout.agent_sections[section]
        assert settings.environment is not None
        self._config = config
        self._section = section
        self._settings = settings
        self._names = itertools.count()
        self._hosts = None if settings.inline else Hosts(settings, section)
        self._make: Callable[..., Any] | None = None
        if settings.inline:
            self._make = import_function(f"{section}.environment", settings.environment, AgentFailure)
            if settings.recovery == "state":
                try:
                    check_state(self._make)
                except Failed as error:
                    raise self._refused(error) from None
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
            raise self._refused(error) from None

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
            raise self._refused(error) from None

    def _refused(self, error: Failed) -> AgentFailure:
        what = in_section(str(error), self._section)
        return AgentFailure(f"{self._section}.environment {self._settings.environment}: {what}")

    async def play(
        self,
        prompt: Prompt,
        policy: Policy,
        rollout_id: str,
        seed: int,
        gate: Gate,
        *,
        before: Progress | None = None,
        keep: Keep = lambda _: None,
    ) -> Played:
        """Make one rollout; ``seed`` is its own, and pauses of the engine behind ``gate`` count for no time limit.

        before: how far it had come, if it continues one; the policy's session is of the same moment. keep: is called
        with how far it has come. Raises Failed for a fault of the environment, and as ``drive``.
        """
        playing = asyncio.current_task()
        assert playing is not None
        self._playing.add(playing)
        try:
            return await self._recovered(prompt, policy, Context(rollout_id, seed), gate, before, keep)
        finally:
            self._playing.discard(playing)

    async def _recovered(
        self, prompt: Prompt, policy: Policy, context: Context, gate: Gate, before: Progress | None, keep: Keep
    ) -> Played:
        """Play a rollout, with one environment after the other where they are lost with their hosts."""
        most, lost, restarts = self._settings.max_recoveries, 0, 0

        def note(progress: Progress) -> None:
            nonlocal before, lost
            if before is not None and len(progress.exchanges) > len(before.exchanges):
                lost = 0
            before = progress
            keep(progress)

        while True:
            try:
                return await self._play(prompt, policy, context, gate, before, note)
            except Gone as gone:
                lost += 1
                if self._settings.recovery == "restart" or lost > most:
                    raise
                log.info("environment_lost", rollout=context.rollout_id, reason=str(gone))
                if before is None:
                    self.counts.recoveries["restart"] += 1
            except Differs as differs:
                restarts += 1
                if restarts > most:
                    raise
                log.warning("environment_not_recovered", rollout=context.rollout_id, reason=str(differs))
                self.counts.recoveries["restart"] += 1
                policy.restart()
                before = None

    async def _play(
        self, prompt: Prompt, policy: Policy, context: Context, gate: Gate, before: Progress | None, keep: Keep
    ) -> Played:
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
            stages = Stages(self._settings, self._section, gate, self.counts, self._left)
            task, recovery = self._task(prompt), self._settings.recovery
            return await drive(
                held, task, context, prompt.token_ids, policy, stages, recovery=recovery, before=before, keep=keep
            )
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
        counts, agent = self.counts, agent_name(self._section)
        for result, calls in counts.tool_calls.items():
            metrics.count_to("agent_tool_calls_total", calls, agent=agent, result=result)
        # What has not happened is 0: else a rate would miss the first time.
        for stage in (*get_args(Stage), "close"):
            metrics.count_to("agent_environment_late_total", counts.late[stage], agent=agent, stage=stage)
        for stage, seconds in counts.seconds.items():
            metrics.count_to("agent_environment_seconds_total", seconds, agent=agent, stage=stage)
        for reason in LOST:
            hosts = 0 if self._hosts is None else self._hosts.lost[reason]
            metrics.count_to("agent_environment_hosts_lost_total", hosts, agent=agent, reason=reason)
        metrics.set("agent_environments", self.open, agent=agent)

    async def _opened(self) -> Here | Remote:
        if self._hosts is not None:
            return await self._hosts.open()
        assert self._make is not None
        settings, name = self._settings, f"environment {next(self._names)}"
        needs_state = settings.recovery == "state"
        return Here(self._make, settings.arguments, settings.tool_answer_chars, name, needs_state=needs_state)

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


def probe(config: RunConfig, section: str) -> None:
    """Start a host of an agent as a run does, and end it. Raises AgentFailure, for a class that cannot be used."""
    environments = Environments(config, section)

    async def tried() -> None:
        try:
            await environments.start()
        finally:
            await environments.close()

    asyncio.run(tried())
