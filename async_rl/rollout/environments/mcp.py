"""An environment whose tools are those of MCP servers; the reward comes from a function of the user's, or a subclass.

    agent:
      environment: async_rl.rollout.environments.mcp:McpTools
      arguments:
        servers: {files: {command: [python, -m, my_files]}, search: {url: "http://search:8000/mcp", shared: true}}
        reward: my_rewards:solved

A server is a program that is started for each rollout and ended with it, or an address. One that is ``shared`` serves
all rollouts of its environment host. Needs the package mcp in the interpreter that runs environments, and knows nothing
beyond the standard library beside it. See docs/how-to/mcp-tools.md.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from async_rl.rollout.environments.host import import_class
from async_rl.rollout.environments.instance import Failed
from async_rl.rollout.environments.interface import Context, Message, Task
from async_rl.rollout.environments.mcp_server import Server, Settings

_REWARD_TAKES = ("task", "messages", "answer", "calls")

_shared: dict[Settings, Server] = {}


class McpTools:
    """Gives the policy the tools of MCP servers, by the names and JSON schemas that these have for them."""

    def __init__(
        self, servers: Mapping[str, Any], reward: str | None = None, start_s: float = 60.0, call_s: float = 30.0
    ) -> None:
        """Check the arguments of ``rollout.agent.arguments``; nothing is started yet.

        servers: by name, {"command": [...], "env": {...}, "cwd": "..."} or {"url": "...", "headers": {...}}, with
            "shared" (false) and "tools", the names of those that the policy is to have (all).
        reward: ``module:function`` that is called with what it names among ``task``, ``messages`` (all that was said),
            ``answer`` (the last turn, if it calls no tool) and ``calls`` (see ``self.calls``), and returns the reward
            as ``reward`` may; may be async.
        start_s: seconds for a server to start and list its tools.
        call_s: seconds for a call; when they are over, the policy gets that for an answer. Set it below
            ``rollout.agent.step_s``.

        Raises Failed, which names the argument.
        """
        if not isinstance(servers, Mapping) or not servers:
            raise Failed(f"its argument servers is {servers!r:.80}; name at least one server")
        self._settings = {str(name): Settings.of(str(name), each, start_s) for name, each in servers.items()}
        self._call_s = call_s
        self._reward: Callable[..., Any] | None = None if reward is None else import_class(reward)
        if self._reward is None and type(self).reward is McpTools.reward:
            raise Failed("has no reward; set its argument reward to module:function, or write a subclass with reward")
        self._servers: list[Server] = []
        self._of_tool: dict[str, Server] = {}
        self.tools: list[dict[str, Any]] = []
        """The tools as the policy gets them, once ``setup`` has returned."""
        self.calls: list[dict[str, Any]] = []
        """The calls so far: {"name", "arguments", "content" or "error"}, with contents and errors as text."""

    async def setup(self, task: Task, context: Context) -> list[Message] | str | None:
        """Start the servers, or connect to them, and list their tools. Raises Failed, which names the server."""
        del context
        self.task = task
        self._servers = [_server(each) for each in self._settings.values()]
        for failed in await asyncio.gather(*(server.open() for server in self._servers), return_exceptions=True):
            if failed is not None:
                raise failed
        for server in self._servers:
            for tool in server.tools:
                name = tool["function"]["name"]
                if name in self._of_tool:
                    both = f"servers {self._of_tool[name].name} and {server.name}"
                    raise Failed(f"has two tools {name!r}, of its {both}; list under tools what each is to give")
                self._of_tool[name] = server
                self.tools.append(tool)
        return None

    async def call_tool(self, name: str, arguments: dict[str, Any]) -> str:
        """Return what a tool answers, as text; also for the use of subclasses.

        Raises ToolError for what the policy did wrong, as the server says, and for a call without an answer in time;
        Failed if the server is gone.
        """
        call: dict[str, Any] = {"name": name, "arguments": arguments}
        self.calls.append(call)
        try:
            call["content"] = await self._of_tool[name].call(name, arguments, self._call_s)
        except Exception as error:
            call["error"] = str(error)
            raise
        return str(call["content"])

    async def reward(self, messages: Sequence[Message]) -> Any:
        """Return what the function of the argument ``reward`` says of the rollout."""
        assert self._reward is not None
        last = messages[-1] if messages else {}
        said = last.get("role") == "assistant" and not last.get("tool_calls")
        known = (self.task, messages, last.get("content") if said else None, self.calls)
        takes = inspect.signature(self._reward).parameters
        found = self._reward(**{name: each for name, each in zip(_REWARD_TAKES, known, strict=True) if name in takes})
        return await found if inspect.isawaitable(found) else found

    async def close(self) -> None:
        """End the servers of this rollout, and the connections to those that are elsewhere."""
        own = [server for server in self._servers if not server.settings.shared]
        await asyncio.gather(*(server.close() for server in own))


def _server(settings: Settings) -> Server:
    """Return a server for one rollout, or the one that is shared."""
    if not settings.shared:
        return Server(settings)
    server = _shared.get(settings)
    if server is None or not server.usable:
        server = _shared[settings] = Server(settings)
    return server
