"""Environments of OpenEnv, on a server that runs elsewhere, as ``rollout.agent.environment``.

Each rollout has a WebSocket of its own, which is a session of the server. Its protocol is a handful of JSON messages
(reset, step, state, close), and spoken here: OpenEnv's own client would bring a hundred packages that do not go
together with vLLM's. What it imports is websockets and the standard library.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from async_rl.rollout.environments.instance import Failed
from async_rl.rollout.environments.interface import Context, Message, Step, Task
from async_rl.rollout.environments.values import as_text, number

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

# Seconds for a session to become free on a server that has none left.
FREE_SESSION_S = 60.0

# Seconds for a connection to be made, and for one to close.
_CONNECT_S, _CLOSE_S = 30.0, 5.0

# As OpenEnv's own client: an observation may be a page or a picture.
_MOST_BYTES = 100 * 2**20

# pydantic's names for what is wrong with an action whatever the policy says.
_WRONG_FIELDS = ("extra_forbidden", "missing")


class Refused(Exception):
    """The server has answered a request with an error."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.code = str(data.get("code"))
        self.errors = [each for each in data.get("errors") or () if isinstance(each, Mapping)]
        where = (f"{'.'.join(map(str, each.get('loc') or ()))}: {each.get('msg')}" for each in self.errors)
        super().__init__("; ".join(where) or str(data.get("message")))


class OpenEnv:
    """One rollout, as a session of the server.

    What the policy says is an action: its text in one field of it, a JSON object, or calls of the server's tools.
    """

    def __init__(
        self,
        url: str,
        *,
        text_field: str | None = None,
        tools: bool = False,
        observation_field: str | None = None,
        answer_chars: int = 16_384,
        token_variable: str | None = None,
    ) -> None:
        """Take the server's address and how its environment is talked to.

        url: http, https, ws or wss. text_field: the field of an action that has what the policy says; None for actions
        that the policy writes as JSON. tools: whether actions are calls of the server's MCP tools. observation_field:
        the field of an observation that the policy sees; None for all of them. answer_chars: most characters of an
        observation. token_variable: the environment variable with a bearer token for the server. Raises Failed.
        """
        if tools and text_field is not None:
            raise Failed(f"has tools true and text_field {text_field!r} in rollout.agent.arguments; set one of them")
        self.tools: list[dict[str, Any]] = []
        self._url = _websocket(url)
        self._text_field, self._with_tools, self._observation_field = text_field, tools, observation_field
        self._answer_chars = answer_chars
        self._headers = {} if token_variable is None else {"Authorization": f"Bearer {_token(token_variable)}"}
        self._connection: ClientConnection | None = None
        self._faults = 0
        self._fault_metric = "tool_errors" if tools else "action_errors"

    @classmethod
    def prepare(cls, **arguments: Any) -> None:
        """Refuse arguments that no rollout could begin with. Raises Failed."""
        cls(**arguments)

    async def setup(self, task: Task, context: Context) -> list[Message]:
        """Begin a session, reset it and return the row's messages, the last of the user with the first observation."""
        own = task.fields.get("seed")
        seed = own if isinstance(own, int) else task.seed
        further = task.fields.get("reset")
        further = dict(further) if isinstance(further, Mapping) else {}
        observed = await self._begun({"seed": seed, "episode_id": context.rollout_id, **further})
        if self._with_tools:
            self.tools = _tools(await self._answered("step", {"type": "list_tools"}))
        return _first(task, self._shown(observed))

    async def step(self, message: Message) -> Step:
        """Do what the policy said."""
        if self._with_tools:
            return await self._call_tools(message)
        said = str(message.get("content") or "")
        try:
            answer = await self._asked("step", self._action(said))
        except ValueError as fault:
            return self._answer_fault(f"{fault}")
        except Refused as refused:
            if refused.code != "VALIDATION_ERROR":
                raise self._failure("step", refused) from None
            wrong = any(each.get("type") in _WRONG_FIELDS for each in refused.errors)
            if self._text_field is not None and wrong:
                raise Failed(
                    f"an action of {self._url} is not a text in {self._text_field!r} ({refused}); set "
                    "rollout.agent.arguments.text_field, or leave it out for actions as JSON"
                ) from None
            return self._answer_fault(f"{refused}")
        # The last observation is shown to no policy, and need not have the field.
        return await self._step(answer, "" if answer.get("done") else self._shown(answer))

    async def close(self) -> None:
        """End the session."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):  # It is gone, and its session with it.
                await connection.send(json.dumps({"type": "close"}))
                await connection.close()

    def _action(self, said: str) -> dict[str, Any]:
        """Return an action of a text. Raises ValueError, with what the policy is to hear."""
        if self._text_field is not None:
            return {self._text_field: said}
        try:
            action = json.loads(said)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"an action must be a JSON object alone: {error}") from None
        if not isinstance(action, dict):
            raise ValueError("an action must be a JSON object")
        return action

    def _answer_fault(self, fault: str) -> Step:
        """Return the step that answers an action with what was wrong with it."""
        self._faults += 1
        return Step(f"Error: {fault}", metrics={self._fault_metric: self._faults})

    async def _call_tools(self, message: Message) -> Step:
        """Call tools one after the other; the rollout is done when the policy calls none."""
        said: list[Message] = []
        rewards: list[float] = []
        whole = Step(metrics={self._fault_metric: self._faults})
        calls = message.get("tool_calls") or ()
        for call in calls:
            function = call["function"]
            arguments = function.get("arguments") or {}
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            action = {"type": "call_tool", "tool_name": function["name"], "arguments": arguments}
            answer = await self._answered("step", action)
            step = await self._step(answer, self._result(answer["observation"]))
            said.append({"role": "tool", "content": str(step.messages), "name": function["name"]})
            if call.get("id") is not None:
                said[-1]["tool_call_id"] = call["id"]
            rewards += [] if step.reward is None else [step.reward]
            whole.metrics = {**whole.metrics, **step.metrics}
            if step.done:
                whole.done = True
                break
        whole.messages, whole.done = said, whole.done or not calls
        whole.reward = sum(rewards) if rewards else None
        return whole

    def _result(self, observation: Mapping[str, Any]) -> str:
        """Return what a tool answered, as text."""
        error = observation.get("error")
        if isinstance(error, Mapping):
            if error.get("error_type") == "transport_error":
                raise Failed(f"{self._url} could not call its tool: {error.get('message')}")
            self._faults += 1
            return f"Error: {error.get('message')}"
        result = observation.get("result")
        if isinstance(result, Mapping) and "data" in result:  # as FastMCP wraps it
            result = result["data"]
        return as_text(result, self._answer_chars)

    def _shown(self, answer: Mapping[str, Any]) -> str:
        """Return what the policy sees of an observation."""
        observation = answer["observation"]
        if self._observation_field is None:
            seen = {name: value for name, value in observation.items() if name != "metadata" and value is not None}
            alone = next(iter(seen.values())) if len(seen) == 1 else None
            return as_text(alone if isinstance(alone, str) else seen or "", self._answer_chars)
        if self._observation_field not in observation:
            raise Failed(
                f"an observation of {self._url} has no {self._observation_field!r}, which "
                f"rollout.agent.arguments.observation_field names; it has {', '.join(map(str, observation))}"
            )
        return as_text(observation[self._observation_field], self._answer_chars)

    async def _step(self, answer: Mapping[str, Any], text: str) -> Step:
        reward, done = answer.get("reward"), bool(answer.get("done"))
        if reward is not None and number(reward) is None:
            raise Failed(f"{self._url} gave the reward {reward!r:.100}; expected a finite number")
        metrics = {self._fault_metric: float(self._faults), **_numbers(answer.get("metadata"))}
        if done:
            metrics = {**metrics, **_numbers(await self._answered("state"))}
        return Step(text, None if reward is None else number(reward), done, metrics=metrics)

    async def _begun(self, arguments: dict[str, Any]) -> Mapping[str, Any]:
        """Connect and reset, and return the answer; wait for a session where the server has none left."""
        until = time.monotonic() + FREE_SESSION_S
        while True:
            await self._connect()
            try:
                return await self._asked("reset", arguments)
            except Refused as refused:
                if refused.code != "CAPACITY_REACHED":
                    raise self._failure("reset", refused) from None
                if time.monotonic() > until:
                    raise Failed(
                        f"{self._url} had no session to spare for {FREE_SESSION_S:g} s ({refused}); set "
                        "rollout.agent.concurrent to the share of a worker"
                    ) from None
            await self.close()
            await asyncio.sleep(1.0)

    async def _connect(self) -> None:
        from websockets.asyncio.client import connect
        from websockets.exceptions import WebSocketException

        options: dict[str, Any] = {"proxy": None} if _is_local(self._url) else {}
        try:
            self._connection = await connect(
                self._url,
                additional_headers=self._headers,
                open_timeout=_CONNECT_S,
                close_timeout=_CLOSE_S,
                ping_timeout=None,  # A server may be slow: rollout.agent.step_s says how slow.
                max_size=_MOST_BYTES,
                **options,
            )
        except (OSError, WebSocketException) as error:
            raise Failed(f"cannot connect to {self._url} ({str(error) or type(error).__name__})") from None

    async def _answered(self, kind: str, data: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """Return the data of an answer. Raises Failed, also where the server refuses."""
        try:
            return await self._asked(kind, data)
        except Refused as refused:
            raise self._failure(kind, refused) from None

    async def _asked(self, kind: str, data: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """Return the data of an answer. Raises Refused where it is an error, and Failed where there is none."""
        from websockets.exceptions import ConnectionClosed

        assert self._connection is not None, "setup comes first"
        request = {"type": kind} if data is None else {"type": kind, "data": data}
        try:
            # A server that has no session to give says so and closes: what it said is still there to be read.
            with contextlib.suppress(ConnectionClosed):
                await self._connection.send(json.dumps(request))
            raw = await self._connection.recv()
        except ConnectionClosed as error:
            raise Failed(f"lost the connection to {self._url} in its {kind} ({error})") from None
        answer = _read(raw)
        if answer is None or answer["type"] not in ("error", "state" if kind == "state" else "observation"):
            raise Failed(f"{self._url} answered a {kind} with {raw!r:.200}, which OpenEnv's protocol does not have")
        found: Mapping[str, Any] = answer["data"]
        if answer["type"] == "error":
            raise Refused(found)
        if kind != "state" and not isinstance(found.get("observation"), Mapping):
            raise Failed(f"{self._url} answered a {kind} without an observation: {raw!r:.200}")
        return found

    def _failure(self, kind: str, refused: Refused) -> Failed:
        return Failed(f"{self._url} failed in its {kind}: {refused} ({refused.code})")


def _read(raw: str | bytes) -> dict[str, Any] | None:
    """Return an answer that has a type and data; None for what has not."""
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if isinstance(answer, dict) and isinstance(answer.get("type"), str) and isinstance(answer.get("data"), dict):
        return answer
    return None


def _tools(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tools of a server as schemas of functions."""
    found = answer["observation"].get("tools")
    found = [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []
    if not found:
        why = answer.get("metadata") or answer["observation"].get("metadata") or "none is listed"
        raise Failed(f"its server has no tools ({why}); leave rollout.agent.arguments.tools out")
    return [
        {
            "type": "function",
            "function": {
                "name": str(each.get("name")),
                "description": str(each.get("description") or ""),
                "parameters": each.get("input_schema") or each.get("inputSchema") or {"type": "object"},
            },
        }
        for each in found
    ]


def _first(task: Task, text: str) -> list[Message]:
    """Return the row's messages, the last of the user with an observation behind it."""
    messages = [dict(message) for message in task.messages or [{"role": "user", "content": task.text}]]
    if not text:
        return messages
    if messages[-1]["role"] == "user":
        messages[-1]["content"] = f"{messages[-1]['content']}\n\n{text}".strip()
        return messages
    return [*messages, {"role": "user", "content": text}]


def _numbers(found: Any) -> dict[str, float]:
    if not isinstance(found, Mapping):
        return {}
    return {str(name): value for name, each in found.items() if (value := number(each)) is not None}


def _token(variable: str) -> str:
    if not (found := os.environ.get(variable)):
        raise Failed(f"{variable} is not set, which rollout.agent.arguments.token_variable names")
    return found


def _websocket(url: str) -> str:
    """Return the address of the WebSocket of a server. Raises Failed."""
    parts = urlsplit(url)
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    if scheme not in ("ws", "wss") or not parts.hostname:
        raise Failed(f"has the url {url!r}; set rollout.agent.arguments.url to one such as ws://HOST:8000")
    path = parts.path.rstrip("/")
    return parts._replace(scheme=scheme, path=path if path.endswith("/ws") else f"{path}/ws").geturl()


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
