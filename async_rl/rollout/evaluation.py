"""Evaluation on one replica: answers problems as their sets say, and scores the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from async_rl.config.inputs import Terms
from async_rl.errors import EngineError, RewardError
from async_rl.metrics.evaluation import Answered
from async_rl.rollout.engine.interface import RolloutEngine, Sampling
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.responses import COST_THEIR_GROUP, Call, Responses
from async_rl.rollout.stops import Stops
from async_rl.types import Int32Array, Prompt

log = structlog.get_logger(__name__)

GREEDY = Sampling(temperature=1.0, top_p=1.0, greedy=True)


class _Aborted(EngineError):
    """A pause has ended a call of an evaluation."""


@dataclass(frozen=True, slots=True)
class EvalProblem:
    """A problem of a set, and how it is answered."""

    terms: Terms
    """Those of its set."""
    prompt: Prompt
    k: int = 1
    """Number of responses."""
    sampling: Sampling = GREEDY
    source: str | None = None
    """Where the problem is from; None if its row does not say."""
    shown: bool = False
    """Whether the first response is returned, to be read by the user."""

    @property
    def set(self) -> str:
        """The name of its set."""
        return self.terms.name


@dataclass(frozen=True, slots=True)
class ScoredResponse:
    """What an evaluation keeps of a response."""

    response_ids: Int32Array
    reward: float
    finish_reason: str


@dataclass(frozen=True, slots=True)
class EvalAnswer:
    """What became of a problem."""

    set: str
    prompt_id: str
    scored: Answered | None
    """None if a response, its reward or the environment failed."""
    shown: ScoredResponse | None = None
    """The first response, if the user is to read it."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The answers of one replica at one policy version."""

    version: int
    answers: tuple[EvalAnswer, ...]


async def evaluate(
    problems: Sequence[EvalProblem], engine: RolloutEngine, responses: Responses, *, at_once: int
) -> EvalResult:
    """Answer and score ``problems``, with ``at_once`` responses under way; a problem on which something fails has none.

    Raises RewardError when all problems failed, what reward or environment raised with on_error "fail", and EngineError
    when the engine died, a pause ended a call, or the weights changed meanwhile.
    """
    version, places = engine.version, asyncio.Semaphore(at_once)

    async def one(problem: EvalProblem) -> EvalAnswer:
        return await _answer(problem, engine, responses, places)

    answers = await asyncio.gather(*map(one, problems))
    if engine.version != version:
        raise EngineError(f"the weights went from version {version} to {engine.version} during an evaluation")
    if all(answer.scored is None for answer in answers):
        raise RewardError(
            f"each of {len(problems)} evaluation problems failed; the worker's log has the reason of each"
        )
    return EvalResult(version, tuple(answers))


async def _answer(
    problem: EvalProblem, engine: RolloutEngine, responses: Responses, places: asyncio.Semaphore
) -> EvalAnswer:
    """Return the answer to a problem, whose responses are all or none."""
    prompt = problem.prompt
    call = _call(engine, problem.sampling, responses, responses.stops(problem.terms))

    async def respond(number: int) -> ScoredResponse:
        async with places:
            start = responses.begin(f"eval/{prompt.prompt_id}/{number}", prompt, problem.terms)
            response = await responses.complete(start, prompt, call, terms=problem.terms)
        score = await responses.eval_score(prompt, response, problem.terms)
        assert response.finish_reason is not None
        # Without what else the response has: its routed experts are a hundred times as large.
        return ScoredResponse(response.response_ids, score.reward, response.finish_reason)

    tasks = [asyncio.ensure_future(respond(number)) for number in range(problem.k)]
    try:
        found = await asyncio.gather(*tasks)
    except COST_THEIR_GROUP as error:
        if isinstance(error, _Aborted) or responses.is_fatal(error):
            raise
        log.warning("eval_problem_failed", set=problem.set, prompt=prompt.prompt_id, reason=str(error))
        return EvalAnswer(problem.set, prompt.prompt_id, None)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    scored = Answered(
        rewards=tuple(each.reward for each in found),
        tokens=tuple(len(each.response_ids) for each in found),
        truncated=sum(each.finish_reason == "length" for each in found),
        source=problem.source,
    )
    return EvalAnswer(problem.set, prompt.prompt_id, scored, found[0] if problem.shown else None)


def _call(engine: RolloutEngine, sampling: Sampling, responses: Responses, stops: Stops) -> Call:
    async def call(partial: PartialRollout, request_id: str) -> PartialRollout:
        """Make one engine call. Weight syncs wait for an evaluation, so none interrupts it."""
        token_ids, max_tokens, first_row = partial.next_request()
        output = await engine.generate(request_id, token_ids, stops.sampling(sampling, partial), max_tokens, first_row)
        if output.finish_reason == "abort":
            raise _Aborted(f"{request_id}: an evaluation was aborted")
        return responses.absorb(partial, output, stops)

    return call
