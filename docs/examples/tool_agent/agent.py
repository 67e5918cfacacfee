"""An agent with one tool, a calculator for letters, and the reward of what it ends with."""

from __future__ import annotations

from string import ascii_lowercase
from typing import Any

from async_rl.errors import RequestRefused
from async_rl.rollout.outcome import Context
from async_rl.rollout.policy import Policy
from async_rl.types import Prompt

CALL = ","
"""Ends a turn that calls the tool; what is before it are the letters to add."""


def add(letters: str) -> str:
    """Return the sum modulo 26 of letters, where a is 0 and z is 25. What is no letter counts as a."""
    return ascii_lowercase[sum(max(ascii_lowercase.find(c), 0) for c in letters) % 26]


async def solve(prompt: Prompt, policy: Policy, context: Context) -> dict[str, Any]:
    """Let the policy answer at once, or after calls of the tool, and say whether the answer is right."""
    del context  # it has the rollout's id, and a seed of its own
    calls = 0
    reply = await policy.complete(prompt.token_ids)
    try:
        while reply.text.endswith(CALL):
            calls += 1
            reply = await policy.extend(add(reply.text.removesuffix(CALL)) + ">")
    except RequestRefused:  # no turn or no room is left: the call is what it ends with
        pass
    return {"reward": float(reply.text == prompt.fields["answer"]), "metrics": {"calls": calls}}
