"""A server of OpenEnv, as its package makes one: a game of words at one port, tools at another. Prints both as JSON."""

import asyncio
import json
import socket
import time

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server import (
    Action,
    CallToolAction,
    CallToolObservation,
    Environment,
    MCPEnvironment,
    Observation,
    State,
    create_fastapi_app,
)

SESSIONS = 3


class Guess(Action):
    word: str


class Seen(Observation):
    text: str = ""


class Words(Environment):
    """Is done after three words."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self._state = State()

    def reset(self, seed=None, episode_id=None, level=0, **kwargs):
        self._state = State(episode_id=episode_id, step_count=0)
        return Seen(text=f"seed {seed}, level {level}, {episode_id}")

    def step(self, action, timeout_s=None, **kwargs):
        self._state.step_count += 1
        if action.word == "slow":
            time.sleep(4)
        if action.word == "bug":
            raise IndexError("no such letter")
        done = self._state.step_count == 3
        return Seen(text=f"saw {action.word}", reward=0.5, done=done, metadata={"letters": len(action.word)})

    @property
    def state(self):
        return self._state


class Sums(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        mcp = FastMCP("sums")
        self._state = State()

        @mcp.tool
        def add(a: int, b: int) -> int:
            """Add two numbers."""
            return a + b

        @mcp.tool
        def fail() -> str:
            """Fail."""
            raise ValueError("out of order")

        super().__init__(mcp)

    def reset(self, seed=None, episode_id=None, **kwargs):
        self._state = State(episode_id=episode_id, step_count=0)
        return Observation(metadata={"ready": True})

    def _step_impl(self, action, timeout_s=None, **kwargs):
        return Observation()

    async def step_async(self, action, timeout_s=None, **kwargs):
        observation = await super().step_async(action, timeout_s=timeout_s, **kwargs)
        if isinstance(action, CallToolAction):
            observation.reward = 0.5
        return observation

    @property
    def state(self):
        return self._state


async def main():
    apps = {
        "words": create_fastapi_app(Words, Guess, Seen, max_concurrent_envs=SESSIONS),
        "sums": create_fastapi_app(Sums, CallToolAction, CallToolObservation, max_concurrent_envs=SESSIONS),
    }
    ports, serving = {}, []
    for name, app in apps.items():
        listening = socket.create_server(("127.0.0.1", 0))
        ports[name] = listening.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        serving.append(server.serve(sockets=[listening]))
    print(json.dumps(ports), flush=True)  # noqa: T201
    await asyncio.gather(*serving)


asyncio.run(main())
