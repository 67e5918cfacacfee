"""An agent with one tool, and the reward of what it ends with."""

from __future__ import annotations

from typing import Any

from async_rl.errors import RequestRefused
from async_rl.rollout.outcome import Context
from async_rl.rollout.policy import Policy
from async_rl.types import Prompt

CALL = ","
"""Ends a turn that calls the tool; the letter before it says how far the tool sorts."""
COST = 0.05


def tool(problem: str, last: str) -> str:
    """Return a problem with its letters up to ``last`` in order at its front, and the others behind as they were."""
    letters = problem.removesuffix(">")
    return "".join([*sorted(c for c in letters if c <= last), *(c for c in letters if c > last), ">"])


async def solve(prompt: Prompt, policy: Policy, context: Context) -> dict[str, Any]:
    """Let the policy answer at once, or after calls of the tool, each of which has its price."""
    del context  # it has the rollout's id, and a seed of its own
    calls = 0
    reply = await policy.complete(prompt.token_ids)
    try:
        while reply.text.endswith(CALL):
            calls += 1
            reply = await policy.extend(tool(prompt.text, reply.text[-2:-1]))
    except RequestRefused:  # no turn or no room is left: the call is what it ends with
        pass
    answer, said = prompt.fields["answer"], reply.text.strip()
    right = sum(a == b for a, b in zip(answer, said, strict=False)) / max(len(answer), len(said))
    return {"reward": right - COST * calls, "metrics": {"calls": calls}}
