"""One MCP server as its client sees it: a program below this process, or an address. Knows the package mcp alone.

What goes wrong with it is a ``Failed``, and what the policy does wrong a ``ToolError``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import string
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from async_rl.rollout.environments.instance import Failed
from async_rl.rollout.environments.interface import ToolError
from async_rl.rollout.supervised import supervised

try:
    import httpx2
    from mcp import Client, MCPError, StdioServerParameters
    from mcp.client.stdio import get_default_environment, stdio_client
    from mcp.client.streamable_http import streamable_http_client
    from mcp_types import INVALID_PARAMS, REQUEST_TIMEOUT
except ImportError as error:
    raise Failed(
        f"tools of MCP servers need the package mcp, version 2: {error}; run {sys.executable} -m pip install "
        "'mcp>=2,<3'"
    ) from None

# Seconds for a server to end; a program has two to go by itself, and four until it and its children are killed.
_END_S = 12.0

# Bytes of one answer over HTTP: what a message to the worker may have. The SDK's megabyte would fail the rollout.
_MOST_BYTES = 64 * 2**20

# Pages of a list of tools: one that never ends must not hang the rollout.
_MOST_PAGES = 100

# Seconds to connect and to wait for bytes, as the SDK has them.
_CONNECT_S, _READ_S = 30.0, 300.0

_KEYS = ("command", "env", "cwd", "url", "headers", "shared", "tools")


@dataclass(frozen=True)
class Settings:
    """What the settings say of one server, checked; variables ``$NAME`` in ``env`` and ``headers`` are replaced."""

    name: str
    command: tuple[str, ...]
    """Program and arguments; empty for a server at ``url``."""
    env: tuple[tuple[str, str], ...]
    cwd: str | None
    url: str | None
    headers: tuple[tuple[str, str], ...]
    shared: bool
    tools: tuple[str, ...] | None
    start_s: float

    @classmethod
    def of(cls, name: str, settings: Any, start_s: float) -> Settings:
        """Return the settings of the server ``name``. Raises Failed, which says what is wrong with them."""
        where = f"its argument servers.{name}"
        if not isinstance(settings, Mapping):
            raise Failed(f"{where} is {settings!r:.80}; expected command or url")
        unknown = [str(key) for key in settings if key not in _KEYS]
        if unknown:
            raise Failed(f"{where} has {', '.join(unknown)}; known are {', '.join(_KEYS)}")
        command, url = settings.get("command"), settings.get("url")
        if (command is None) == (url is None):
            raise Failed(f"{where} needs one of command and url")
        if command is not None and (not _texts(command) or not command):
            raise Failed(f"{where}.command is {command!r:.80}; expected a list of texts, the program first")
        if url is not None and not str(url).startswith(("http://", "https://")):
            raise Failed(f"{where}.url is {url!r:.80}; expected one that begins with http:// or https://")
        tools = settings.get("tools")
        if tools is not None and not _texts(tools):
            raise Failed(f"{where}.tools is {tools!r:.80}; expected a list of names")
        return cls(
            name,
            tuple(command or ()),
            _with_variables(f"{where}.env", settings.get("env")),
            settings.get("cwd"),
            url,
            _with_variables(f"{where}.headers", settings.get("headers")),
            bool(settings.get("shared", False)),
            None if tools is None else tuple(tools),
            start_s,
        )


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)


def _with_variables(where: str, named: Any) -> tuple[tuple[str, str], ...]:
    if named is None:
        return ()
    if not isinstance(named, Mapping):
        raise Failed(f"{where} is {named!r:.80}; expected names with texts")
    try:
        return tuple((str(name), string.Template(str(value)).substitute(os.environ)) for name, value in named.items())
    except KeyError as error:
        raise Failed(f"{where} names the variable {error.args[0]}, which is not set; write $$ for a dollar") from None
    except ValueError:
        raise Failed(f"{where} has a $ before what is no name of a variable; write $$ for a dollar") from None


class Server:
    """A server while it is used, by one rollout or by several."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tools: list[dict[str, Any]] = []
        """Its tools as the policy gets them, once it is open."""
        self._client: Client | None = None
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opened: asyncio.Future[None] | None = None
        self._closing = asyncio.Event()
        self._late = False

    @property
    def name(self) -> str:
        """The name that the settings give it."""
        return self.settings.name

    @property
    def usable(self) -> bool:
        """Whether it is open, or being opened, on the event loop that asks."""
        ended = self._closing.is_set() or (self._task is not None and self._task.done())
        return not ended and self._loop in (None, asyncio.get_running_loop())

    async def open(self) -> None:
        """Start it or connect to it, and list its tools; a second call waits for the first. Raises Failed."""
        if self._opened is None:
            self._loop = asyncio.get_running_loop()
            self._opened = self._loop.create_future()
            # The contexts of the SDK have to be left in the task that has entered them.
            self._task = asyncio.create_task(self._run(self._opened), name=f"MCP server {self.name}")
        await asyncio.shield(self._opened)

    async def call(self, tool: str, arguments: dict[str, Any], limit_s: float) -> str:
        """Return what a tool answers, as text. Raises ToolError and Failed."""
        if self._client is None or self._closing.is_set():
            raise Failed(f"its server {self.name} has ended")
        try:
            result = await self._client.call_tool(tool, arguments, read_timeout_seconds=limit_s)
        except MCPError as error:
            if error.code == REQUEST_TIMEOUT:
                raise ToolError(f"{tool} has not answered within {limit_s:g} s") from None
            if error.code == INVALID_PARAMS:
                raise ToolError(str(error)) from None
            # The connection is lost, or the server does not keep to the protocol.
            self._closing.set()
            raise Failed(f"its server {self.name} failed in a call of {tool}: {error}") from None
        text = text_of(result)
        if result.is_error:
            raise ToolError(text or f"{tool} has failed")
        return text

    async def close(self) -> None:
        """End it; returns when nothing is left of it."""
        self._closing.set()
        if self._task is None:
            return
        if self._opened is not None and not self._opened.done() and not self._late:
            self._task.cancel()
        _, late = await asyncio.wait({self._task}, timeout=_END_S)
        if late:
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=_END_S)

    async def _run(self, opened: asyncio.Future[None]) -> None:
        """Hold the connection from its beginning to its end."""
        try:
            async with contextlib.AsyncExitStack() as stack:
                # Not asyncio.timeout, which Python 3.10 lacks, nor anyio's, which must not be left before the contexts.
                timer = asyncio.get_running_loop().call_later(self.settings.start_s, self._too_late)
                stack.callback(timer.cancel)
                client = await stack.enter_async_context(Client(self._transport(stack), cache=None))
                self.tools = await self._listed(client)
                timer.cancel()
                self._client = client
                opened.set_result(None)
                await self._closing.wait()
        except BaseException as error:  # noqa: BLE001 - whatever the SDK, the program or the network raises
            if not opened.done():
                opened.set_exception(self._failure(error))
                opened.exception()  # A rollout that is cancelled does not ask for it, and asyncio would log it.
        finally:
            self._client = None

    def _too_late(self) -> None:
        self._late = True
        assert self._task is not None
        self._task.cancel()

    def _failure(self, error: BaseException) -> Failed:
        while inner := getattr(error, "exceptions", None):  # a group, which Python 3.10 does not know
            error = inner[0]
        if isinstance(error, Failed):
            return error
        at = self.settings.url or " ".join(self.settings.command)
        what = f"its server {self.name} ({at:.200})"
        if self._late:
            return Failed(f"{what} has not listed its tools within {self.settings.start_s:g} s, its argument start_s")
        said = "" if self.settings.url else "; what it wrote is in the log of the worker"
        return Failed(f"{what} cannot be used: {str(error) or type(error).__name__:.500}{said}")

    def _transport(self, stack: contextlib.AsyncExitStack) -> Any:
        settings = self.settings
        if settings.url is not None:
            timeout = httpx2.Timeout(_CONNECT_S, read=_READ_S)
            client = httpx2.AsyncClient(headers=dict(settings.headers), timeout=timeout)
            stack.push_async_callback(client.aclose)
            return streamable_http_client(settings.url, http_client=client, max_sse_event_size=_MOST_BYTES)
        program, env = settings.command[0], dict(settings.env)
        if shutil.which(program, path=(get_default_environment() | env).get("PATH")) is None:
            raise Failed(f"its server {self.name} cannot be started: there is no program {program!r} on its PATH")
        command, *arguments = supervised(settings.command)
        parameters = StdioServerParameters(command=command, args=arguments, env=env, cwd=settings.cwd)
        return stdio_client(parameters, errlog=sys.__stderr__ or sys.stderr)

    async def _listed(self, client: Client) -> list[dict[str, Any]]:
        """Return the tools of a server that the policy is to have, described as OpenAI's API does."""
        found: dict[str, dict[str, Any]] = {}
        cursor: str | None = None
        for _ in range(_MOST_PAGES):
            page = await client.list_tools(cursor=cursor)
            for tool in page.tools:
                function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
                found[tool.name] = {"type": "function", "function": function}
            cursor = page.next_cursor
            if cursor is None:
                break
        wanted = self.settings.tools
        if wanted is None:
            return list(found.values())
        missing = [name for name in wanted if name not in found]
        if missing:
            has = ", ".join(found) or "none"
            raise Failed(f"its server {self.name} has no tool {', '.join(missing)}; it has {has}")
        return [found[name] for name in wanted]


def text_of(result: Any) -> str:
    """Return the content of a tool's answer as text: its texts, and a note for each image, sound or file."""
    parts = [_part(block) for block in result.content]
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)


def _part(block: Any) -> str:
    if block.type == "text":
        return str(block.text)
    if block.type == "resource_link":
        return f"[{block.name}: {block.uri}]"
    if block.type == "resource":
        resource = block.resource
        text = getattr(resource, "text", None)
        return str(text) if text is not None else f"[{resource.mime_type or 'bytes'}: {resource.uri}]"
    return f"[{block.mime_type}: no text]"
