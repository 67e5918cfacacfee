"""Greedy evaluation: the likeliest response to each problem, and the mean of their rewards."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import structlog

from async_rl.errors import EngineError, RewardError
from async_rl.rollout.engine.interface import RolloutEngine, Sampling
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.responses import COST_THEIR_GROUP, Call, Responses
from async_rl.types import Prompt

log = structlog.get_logger(__name__)

GREEDY = Sampling(temperature=1.0, top_p=1.0, greedy=True)


class _Aborted(EngineError):
    """A pause has ended a call of an evaluation."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The result of one replica at one policy version: means over ``n`` problems, lengths in tokens."""

    version: int
    reward_mean: float
    n: int
    response_tokens_mean: float


async def evaluate(prompts: Sequence[Prompt], engine: RolloutEngine, responses: Responses) -> EvalResult:
    """Answer ``prompts`` greedily and score the answers; problems on which something fails are left out.

    Raises RewardError when all problems failed, what reward or environment raised with on_error "fail", and EngineError
    when the engine died, a pause ended a call, or the weights changed meanwhile.
    """
    version = engine.version

    async def likeliest(partial: PartialRollout, request_id: str) -> PartialRollout:
        """Make one engine call. Weight syncs wait for an evaluation, so none interrupts it."""
        token_ids, max_tokens, first_row = partial.next_request()
        sampling = responses.sampling(GREEDY, partial)
        output = await engine.generate(request_id, token_ids, sampling, max_tokens, first_row)
        if output.finish_reason == "abort":
            raise _Aborted(f"{request_id}: an evaluation was aborted")
        return responses.absorb(partial, output)

    results = await asyncio.gather(*(_one(prompt, responses, likeliest) for prompt in prompts))
    if engine.version != version:
        raise EngineError(f"the weights went from version {version} to {engine.version} during an evaluation")
    scored = [result for result in results if result is not None]
    if not scored:
        raise RewardError(f"each of {len(prompts)} evaluation problems failed; the worker's log has the reason of each")
    rewards, lengths = zip(*scored, strict=True)
    return EvalResult(version, float(np.mean(rewards)), len(scored), float(np.mean(lengths)))


async def _one(prompt: Prompt, responses: Responses, likeliest: Call) -> tuple[float, int] | None:
    """Return reward and response tokens; None if the problem alone failed."""
    try:
        start = responses.begin(f"eval/{prompt.prompt_id}", prompt)
        response = await responses.complete(start, prompt, likeliest)
        return (await responses.eval_score(prompt, response)).reward, len(response.response_ids)
    except COST_THEIR_GROUP as error:
        if isinstance(error, _Aborted) or responses.is_fatal(error):
            raise
        log.warning("eval_problem_failed", prompt=prompt.prompt_id, reason=str(error))
        return None
