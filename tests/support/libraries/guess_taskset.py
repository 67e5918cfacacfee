"""An environment of verifiers 0.4: the taskset "guess-taskset", as far as the library sees.

What a task does is in its ``turns``, or in ``how``: "hangs" after the first turn. Its tool counts the calls in the
state, which a reward reads. Each rollout that is scored leaves a line in ``$ENVIRONMENTS_LOG``, and the environment one
when it comes up.
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
    level: int = 0
    turns: int = 3
    how: str | None = None
    board: dict[str, int | None] = Field(default_factory=dict)


class GuessState(vf.State):
    looked: int = 0


class Look(vf.Toolset[vf.ToolsetConfig, GuessState]):
    TOOL_PREFIX = None

    @vf.tool
    async def look(self) -> str:
        """Look at the board."""
        self.state.looked += 1
        return f"seen {self.state.looked}"


class GuessTaskConfig(vf.TaskConfig):
    tools: bool = False


class GuessTask(vf.Task[GuessData, GuessState, GuessTaskConfig]):
    @classmethod
    def toolsets(cls, config):
        return [Look(vf.ToolsetConfig())] if config.tools else []

    async def setup(self, trace, runtime):
        if self.data.how == "slow setup":
            await asyncio.sleep(3600)

    async def finalize(self, trace, runtime):
        note("cleanup")

    @vf.stop
    async def enough(self, trace: vf.Trace) -> bool:
        return self.data.how == "stops" and trace.num_turns >= 2

    @vf.metric
    async def turns(self, trace) -> float:
        return trace.num_turns

    @vf.reward
    async def length(self, trace) -> float:
        if self.data.how == "bad reward":
            raise KeyError("board")
        if self.data.how == "slow reward":
            await asyncio.sleep(3600)
        return float(len(trace.messages))

    @vf.reward(weight=0.25)
    async def known(self, task, trace) -> float:
        return float(task.answer == "42" and task.level == 2 and task.board == {"a": 1, "b": None})


class GuessConfig(vf.TasksetConfig):
    task: GuessTaskConfig = GuessTaskConfig()
    endless: bool = False


class Guesses(vf.Taskset[GuessTask, GuessConfig]):
    def __init__(self, config):
        super().__init__(config)
        self.INFINITE = config.endless

    def load(self):
        for n in range(3):
            board = {"a": 1, "b": None} if n == 2 else {}
            data = GuessData(prompt=f"q{n}", system_prompt="Guess.", level=n, board=board)
            yield GuessTask(data, self.config.task)


class GuessEnvConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig()


class GuessEnv(vf.Env[GuessEnvConfig]):
    """Says no to each guess."""

    async def start(self):
        note("up")

    async def run(self, task, agents):
        async with agents.agent.interaction(task) as talk:
            segment = await talk.turn()
            for said in range(1, task.data.turns):
                if segment.terminated:
                    break
                await self.wait(task.data.how)
                segment = await talk.turn(f"no {said}")

    async def wait(self, how):
        if how == "bug":
            raise KeyError("board")
        if how == "hangs":
            note("hangs")
            await asyncio.sleep(3600)


__all__ = ["GuessEnv", "Guesses"]

if __name__ == "__main__":
    Look.run()
