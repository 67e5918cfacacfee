"""An agent that asks over HTTP with OpenAI's client, and does all that makes branches: it calls tools, edits what was
said, asks twice at one time, begins a second conversation, and repeats requests.
"""

import asyncio
import json

from openai import NOT_GIVEN, AsyncOpenAI

from tests.support.agent_sessions import user
from tests.support.served_agents import until
from tests.support.tool_model import TOOLS

MOST = 80  # tokens of a turn
TURNS = 10  # of a rollout, six of them in its first conversation
REPEATED = {"x-stainless-retry-count": "1"}  # as the client says that it repeats a request

RUNNING = {}
"""The agents of this process, by rollout."""


class Agent:
    """One rollout's agent. ``heard``: the turns by what it calls them, ``again``: those of repeated requests."""

    def __init__(self, client, policy):
        self.client, self.policy = client, policy
        self.heard, self.again = {}, []

    async def ask(self, label, messages, tools=TOOLS, repeat=None):
        """Ask, and return the conversation with the answer and what follows it: results of tools, or the user's words.

        ``repeat``: ask the same again, "under way" while the turn is sampled, or when it has "ended".
        """
        asked, before = asyncio.create_task(self._answer(messages, tools)), self.turns
        if repeat == "under way":
            await until(lambda: self.turns > before)
            self.again.append((label, await self._answer(messages, tools, REPEATED)))
        turn = self.heard[label] = await asked
        if repeat == "ended":
            self.again.append((label, await self._answer(messages, tools, REPEATED)))
        calls = turn["message"].get("tool_calls") or ()
        results = [{"role": "tool", "tool_call_id": call["id"], "content": looked_up(call)} for call in calls]
        return [*messages, turn["message"], *(results or [user(f"after {label}")])]

    async def talk(self, label, messages, turns):
        """Have some turns of a conversation; return it."""
        for at in range(turns):
            messages = await self.ask(f"{label} {at}", messages)
        return messages

    @property
    def all(self):
        """All that was heard: by the turn, and whether the request was a repetition."""
        return {(label, ""): turn for label, turn in self.heard.items()} | {
            (label, "again"): turn for label, turn in self.again
        }

    @property
    def turns(self):
        return self.policy._session.turns

    async def _answer(self, messages, tools, headers=None):
        answer = await self.client.chat.completions.create(
            model=self.policy.model,
            messages=messages,
            tools=tools or NOT_GIVEN,
            max_tokens=MOST,
            logprobs=True,
            extra_body={"return_token_ids": True},
            extra_headers=headers,
        )
        (choice,) = answer.choices
        return {
            "message": choice.message.model_dump(exclude_unset=True),
            "finish_reason": choice.finish_reason,
            "token_ids": choice.model_extra["token_ids"],
            "logprobs": [each.logprob for each in choice.logprobs.content],
        }


def looked_up(call):
    return str(json.loads(call["function"]["arguments"]).get("n", 0) ** 2)


async def works(prompt, policy, context):
    async with AsyncOpenAI(base_url=policy.base_url, api_key=policy.api_key, max_retries=0) as client:
        agent = RUNNING[context.rollout_id] = Agent(client, policy)
        first = await agent.ask("first", [user(context.rollout_id)])
        main = await agent.ask("second", first, repeat="under way")
        main = await agent.ask("third", main, repeat="ended")
        main, *_ = await asyncio.gather(
            agent.talk("main", main, 2),
            agent.talk("edited", [*first[:2], user("no, not so")], 2),
            agent.ask("alone", [user("another matter")], tools=None),
        )
        await asyncio.gather(*(agent.ask(label, [*main, user(label)]) for label in ("left", "right")))
    return float(context.seed % 3)
