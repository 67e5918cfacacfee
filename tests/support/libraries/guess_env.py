"""An environment of the library verifiers: the package "guess-env", as far as the library sees.

What a row does is in its info: {"turns": 3}, or {"how": "hangs"} after the first turn. Each rollout leaves a line at
its clean-up in ``$ENVIRONMENTS_LOG``.
"""

import asyncio
import os

import verifiers as vf
from datasets import Dataset

ROWS = [{"question": f"q{n}", "answer": "42", "info": {"level": n, "turns": 3}} for n in range(3)]


def note(what):
    with open(os.environ["ENVIRONMENTS_LOG"], "a") as file:
        file.write(f"{what}\n")


class Guess(vf.MultiTurnEnv):
    """Says no to each guess."""

    async def setup_state(self, state):
        state["said"] = 0
        return state

    @vf.stop
    async def enough(self, state):
        return len(state["trajectory"]) >= (state.get("info") or {}).get("turns", 3)

    async def env_response(self, messages, state, **kwargs):
        state["said"] += 1
        how = (state.get("info") or {}).get("how")
        if how == "sandbox":
            raise vf.SandboxError("the sandbox is gone")
        if how == "bug":
            raise KeyError("board")
        if how == "tool":
            raise vf.ToolCallError("no such tool")
        if how == "hangs":
            note("hangs")
            await asyncio.sleep(3600)
        return [{"role": "user", "content": f"no {state['said']}"}]

    @vf.cleanup
    async def leave(self, state):
        note("cleanup")


def length(completion):
    return float(len(completion))


async def known(answer, info, state):
    return float(answer == "42" and info["level"] == 2 and "said" in state)


def best(completions):
    return [1.0 for _ in completions]


def load_environment(rewards="single", **settings):
    rubric = vf.Rubric(funcs=[best]) if rewards == "group" else vf.Rubric(funcs=[length, known], weights=[1, 0.25])
    return Guess(dataset=Dataset.from_list(ROWS), rubric=rubric, system_prompt="Guess.", **settings)


def no_environment():
    return 5
