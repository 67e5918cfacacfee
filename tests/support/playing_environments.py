"""Environments that make whole rollouts themselves, and have rows; they import nothing heavy, as hosts import them."""

import asyncio
from typing import ClassVar

from async_rl.rollout.environments.interface import Step


class Asks:
    """Asks the policy twice over HTTP, and prepares itself once in a process."""

    prepared: ClassVar = []

    def __init__(self, word="b", how="well"):
        self.word, self.how = word, how

    @classmethod
    async def prepare(cls, word="b", how="well"):
        if how == "not prepared":
            raise ValueError(f"no word {word}")
        cls.prepared.append(word)

    @classmethod
    def rows(cls, split, word="b", how="well"):
        if how == "no rows":
            return []
        if how == "bad rows":
            raise KeyError("no such split")
        return [{"prompt": f"{word}{number}", "info": {"split": split}} for number in range(3)]

    async def setup(self, task, context):
        self.first = task.text

    async def rollout(self, policy):
        if self.how == "hangs":
            await asyncio.sleep(3600)
        if self.how == "raises":
            raise ValueError("no such board")
        if self.how == "text":
            return "well"
        from openai import AsyncOpenAI

        history = [{"role": "user", "content": self.first}]
        async with AsyncOpenAI(base_url=policy.base_url, api_key=policy.api_key, max_retries=0) as client:
            for said in (self.word, "c"):
                answer = await client.chat.completions.create(model=policy.model, messages=history)
                history += [
                    {"role": "assistant", "content": answer.choices[0].message.content},
                    {"role": "user", "content": said},
                ]
        return Step(reward=0.5, truncated=self.how == "cut", metrics={"turns": 2, "prepared": len(self.prepared)})


class Tool:
    def prepare(self) -> str:
        """Prepare, as a tool of the policy."""
        return "done"

    def rows(self) -> str:
        """Name the rows."""
        return "one"
