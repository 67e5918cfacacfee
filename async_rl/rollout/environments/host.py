"""An environment host: a process in which environments of a user's class run, many at one time.

The worker that started it sends what to do over a socket (``frames``); ``hosts`` is its side. It ends with that socket.
It may run under another interpreter than the worker: beside the user's class it needs msgpack and Python 3.10.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from async_rl.rollout.environments.instance import Failed, Instance, check_state, failure, prepare
from async_rl.rollout.environments.rows import write_rows
from async_rl.rollout.environments.values import whole

NO_MSGPACK = 3
"""Exit status where the interpreter lacks msgpack."""


def main(descriptor: int) -> None:
    """Serve the socket of that number until the worker closes it, then end this process at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends this process.
    os.set_inheritable(descriptor, False)  # noqa: FBT003 - it takes no names
    try:
        import msgpack  # noqa: F401
    except ImportError:
        needs = f"{sys.executable} has no msgpack, which environments need; run {sys.executable} -m pip install msgpack"
        sys.stderr.write(needs)
        sys.stderr.flush()
        os._exit(NO_MSGPACK)
    try:
        asyncio.run(_Host().serve(socket.socket(fileno=descriptor)))
    finally:
        os._exit(0)  # Threads that hang would keep it from its end.


def import_class(name: str) -> Callable[..., Any]:
    """Import what ``module:Class`` names. Raises Failed, which says what is wrong."""
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise Failed(
            f"there is no module {error.name!r} for {sys.executable}; check the spelling, install it there, or add the "
            "folder that contains it to PYTHONPATH"
        ) from None
    except BaseException as error:  # noqa: BLE001 - whatever the user's module raises; ours say what they lack
        raise failure(error, f"importing {module_name!r} ") from None
    found: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(found):
        own = (value for value in vars(module).values() if getattr(value, "__module__", None) == module_name)
        known = [value.__name__ for value in own if isinstance(value, type) and value.__name__[0] != "_"]
        has = f"; it has {', '.join(known[:10])}" if known else ""
        raise Failed(f"module {module_name!r} has no class {attribute!r}{has}")
    return found


class _Host:
    def __init__(self) -> None:
        self._class: Callable[..., Any] | None = None
        self._arguments: dict[str, Any] = {}
        self._answer_chars = 0
        self._needs_state = False
        self._instances: dict[str, Instance] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def serve(self, connection: socket.socket) -> None:
        from async_rl.rollout.environments import frames

        reader, writer = await asyncio.open_connection(sock=connection)

        def answer(message: dict[str, Any]) -> None:
            try:
                writer.write(frames.packed(message))
            except Exception as error:  # noqa: BLE001 - one answer that cannot be sent must not end the host
                writer.write(
                    frames.packed({"id": message["id"], "fault": f"returned what cannot be sent: {error!r:.500}"})
                )

        while (message := await frames.read(reader)) is not None:
            number, op = message["id"], message["op"]
            if op == "cancel":
                if (task := self._tasks.get(number)) is not None:
                    task.cancel()
            elif op == "ping":
                answer({"id": number, "value": None})
            else:
                self._tasks[number] = task = asyncio.create_task(self._done(message, answer))
                task.add_done_callback(functools.partial(self._ended, number))

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        del self._tasks[number]
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error

    async def _done(self, message: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
        try:
            value = await self._do(message["op"], message.get("of", ""), message.get("args", []))
        except asyncio.CancelledError:
            raise  # The worker has given it up.
        except Exception as error:  # noqa: BLE001 - the worker fails the rollout with it
            made = failure(error)
            answer({"id": message["id"], "fault": whole(str(made)), "trace": made.trace})
        else:
            answer({"id": message["id"], "value": value})

    async def _do(self, op: str, of: str, arguments: list[Any]) -> Any:
        if op == "load":
            return await self._load(*arguments)
        if op in ("setup", "write_rows"):
            assert self._class is not None, "load comes first"
            if op == "write_rows":
                return await asyncio.to_thread(write_rows, self._class, self._arguments, *arguments)
            self._instances[of] = Instance(
                self._class, self._arguments, self._answer_chars, of, needs_state=self._needs_state
            )
        instance = self._instances.pop(of, None) if op == "close" else self._instances.get(of)
        if instance is None:
            return None  # It is closed, or was never set up.
        return await getattr(instance, op)(*arguments)

    async def _load(self, name: str, arguments: dict[str, Any], answer_chars: int, needs_state: bool) -> None:  # noqa: FBT001 - from a message
        self._class = await asyncio.to_thread(import_class, name)
        if needs_state:
            check_state(self._class)
        self._arguments, self._answer_chars, self._needs_state = arguments, answer_chars, needs_state
        await prepare(self._class, arguments)
