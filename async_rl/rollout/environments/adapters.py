"""Environments as other libraries write them, by what methods they have. Imports the standard library alone.

    setup, step, or tools alone       this package's own: ``interface``
    rollout                           the same, for one that makes the whole rollout itself
    reset without step                TRL's environment_factory: tools, and get_reward or an attribute ``reward``
    reset, step, get_observation      textarena's games, of one player
    init, step                        skyrl-gym's BaseTextEnv
    reset, step                       gem's, and any other in the manner of gymnasium, with text for actions

Each becomes a ``Form``: the same few async methods, which call the user's through ``call``.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from async_rl.rollout.environments.interface import Context, Message, PolicyAddress, Step, Task, ToolError
from async_rl.rollout.environments.tools import tools_of
from async_rl.rollout.environments.values import as_text, number, plain

Call = Callable[..., Awaitable[Any]]
"""(function, *arguments, **named) -> what it returns, without blocking the event loop."""

# Of which an observation is text: far more than a context has room for.
_MOST_CHARACTERS = 2**20

STATE_METHODS = ("get_state", "set_state")
"""What an environment has whose state can be saved."""

_NO_TOOLS = ("setup", "step", "reward", "close", *STATE_METHODS, "cleanup", "tools")
_NO_TOOLS_OF_TRL = ("reset", "get_reward", "close")


class Form:
    """An environment of this package's own form."""

    no_tools: tuple[str, ...] = _NO_TOOLS
    tool_errors: tuple[type[Exception], ...] = (ToolError,)
    """What a tool raises for what the policy did wrong; all else ends the rollout as a failure."""

    def __init__(self, environment: Any, call: Call) -> None:
        self.environment = environment
        self.call = call

    @property
    def steps(self) -> bool:
        """Whether ``step`` answers the policy's turns; else its tools do."""
        return hasattr(self.environment, "step")

    @property
    def plays(self) -> bool:
        """Whether the environment makes the whole rollout, and asks the policy over HTTP."""
        return False

    async def play(self, policy: PolicyAddress) -> Any:
        """Make the whole rollout, where the form ``plays``."""
        raise NotImplementedError

    @property
    def methods(self) -> dict[str, Callable[..., Any]]:
        """What is called for each tool, by name; known once ``setup`` has returned."""
        if self.steps or self.plays:
            return {}
        if self.schemas is not None and callable(call_tool := getattr(self.environment, "call_tool", None)):
            return {
                name: self._calling(call_tool, name) for name in (tool["function"]["name"] for tool in self.schemas)
            }
        state = STATE_METHODS if self.has_state else ()
        return tools_of(self.environment, (*self.no_tools, *state))

    def _calling(self, call_tool: Callable[..., Any], name: str) -> Callable[..., Any]:
        async def called(**arguments: Any) -> Any:
            return await self.call(call_tool, name, arguments)

        return called

    @property
    def schemas(self) -> Sequence[dict[str, Any]] | None:
        """The tools as the class describes them itself; None to describe its methods."""
        found: Sequence[dict[str, Any]] | None = getattr(self.environment, "tools", None)
        return found or None

    async def setup(self, task: Task, context: Context) -> Any:
        """Prepare the rollout, and return its first messages, a text, or None for the row's."""
        setup = getattr(self.environment, "setup", None)
        return None if setup is None else await self.call(setup, task, context)

    async def step(self, message: Message) -> Any:
        """Return the ``Step`` after a message of the policy."""
        return await self.call(self.environment.step, message)

    async def reward(self, messages: Sequence[Message]) -> Any:
        """Return what the rollout is worth, or None for the sum of its steps; ``messages`` is all that was said."""
        reward = getattr(self.environment, "reward", None)
        return await self.call(reward, **_taken(reward, {"messages": messages})) if callable(reward) else None

    @property
    def has_state(self) -> bool:
        """Whether the environment can be saved and set to a state that was saved."""
        return all(callable(getattr(self.environment, name, None)) for name in STATE_METHODS)

    async def get_state(self) -> Any:
        """Return the environment's state, or None where it cannot be saved at present."""
        return await self.call(self.environment.get_state)

    async def set_state(self, state: Any) -> None:
        """Set an environment that was set up to a state that was saved."""
        await self.call(self.environment.set_state, state)

    async def close(self) -> None:
        """Free what the environment has."""
        close = getattr(self.environment, "close", None)
        if callable(close):
            await self.call(close)


class Player(Form):
    """An environment of this package's own form that makes the whole rollout itself."""

    @property
    def plays(self) -> bool:
        return True

    async def play(self, policy: PolicyAddress) -> Any:
        """Return the ``Step`` that says what the rollout was worth."""
        return await self.call(self.environment.rollout, policy)


class Trl(Form):
    """A class as TRL's ``environment_factory`` takes it."""

    no_tools = _NO_TOOLS_OF_TRL
    tool_errors = (Exception,)  # It shows the policy whatever a tool raises.

    @property
    def steps(self) -> bool:
        return False

    @property
    def schemas(self) -> None:
        return None

    async def setup(self, task: Task, context: Context) -> Any:
        del context
        reset = self.environment.reset
        row = {**task.fields, "prompt": task.messages if task.messages is not None else task.text}
        observed = await self.call(reset, **_taken(reset, row))
        if observed is None:
            return None
        messages = [dict(message) for message in task.messages or [{"role": "user", "content": task.text}]]
        for message in reversed(messages):
            if message["role"] == "user":
                message["content"] = f"{message['content']}{as_text(observed, _MOST_CHARACTERS)}"
                return messages
        return [*messages, {"role": "user", "content": as_text(observed, _MOST_CHARACTERS)}]

    async def reward(self, messages: Sequence[Message]) -> Any:
        del messages
        reward = getattr(self.environment, "get_reward", None)
        return getattr(self.environment, "reward", None) if reward is None else await self.call(reward)


class Gym(Form):
    """An environment with ``reset() -> (observation, info)`` and a ``step`` that takes text.

    ``step`` returns (observation, reward, terminated, truncated, info), or four values without ``truncated``.
    """

    @property
    def schemas(self) -> None:
        return None

    async def setup(self, task: Task, context: Context) -> Any:
        del context
        reset = self.environment.reset
        found = await self.call(reset, **_taken(reset, {"seed": _seed(task)}))
        observed = found[0] if isinstance(found, tuple) and len(found) == 2 else found
        return _first(task, as_text(observed, _MOST_CHARACTERS))

    async def step(self, message: Message) -> Step:
        found = await self.call(self.environment.step, _said(message))
        if not isinstance(found, tuple) or len(found) not in (4, 5):
            raise TypeError(
                f"its step returned {found!r:.200}; expected (observation, reward, terminated, truncated, info)"
            )
        observed, reward, terminated, *rest = found
        truncated = bool(rest[0]) if len(rest) == 2 else False
        text = as_text(observed, _MOST_CHARACTERS)
        return Step(text, _real(reward), bool(terminated) or truncated, truncated, _metrics(rest[-1]))

    async def reward(self, messages: Sequence[Message]) -> None:
        del messages


class SkyRL(Form):
    """skyrl-gym's ``BaseTextEnv``: ``init(messages) -> (messages, info)``, ``step(text) -> dict``."""

    @property
    def schemas(self) -> None:
        return None

    async def setup(self, task: Task, context: Context) -> Any:
        del context
        asked = task.messages or [{"role": "user", "content": task.text}]
        found = await self.call(self.environment.init, [dict(message) for message in asked])
        return found[0] if isinstance(found, tuple) else found

    async def step(self, message: Message) -> Step:
        found = await self.call(self.environment.step, _said(message))
        if not isinstance(found, Mapping):
            raise TypeError(f"its step returned {found!r:.200}; expected a dict with observations, reward and done")
        metrics = _metrics(found.get("metadata"))
        return Step(
            found.get("observations") or (), _real(found.get("reward")), bool(found.get("done")), metrics=metrics
        )

    async def reward(self, messages: Sequence[Message]) -> None:
        del messages


class TextArena(Form):
    """A game of textarena for one player: the reward is known when it is closed."""

    def __init__(self, environment: Any, call: Call) -> None:
        super().__init__(environment, call)
        self._rewards: Any = None
        self._closed = False

    @property
    def schemas(self) -> None:
        return None

    async def setup(self, task: Task, context: Context) -> Any:
        del context
        await self.call(self.environment.reset, num_players=1, seed=_seed(task))
        return _first(task, await self._observed())

    async def step(self, message: Message) -> Step:
        done, _ = await self.call(self.environment.step, action=_said(message))
        return Step(() if done else await self._observed(), done=bool(done))

    async def reward(self, messages: Sequence[Message]) -> Any:
        del messages
        await self.close()
        return self._rewards.get(0, 0.0) if isinstance(self._rewards, Mapping) else 0.0

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        found = await self.call(self.environment.close)
        self._rewards = found[0] if isinstance(found, tuple) else found

    async def _observed(self) -> str:
        _, observed = await self.call(self.environment.get_observation)
        if isinstance(observed, str):
            return observed
        return "\n".join(str(entry[1]) for entry in observed)  # (from, text, kind) of each


def form_of(environment: Any, call: Call) -> Form:
    """Return an environment in the form that its methods show it to have. Raises TypeError if there is none."""

    def has(name: str) -> bool:
        return callable(getattr(environment, name, None))

    if has("rollout"):
        return Player(environment, call)
    if has("setup"):
        return Form(environment, call)
    if has("reset"):
        if not has("step"):
            return Trl(environment, call)
        return TextArena(environment, call) if has("get_observation") else Gym(environment, call)
    if has("init") and has("step"):
        return SkyRL(environment, call)
    form = Form(environment, call)
    if not (form.steps or form.methods):
        raise TypeError(
            f"{type(environment).__name__} has neither step nor reset, nor a public method with a docstring to be a "
            "tool"
        )
    return form


def _taken(function: Callable[..., Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the arguments that a function takes by name."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return {}
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return dict(named)
    return {name: value for name, value in named.items() if name in parameters}


def _first(task: Task, text: str) -> list[Message]:
    """Return what a game says first, after the system message of the row if it has one."""
    system = [m for m in task.messages or () if m["role"] in ("system", "developer")]
    return [*system, {"role": "user", "content": text}]


def _seed(task: Task) -> int:
    """Return the row's own seed, or that of the prompt: a group plays one game."""
    own = task.fields.get("seed")
    return own if isinstance(own, int) else task.seed


def _said(message: Message) -> str:
    return str(message.get("content") or "")


def _real(reward: Any) -> float | None:
    return None if reward is None else float(plain(reward))


def _metrics(info: Any) -> dict[str, float]:
    """Return the numbers of an info by name."""
    if not isinstance(info, Mapping):
        return {}
    return {str(name): found for name, value in info.items() if (found := number(value)) is not None}
