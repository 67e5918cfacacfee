"""One environment of a user's class while its rollout runs: all that is the user's comes out of it as plain data.

It runs on the worker's event loop or in an environment host, under whatever interpreter that has: it imports the
standard library alone. A failure is a ``Failed`` with a text, whatever was raised.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from async_rl.rollout.environments.adapters import STATE_METHODS, Form, form_of
from async_rl.rollout.environments.interface import Context, Message, PolicyAddress, Step, Task
from async_rl.rollout.environments.own_thread import OwnThread
from async_rl.rollout.environments.tools import NoSchema, schema_of
from async_rl.rollout.environments.values import as_text, json_text, number, plain, whole

# What is kept of an exception's text: some carry the whole output of a program.
_MAX_MESSAGE = 2000

# Metrics of a step; all of a rollout together may be as many as a reward may have parts.
_MAX_METRICS = 32

# Numbers of an info that is a gym's, or of metrics, have names of at most so many characters.
_MAX_NAME = 60


State = bytes | str
"""What ``get_state`` returned: bytes as they are, all else as JSON."""


class Failed(Exception):
    """A user's method has failed; the message says what it did, ``trace`` where."""

    def __init__(self, what: str, trace: str = "") -> None:
        super().__init__(what)
        self.trace = trace


class Gone(Failed):
    """The environment is lost with the process that it was in, for no fault that is known to be its own."""


class Held(Protocol):
    """An environment as the driver of a rollout has it, here or in a host. Each method raises Failed."""

    async def setup(self, task: Mapping[str, Any], context: Mapping[str, Any]) -> dict[str, Any]:
        """Make the environment, and return {"messages": list or None, "tools": schemas, "steps", "plays": bool}."""

    async def step(self, message: Message) -> dict[str, Any]:
        """Return {"messages", "reward", "done", "truncated", "metrics"} of a step."""

    async def use(self, tool: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return {"content", "fault"} of a tool's answer, with what ``step`` returns but messages."""

    async def play(self, policy: Mapping[str, str]) -> dict[str, Any]:
        """Make the whole rollout with the policy at that ``PolicyAddress``; return what ``step`` does but messages."""

    async def reward(self, messages: Sequence[Message]) -> Any:
        """Return the environment's reward of all that was said as plain data: a number, a mapping or None."""

    async def get_state(self) -> State | None:
        """Return the environment's state, or None where it cannot be saved at present."""

    async def set_state(self, state: State) -> None:
        """Set the environment, which was set up, to a state that was saved."""

    async def close(self) -> None:
        """Close the environment, if it was made."""


class Instance:
    """An environment here: ``make`` returns the user's object, called with ``arguments`` by name."""

    def __init__(
        self,
        make: Callable[..., Any],
        arguments: Mapping[str, Any],
        answer_chars: int,
        name: str,
        *,
        needs_state: bool = False,
    ) -> None:
        """Take what the environment is made with.

        answer_chars: bounds what a tool answers. name: that of its thread. needs_state: refuses an environment whose
        state cannot be saved.
        """
        self._make, self._arguments = make, dict(arguments)
        self._answer_chars = answer_chars
        self._needs_state = needs_state
        self._thread = OwnThread(name)
        self._form: Form | None = None
        self._tools: dict[str, Callable[..., Any]] = {}

    async def setup(self, task: Mapping[str, Any], context: Mapping[str, Any]) -> dict[str, Any]:
        """As ``Held.setup``. Raises Failed."""
        found: dict[str, Any] = await self._guarded("", self._setup(Task(**task), Context(**context)))
        return found

    async def _setup(self, task: Task, context: Context) -> dict[str, Any]:
        environment = await self._thread.call(self._make, **self._arguments)
        self._form = form = form_of(environment, self._thread.call)
        if self._needs_state and not form.has_state:
            raise _no_state(type(environment).__name__)
        said = await form.setup(task, context)
        self._tools = form.methods
        messages = None if said is None else _messages(said, "user", "its setup")
        return {"messages": messages or None, "tools": self._schemas(form), "steps": form.steps, "plays": form.plays}

    def _schemas(self, form: Form) -> list[Any]:
        if form.schemas is not None:
            return list(plain(list(form.schemas)))
        found = []
        for name, method in self._tools.items():
            try:
                found.append(schema_of(name, method))
            except NoSchema as error:
                what = f"its method {name} cannot be a tool: {error}; or begin its name with _, or give it no docstring"
                raise Failed(what) from None
        return found

    async def step(self, message: Message) -> dict[str, Any]:
        """As ``Held.step``. Raises Failed."""
        form = self._made()
        step = await self._guarded("its step ", form.step(dict(message)))
        if not isinstance(step, Step):
            raise Failed(f"its step returned {_shown(step)}; expected a Step")
        return {"messages": _messages(step.messages, "user", "its step"), **_of(step)}

    async def use(self, tool: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """As ``Held.use``. Raises Failed."""
        form = self._made()

        async def used() -> tuple[Any, bool]:
            try:
                return await self._thread.call(self._tools[tool], **arguments), False
            except form.tool_errors as error:
                return str(error) or type(error).__name__, True

        value, fault = await self._guarded(f"its tool {tool} ", used())
        if not isinstance(value, Step):
            return {"content": as_text(value, self._answer_chars), "fault": fault, **_of(Step())}
        said = value.messages
        said = (
            said
            if isinstance(said, str)
            else "\n".join(m["content"] for m in _messages(said, "tool", f"its tool {tool}"))
        )
        return {"content": as_text(said, self._answer_chars), "fault": False, **_of(value)}

    async def play(self, policy: Mapping[str, str]) -> dict[str, Any]:
        """As ``Held.play``. Raises Failed."""
        step = await self._guarded("its rollout ", self._made().play(PolicyAddress(**policy)))
        if not isinstance(step, Step):
            raise Failed(f"its rollout returned {_shown(step)}; expected a Step")
        return _of(step)

    async def reward(self, messages: Sequence[Message]) -> Any:
        """As ``Held.reward``. Raises Failed."""
        return plain(await self._guarded("its reward ", self._made().reward([dict(each) for each in messages])))

    async def get_state(self) -> State | None:
        """As ``Held.get_state``. Raises Failed."""
        state = await self._guarded("its get_state ", self._made().get_state())
        if state is None or isinstance(state, bytes):
            return state
        if isinstance(state, (bytearray, memoryview)):
            return bytes(state)
        try:
            return json_text(state)
        except TypeError as error:
            raise Failed(f"its get_state returned {_shown(state)}, but {error}; return bytes or plain JSON") from None

    async def set_state(self, state: State) -> None:
        """As ``Held.set_state``. Raises Failed."""
        value = json.loads(state) if isinstance(state, str) else state
        await self._guarded("its set_state ", self._made().set_state(value))

    async def close(self) -> None:
        """As ``Held.close``. Raises Failed."""
        try:
            if self._form is not None:
                form, self._form = self._form, None
                await self._guarded("its close ", form.close())
        finally:
            self._thread.end()

    def _made(self) -> Form:
        if self._form is None:
            raise Failed("is closed")
        return self._form

    async def _guarded(self, what: str, work: Awaitable[Any]) -> Any:
        """Return what ``work`` returns; whatever it raises is a Failed, but for a cancellation from outside."""
        task = asyncio.ensure_future(_kept(work))
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise
        returned, value = (False, asyncio.CancelledError()) if task.cancelled() else task.result()
        if returned:
            return value
        raise failure(value, what) from None


async def _kept(work: Awaitable[Any]) -> tuple[bool, Any]:
    """Return what was returned, or what was raised: a SystemExit would end the event loop."""
    try:
        return True, await work
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever the user's method raises goes to the caller
        return False, error


def check_state(found: Callable[..., Any]) -> None:
    """Raise Failed for a class whose instances cannot be saved; what a function returns is seen when it is called."""
    if isinstance(found, type) and not all(hasattr(found, name) for name in STATE_METHODS):
        raise _no_state(found.__name__)


def _no_state(name: str) -> Failed:
    return Failed(
        f"{name} has no get_state and set_state, which rollout.agent.recovery state calls; write them, or set "
        "rollout.agent.recovery to replay or restart"
    )


async def prepare(make: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Call the class method ``prepare`` of the user's class, if it has one, in this thread. Raises Failed."""
    hook = hook_of(make, "prepare")
    if hook is None:
        return

    async def prepared() -> None:
        found = hook(**arguments)
        if inspect.isawaitable(found):
            await found

    returned, error = await _kept(prepared())
    if not returned:
        raise failure(error, "its prepare ")


def hook_of(make: Callable[..., Any], name: str) -> Callable[..., Any] | None:
    """Return a class method of the user's class; None for what else has the name, which may be a tool."""
    if isinstance(make, type) and isinstance(inspect.getattr_static(make, name, None), classmethod):
        found: Callable[..., Any] = getattr(make, name)
        return found
    return None


def failure(error: BaseException, what: str = "") -> Failed:
    """Return whatever was raised as a Failed, which may be one already; ``what`` goes before the text of others."""
    if isinstance(error, Failed):
        return error
    try:
        message = whole(str(error))[:_MAX_MESSAGE]
    except Exception:  # noqa: BLE001 - the user's __str__
        message = ""
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))[-8 * _MAX_MESSAGE :]
    return Failed(f"{what}raised {type(error).__name__}" + (f": {message}" if message else ""), whole(trace))


def _messages(value: Any, role: str, where: str) -> list[Message]:
    """Return what a method says as messages with their contents as text; a text is one of ``role``. Raises Failed."""
    if isinstance(value, str):
        return [{"role": role, "content": whole(value)}] if value else []
    if not isinstance(value, Sequence):
        raise Failed(f"{where} returned {_shown(value)} for messages; expected a text or a list of messages")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise Failed(f"{where} returned the message {_shown(message)}; expected one with role and content as text")
    return [plain(message) for message in value]


def _of(step: Step) -> dict[str, Any]:
    if step.reward is not None and number(step.reward) is None:
        raise Failed(f"returned a step with the reward {_shown(step.reward)}; expected a finite number or None")
    named = list(step.metrics.items())[:_MAX_METRICS]
    metrics = {whole(str(name))[:_MAX_NAME]: found for name, value in named if (found := number(value)) is not None}
    reward = None if step.reward is None else number(step.reward)
    ends = {"done": bool(step.done or step.truncated), "truncated": bool(step.truncated)}
    return {"reward": reward, **ends, "metrics": metrics}


def _shown(value: Any) -> str:
    try:
        return whole(f"{value!r:.200} of type {type(value).__name__}")
    except Exception:  # noqa: BLE001 - the user's __repr__
        return f"a {type(value).__name__}"
