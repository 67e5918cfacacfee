"""Evaluation on one replica: answers problems as their sets say, and scores the answers.

An answer is a response, or a rollout of its set's agent where there is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import structlog

from async_rl.config.inputs import Terms
from async_rl.errors import EngineError, RewardError
from async_rl.metrics.evaluation import Answered
from async_rl.rollout.engine.interface import RolloutEngine, Sampling
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.policy import Call
from async_rl.rollout.responses import COST_THEIR_GROUP, Responses
from async_rl.types import Int32Array, Prompt, RolloutRecord

if TYPE_CHECKING:  # the driver makes problems, and no rollouts
    from async_rl.rollout.agents import Agents

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
    """int32[G]; of an agent's rollout, those of its first trajectory."""
    reward: float
    finish_reason: str
    """As of a response; that of an agent's rollout is "length" if it was truncated."""
    branches: tuple[Int32Array, ...] = ()
    """The response tokens of the rollout's further trajectories."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the agent returned beside the reward."""

    @classmethod
    def of(cls, rollout: RolloutRecord) -> ScoredResponse:
        """Return what is kept of an agent's rollout."""
        first, *others = [t.response_ids for t in rollout.trajectories] or [np.empty(0, np.int32)]
        reason = "length" if rollout.end == "truncated" else "stop"
        return cls(first, rollout.reward, reason, tuple(others), dict(rollout.metrics))

    @property
    def tokens(self) -> int:
        """Its length: response tokens of all trajectories."""
        return len(self.response_ids) + sum(map(len, self.branches))


@dataclass(frozen=True, slots=True)
class EvalAnswer:
    """What became of a problem."""

    set: str
    prompt_id: str
    scored: Answered | None
    """None if a response, its reward, the environment or the agent failed."""
    shown: ScoredResponse | None = None
    """The first response, if the user is to read it."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The answers of one replica at one policy version."""

    version: int
    answers: tuple[EvalAnswer, ...]


async def evaluate(
    problems: Sequence[EvalProblem], engine: RolloutEngine, responses: Responses, agents: Agents, *, at_once: int
) -> EvalResult:
    """Answer and score ``problems``, with ``at_once`` responses under way; a problem on which something fails has none.

    Raises RewardError when all problems failed, what reward, environment or agent raised with on_error "fail", and
    EngineError when the engine died, a pause ended a call, or the weights changed meanwhile.
    """
    version, places = engine.version, asyncio.Semaphore(at_once)

    async def one(problem: EvalProblem) -> EvalAnswer:
        return await _answer(problem, engine, responses, agents, places)

    answers = await asyncio.gather(*map(one, problems))
    if engine.version != version:
        raise EngineError(f"the weights went from version {version} to {engine.version} during an evaluation")
    if all(answer.scored is None for answer in answers):
        raise RewardError(
            f"each of {len(problems)} evaluation problems failed; the worker's log has the reason of each"
        )
    return EvalResult(version, tuple(answers))


async def _answer(
    problem: EvalProblem,
    engine: RolloutEngine,
    responses: Responses,
    agents: Agents,
    places: asyncio.Semaphore,
) -> EvalAnswer:
    """Return the answer to a problem, whose responses are all or none."""
    prompt, agent = problem.prompt, agents.of(problem.terms)
    call = _call(engine, problem.sampling, responses, problem.terms)

    async def respond(number: int) -> ScoredResponse:
        name = f"eval/{prompt.prompt_id}/{number}"
        async with places:
            if agent is not None:
                return ScoredResponse.of(await agent.rollout(prompt, name, call=call, terms=problem.terms))
            start = responses.begin(name, prompt, problem.terms)
            response = await responses.complete(
                start, prompt, lambda partial, request: call(partial, request, ()), terms=problem.terms
            )
        score = await responses.eval_score(prompt, response, problem.terms)
        assert response.finish_reason is not None
        # Without what else the response has: its routed experts are a hundred times as large.
        return ScoredResponse(response.response_ids, score.reward, response.finish_reason)

    tasks = [asyncio.ensure_future(respond(number)) for number in range(problem.k)]
    try:
        found = await asyncio.gather(*tasks)
    except COST_THEIR_GROUP as error:
        if isinstance(error, _Aborted) or responses.is_fatal(error, problem.terms):
            raise
        log.warning("eval_problem_failed", set=problem.set, prompt=prompt.prompt_id, reason=str(error))
        return EvalAnswer(problem.set, prompt.prompt_id, None)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    scored = Answered(
        rewards=tuple(each.reward for each in found),
        tokens=tuple(each.tokens for each in found),
        truncated=sum(each.finish_reason == "length" for each in found),
        source=problem.source,
        metrics=tuple(each.metrics for each in found) if any(each.metrics for each in found) else (),
    )
    return EvalAnswer(problem.set, prompt.prompt_id, scored, found[0] if problem.shown else None)


def _call(engine: RolloutEngine, sampling: Sampling, responses: Responses, terms: Terms) -> Call:
    async def call(partial: PartialRollout, request_id: str, stop: Sequence[str]) -> PartialRollout:
        """Make one engine call. Weight syncs wait for an evaluation, so none interrupts it."""
        stops = responses.stops(terms, stop)
        token_ids, max_tokens, first_row = partial.next_request()
        output = await engine.generate(request_id, token_ids, stops.sampling(sampling, partial), max_tokens, first_row)
        if output.finish_reason == "abort":
            raise _Aborted(f"{request_id}: an evaluation was aborted")
        return responses.absorb(partial, output, stops, sampling)

    return call
