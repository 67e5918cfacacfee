"""Agents that settings of tests name."""

import asyncio


async def forks(prompt, policy, context):
    """Answer a prompt, and go on from there twice at one time: a rollout of two trajectories."""
    first = await policy.complete(prompt.token_ids, max_tokens=4)
    said = [*prompt.token_ids, *first.token_ids]
    second = await asyncio.gather(*(policy.complete([*said, *prompt.token_ids[:i]]) for i in (1, 2)))
    return {
        "reward": float(context.seed % 3),
        "tokens": sum(len(reply.token_ids) for reply in second),
        "metrics": {"context": max(reply.context_tokens for reply in second)},
        "turn_rewards": {reply.index: float((context.seed + reply.index) % 3) for reply in second},
    }
