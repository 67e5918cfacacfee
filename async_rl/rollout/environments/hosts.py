"""Environment hosts of a worker: processes in which environments run, and others in place of those that die.

``host`` is what runs in them. What happens in one is felt by the rollouts in it alone: its death is a ``Gone`` for
them, and one that answers nothing any more, because a method blocks its event loop, is killed. Knows processes and
sockets; neither sessions nor how an environment is driven.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import sys
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

import async_rl
from async_rl.config.rollouts import AgentSection
from async_rl.rollout.environments import frames
from async_rl.rollout.environments.instance import Failed, Gone, State
from async_rl.rollout.environments.interface import Message
from async_rl.rollout.supervised import end_program, inherited, start_program

log = structlog.get_logger(__name__)

# Seconds for a host to start and to import the user's class; one with a large library takes ten, a full disk a minute.
START_S = 300.0

# Seconds for a host to end by itself: what runs in it is cancelled, and puts away its files and servers.
LEAVE_S = 5.0

# Seconds for a host to answer that it is there, when a call in it has taken too long.
PING_S = 10.0

# Environments whose close was given up before their host gets no more: each may keep a thread, and a core, busy.
MAX_ABANDONED = 8

# What is kept of the end of a host's output: a traceback.
_KEPT_CHARS = 4000

# Loads this package alone from its folder: with the folder's parent in sys.path, the user's class would find the
# libraries of the worker's environment beside its own. The worker's folders keep their order: setuptools adds copies of
# other packages at the end.
_BEGIN = """
import importlib.util, json, sys
package, descriptor, paths = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
sys.path[:] = [*paths, *(path for path in sys.path if path not in paths)]
spec = importlib.util.spec_from_file_location(
    "async_rl", package + "/__init__.py", submodule_search_locations=[package]
)
sys.modules["async_rl"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from async_rl.rollout.environments.host import main
main(descriptor)
"""


LOST = ("died", "silent", "abandoned")
"""Why a host is lost: it ended, it answered nothing, or too many environments were left in it."""


class Hosts:
    """The hosts of one agent's environments."""

    def __init__(self, settings: AgentSection, section: str) -> None:
        """``section`` is that of the settings."""
        self._settings = settings
        self._section = section
        self._running: list[_Host] = []
        self._retired: set[_Host] = set()
        self._starting = asyncio.Lock()
        self._closed = False
        self._ending: set[asyncio.Task[None]] = set()
        self._names = itertools.count()
        self.lost: Counter[str] = Counter()
        """Hosts that have died, were killed in silence, or get no more environments, by which of these it is."""

    async def open(self) -> Remote:
        """Return a place for an environment in the host that has the fewest. Raises Failed if none starts."""
        async with self._starting:
            if self._closed:
                raise Failed("has no host: the worker ends")
            for host in [host for host in self._running if host.gone or host.abandoned >= MAX_ABANDONED]:
                self._running.remove(host)
                if not host.gone:
                    self.lost["abandoned"] += 1
                self._retire(host)
            if len(self._running) < self._settings.hosts and all(host.open for host in self._running):
                host = _Host(self._settings, self._section, self.lost)
                try:
                    await host.start()
                except BaseException:
                    await host.end()
                    raise
                self._running.append(host)
            host = min(self._running, key=lambda host: host.open)
            host.open += 1
        return Remote(host, f"environment {next(self._names)}", self)

    async def close(self) -> None:
        """End all hosts, with all that runs in them."""
        self._closed = True
        for host in [*self._running, *self._retired]:
            self._end(host)
        self._running, self._retired = [], set()
        if self._ending:
            await asyncio.wait(self._ending)

    def left(self, host: _Host) -> None:
        """Note that one environment less is in a host."""
        host.open -= 1
        if host in self._retired:
            self._retire(host)

    async def check(self, host: _Host) -> None:
        """Kill a host that does not answer, because a method blocks it."""
        if not host.gone and not await host.answers():
            self.lost["silent"] += 1
            log.warning("environment_host_killed", environments=host.open, silent_s=PING_S)
            host.fail("was ended with its environment host, which answered nothing: an async method blocks there")
            self._end(host, at_once=True)

    def _retire(self, host: _Host) -> None:
        """Give a host no more environments, and end it once it has none."""
        if host.open and not host.gone:
            self._retired.add(host)
            return
        self._retired.discard(host)
        self._end(host)

    def _end(self, host: _Host, *, at_once: bool = False) -> None:
        task = asyncio.create_task(host.end(0.0 if at_once else LEAVE_S))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


class _Host:
    """One process, and what was asked of it."""

    def __init__(self, settings: AgentSection, section: str, lost: Counter[str]) -> None:
        self._settings = settings
        self._section = section
        self._lost = lost
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._ids = itertools.count()
        self._said: deque[str] = deque()  # the end of its output
        self._loaded = False
        self._fault: str | None = None
        self.open = 0
        """Environments in it."""
        self.abandoned = 0
        """Environments in it whose close was given up."""

    @property
    def gone(self) -> bool:
        """Whether it has died or was ended."""
        return self._fault is not None

    async def start(self) -> None:
        """Start the process, and have it import the user's class. Raises Failed."""
        settings = self._settings
        python = str(settings.python or sys.executable)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            package, paths = str(Path(async_rl.__file__).parent), json.dumps(_paths(own=settings.python is None))
            command = (python, "-c", _BEGIN, package, str(theirs.fileno()), paths)
            self._process = await start_program(command, inherited(), pass_fds=(theirs.fileno(),))
            reader, self._writer = await asyncio.open_connection(sock=ours.dup())
        self._tasks = [asyncio.create_task(self._listen(reader)), asyncio.create_task(self._hear(self._process))]
        environment, arguments = settings.environment, settings.arguments
        try:
            async with asyncio.timeout(START_S):
                needs_state = settings.recovery == "state"
                await self.ask("load", "", environment, arguments, settings.tool_answer_chars, needs_state)
        except TimeoutError:
            raise Failed(f"its host has not imported it after {START_S:g} s") from None
        self._loaded = True

    async def ask(self, op: str, of: str, *arguments: Any) -> Any:
        """Return what the host answers. Raises Failed, also when the host dies; the host hears of a cancellation."""
        if self._fault is not None or self._writer is None:
            raise self._failure(self._fault or "has no host")
        number = next(self._ids)
        try:
            request = frames.packed({"id": number, "op": op, "of": of, "args": arguments})
        except (frames.FrameTooLarge, TypeError, ValueError, OverflowError) as error:
            raise Failed(f"cannot be sent what is asked of it: {error}") from None
        answered = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(request)
            return await answered
        except asyncio.CancelledError:
            if not self.gone:
                self._writer.write(frames.packed({"id": number, "op": "cancel"}))
            raise
        finally:
            del self._asked[number]

    async def answers(self) -> bool:
        """Return whether it answers within ``PING_S``."""
        try:
            async with asyncio.timeout(PING_S):
                await self.ask("ping", "")
        except TimeoutError:
            return False
        except Failed:
            pass  # It is dead, and not for silence.
        return True

    def fail(self, what: str) -> None:
        """Fail all that was asked of it, and what will be."""
        self._fault = self._fault or what
        for answered in self._asked.values():
            if not answered.done():
                answered.set_exception(self._failure(self._fault))

    def _failure(self, what: str) -> Failed:
        return Gone(what) if self._loaded else Failed(what)

    async def end(self, leave_s: float = 0.0) -> None:
        """End the process, which may do so itself for a while, and all that it has started; then nothing is left."""
        self.fail("was ended with its environment host")
        if self._writer is not None:
            self._writer.close()
        if self._process is None:
            return
        try:
            await asyncio.wait({asyncio.ensure_future(self._process.wait())}, timeout=leave_s)
        finally:
            await end_program(self._process, self._tasks)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Hand the answers to those that asked, until the host is gone."""
        while (message := await frames.read(reader)) is not None:
            answered = self._asked.get(message.get("id", -1))
            if answered is None or answered.done():
                continue
            if "fault" in message:
                answered.set_exception(Failed(str(message["fault"]), str(message.get("trace", ""))))
            else:
                answered.set_result(message.get("value"))
        assert self._process is not None
        status = await self._process.wait()
        await asyncio.wait(self._tasks[1:], timeout=1.0)  # for the end of what it said
        said = "".join(self._said).strip()[-1000:]
        if not self._loaded:
            python = self._settings.python or sys.executable
            self.fail(f"its host under {python} ({self._section}.python) did not start: {said or f'status {status}'}")
            return
        if self._fault is None:
            self._lost["died"] += 1
            log.warning("environment_host_died", status=status, environments=self.open)
        end = f"its output ends with: {said}" if said else "it said nothing"
        self.fail(f"was ended with its environment host, which ended with status {status}; {end}")

    async def _hear(self, process: asyncio.subprocess.Process) -> None:
        """Pass on what the host and the user's class write, to the log of the worker."""
        assert process.stdout is not None
        while chunk := await process.stdout.read(_KEPT_CHARS):
            text = chunk.decode(errors="replace")
            self._said.append(text)
            while sum(map(len, self._said)) - len(self._said[0]) >= _KEPT_CHARS:
                self._said.popleft()
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(text)


class Remote:
    """An environment in a host: ``instance.Held`` over the socket."""

    def __init__(self, host: _Host, name: str, hosts: Hosts) -> None:
        self._host, self._name, self._hosts = host, name, hosts

    async def setup(self, task: Mapping[str, Any], context: Mapping[str, Any]) -> dict[str, Any]:
        """As ``Held.setup``. Raises Failed."""
        return dict(await self._host.ask("setup", self._name, task, context))

    async def step(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """As ``Held.step``. Raises Failed."""
        return dict(await self._host.ask("step", self._name, message))

    async def use(self, tool: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """As ``Held.use``. Raises Failed."""
        return dict(await self._host.ask("use", self._name, tool, arguments))

    async def play(self, policy: Mapping[str, str]) -> dict[str, Any]:
        """As ``Held.play``. Raises Failed."""
        return dict(await self._host.ask("play", self._name, policy))

    async def reward(self, messages: Sequence[Message]) -> Any:
        """As ``Held.reward``. Raises Failed."""
        return await self._host.ask("reward", self._name, messages)

    async def get_state(self) -> State | None:
        """As ``Held.get_state``. Raises Failed."""
        state: State | None = await self._host.ask("get_state", self._name)
        return state

    async def set_state(self, state: State) -> None:
        """As ``Held.set_state``. Raises Failed."""
        await self._host.ask("set_state", self._name, state)

    async def write_rows(self, split: str, path: Path) -> int:
        """Have the class's own rows written to a file of this host, and return how many they are. Raises Failed."""
        return int(await self._host.ask("write_rows", "", split, str(path)))

    async def close(self) -> None:
        """As ``Held.close``. Raises Failed."""
        if not self._host.gone:  # Else there is nothing left to close.
            await self._host.ask("close", self._name)

    async def check(self) -> None:
        """Find out whether the host still works, after a call in it took too long."""
        await self._hosts.check(self._host)

    def leave(self, *, abandoned: bool) -> None:
        """Give the place back; ``abandoned`` says that the environment has not closed."""
        self._host.abandoned += abandoned
        self._hosts.left(self._host)


def _paths(*, own: bool) -> list[str]:
    """Return where the user's modules may be: all of sys.path for this interpreter, its own folders not for another."""
    found = [os.path.abspath(path) for path in sys.path if not path.endswith(".zip")]
    if own:
        return found
    kept = (sys.prefix, sys.base_prefix, sys.exec_prefix)
    return [path for path in found if not path.startswith(kept) and "-packages" not in path]
