"""An environment of verifiers 0.4, the twin of ``guess_env``: the taskset "guess-taskset", as far as the library sees.

What a task does is in its ``turns``, or in ``how``: "hangs" after the first turn. Each rollout leaves a line at its end
in ``$ENVIRONMENTS_LOG``, and the environment one when it comes up.
"""

import asyncio
import os

import verifiers.v1 as vf
from pydantic import Field


def note(what):
    with open(os.environ["ENVIRONMENTS_LOG"], "a") as file:
        file.write(f"{what}\n")


class GuessData(vf.TaskData):
    answer: str = "42"
    level: int = 2
    turns: int = 3
    how: str | None = None
    board: dict[str, int | None] = Field(default_factory=lambda: {"a": 1, "b": None})


class GuessState(vf.State):
    looked: int = 0


class Look(vf.Toolset[vf.ToolsetConfig, GuessState]):
    TOOL_PREFIX = None

    @vf.tool
    async def look(self, n: int = 0) -> str:
        """Look at the board."""
        self.state.looked += 1
        return f"seen {n}"


class GuessTaskConfig(vf.TaskConfig):
    tools: bool = False
    tools_at: vf.RuntimeConfig = vf.SubprocessConfig()


class GuessTask(vf.Task[GuessData, GuessState, GuessTaskConfig]):
    @classmethod
    def toolsets(cls, config):
        return [Look(vf.ToolsetConfig(runtime=config.tools_at))] if config.tools else []

    async def setup(self, trace, runtime):
        if self.data.how == "slow setup":
            await asyncio.sleep(3600)

    @vf.stop
    async def enough(self, trace: vf.Trace) -> bool:
        return self.data.how == "stops" and trace.num_turns >= 2

    @vf.metric
    async def num_turns(self, trace) -> float:
        return trace.num_turns

    @vf.metric
    async def looked(self, trace) -> float:
        return trace.state.looked

    @vf.reward
    async def length(self, trace) -> float:
        if self.data.how == "bad reward":
            raise KeyError("board")
        if self.data.how == "slow reward":
            await asyncio.sleep(3600)
        return float(len(trace.messages) - 2)

    @vf.reward(weight=0.25)
    async def known(self, task) -> float:
        return float(task.answer == "42" and task.level == 2 and task.board == {"a": 1, "b": None})


class GuessConfig(vf.TasksetConfig):
    task: GuessTaskConfig = GuessTaskConfig()
    shared_tools: bool = False
    endless: bool = False


class Guesses(vf.Taskset[GuessTask, GuessConfig]):
    def __init__(self, config):
        super().__init__(config)
        self.INFINITE = config.endless

    def load(self):
        for n in range(3):
            yield GuessTask(GuessData(prompt=f"q{n}", system_prompt="Guess.", level=n), self.config.task)

    @classmethod
    def toolsets(cls, config):
        return [Look(vf.ToolsetConfig())] if config.shared_tools else []


class GuessEnvConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig()


class GuessEnv(vf.Env[GuessEnvConfig]):
    """Says no to each guess."""

    async def start(self):
        note("up")

    async def run(self, task, agents):
        try:
            async with agents.agent.interaction(task) as talk:
                segment = await talk.turn()
                for said in range(1, task.data.turns):
                    if segment.terminated:
                        break
                    await self.wait(task.data.how)
                    segment = await talk.turn(f"no {said}")
        finally:
            note("cleanup")

    async def wait(self, how):
        if how == "sandbox":
            raise vf.SandboxError("the sandbox is gone")
        if how == "bug":
            raise KeyError("board")
        if how == "hangs":
            note("hangs")
            await asyncio.sleep(3600)


def load_environment(**settings):
    agent = {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}, **settings}
    return vf.load_environment(vf.resolve_env_config({"taskset": {"id": "guess-taskset"}, "agent": agent}))


def no_environment():
    return 5


__all__ = ["GuessEnv", "Guesses"]

if __name__ == "__main__":
    Look.run()
