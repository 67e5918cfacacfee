"""A response from its beginning to its reward: as many engine calls as its interruptions and turns take.

The caller supplies the engine call: ``worker`` one that samples, ``evaluation`` one that is greedy.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import structlog

from async_rl.config.functions import load_function
from async_rl.config.inputs import Terms
from async_rl.config.rollouts import FilterSection
from async_rl.config.schema import RunConfig
from async_rl.errors import (
    AgentFailure,
    ConfigError,
    EngineDied,
    EngineError,
    EnvironmentFailure,
    InvalidTrajectory,
    RewardError,
    RewardNotApplicable,
)
from async_rl.rollout.engine.interface import EngineOutput, RolloutEngine, Sampling
from async_rl.rollout.environments.turns import Environment
from async_rl.rollout.filters import FinishedGroup, GroupFilter
from async_rl.rollout.in_flight import InFlight
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.rewards.runner import RewardRunner
from async_rl.rollout.rewards.score import Score
from async_rl.rollout.rewards.scoring import Scoring
from async_rl.rollout.stop_strings import decoder
from async_rl.rollout.stops import Stops
from async_rl.types import Int32Array, Prompt, RolloutRecord, source_of

# Sources have a few, but each row may have its own.
_KNOWN_STOPS = 256

log = structlog.get_logger(__name__)

# (partial rollout, request id) -> the partial rollout after one more engine call.
_T = TypeVar("_T")
Make = Callable[[InFlight, int], Awaitable[_T]]
"""Makes something of a group's response, by its index."""

Call = Callable[[PartialRollout, str], Awaitable[PartialRollout]]
Keep = Callable[[PartialRollout], None]

# What costs a response its group, or the group that response; all else ends the worker. EngineDied is an EngineError,
# but fatal: see ``Responses.is_fatal``.
COST_THEIR_GROUP = (RewardError, EnvironmentFailure, AgentFailure, EngineError, InvalidTrajectory)


def failure_reason(error: Exception) -> str:
    """Return the reason under which a failed group is counted."""
    if isinstance(error, RewardError):
        return "reward"
    if isinstance(error, AgentFailure):
        return "agent"
    return "environment" if isinstance(error, EnvironmentFailure) else "engine"


def load_filter(settings: FilterSection) -> GroupFilter:
    """Return the rule of ``rollout.filter``. Raises ConfigError if its function cannot be imported or called."""
    if settings.function is None:
        return GroupFilter(settings)
    return GroupFilter(settings, load_function("rollout.filter.function", settings.function, ("group",), ConfigError))


class Responses:
    """Completes responses: it holds what all of them share, their limit and the user's functions."""

    def __init__(
        self,
        config: RunConfig,
        engine: RolloutEngine,
        tokenizer: Any,
        rewards: RewardRunner,
        environments: Mapping[str, Environment],
        engine_name: str = "",
    ) -> None:
        """``environments`` are those that settings name, by their functions; ``engine_name`` is as in the settings."""
        self._config = config
        self._engine = engine
        self._engine_name = engine_name
        self._rewards = rewards
        self._scoring = Scoring(config, tokenizer, rewards)
        self._environments = environments
        self._filter = load_filter(config.rollout.filter)
        self.stop_token_ids = engine.stop_token_ids | set(config.rollout.stop_token_ids)
        """The tokens that end every response."""
        self._decode = decoder(tokenizer)
        self._stops = functools.lru_cache(_KNOWN_STOPS)(self._new_stops)

    @property
    def whole_groups(self) -> bool:
        """Whether responses are scored together, once all of their group have ended, by ``score_group``."""
        return self._rewards.whole_groups

    def begin(self, name: str, prompt: Prompt, terms: Terms | None = None) -> PartialRollout:
        """Begin the response to a prompt; ``name`` becomes its trajectory id.

        Here and below, ``terms`` are those of an evaluation; None for those of training.
        """
        terms = terms or self.terms(prompt)
        return self.begin_tokens(name, prompt.token_ids, terms.max_response_tokens, terms)

    def begin_tokens(self, name: str, token_ids: Int32Array, max_response_tokens: int, terms: Terms) -> PartialRollout:
        """Begin the response to a prompt of tokens, int32[P], which ends as ``terms`` say."""
        return PartialRollout.begin(
            name,
            token_ids,
            max_response_tokens=max_response_tokens,
            eos_token_id=self.stop_token_ids.union(terms.stop_token_ids),
            routing_spec=self._engine.routing_spec,
            routing_policy=self._config.async_training.partial_rollout.routing,
        )

    def sampling(self, partial: PartialRollout, prompt: Prompt, stop: Sequence[str] = ()) -> tuple[Sampling, Stops]:
        """Return how the next call of ``partial`` samples in training, and what ends the response: ``stop`` as well."""
        terms = self.terms(prompt)
        stops = self.stops(terms, stop)
        return stops.sampling(Sampling(terms.temperature, self._config.rollout.top_p), partial), stops

    def stops(self, terms: Terms, stop: Sequence[str] = ()) -> Stops:
        """Return what ends a response under these terms: ``stop`` as well."""
        return self._stops((*terms.stop, *stop), terms.stop_token_ids)

    def _new_stops(self, strings: tuple[str, ...], token_ids: tuple[int, ...]) -> Stops:
        own = [token for token in token_ids if token not in self.stop_token_ids]
        return Stops(strings, self.stop_token_ids.union(token_ids), self._decode, own)

    def absorb(self, partial: PartialRollout, output: EngineOutput, stops: Stops, sampling: Sampling) -> PartialRollout:
        """Return the state after one more call, which ends the response where it has a stop token or stop string."""
        return partial.absorb(stops.cut(partial, output), self._engine_name, sampling.temperature)

    async def complete(
        self,
        partial: PartialRollout,
        prompt: Prompt,
        call: Call,
        keep: Keep = lambda _: None,
        terms: Terms | None = None,
    ) -> PartialRollout:
        """Complete ``partial`` and return it. ``keep`` is called with each state. Raises EnvironmentFailure."""
        function = (terms or self.terms(prompt)).environment
        environment = None if function is None else self._environments[function]
        calls = itertools.count()
        texts: list[str] = []  # of the turns so far, as the environment gets them
        while True:
            while not partial.finished:
                partial = await call(partial, f"{partial.trajectory_id}/{next(calls)}")
                keep(partial)
            answer = None if environment is None else await self._answer(environment, prompt, partial, texts)
            if answer is None:
                return partial
            partial = partial.append_turn(answer)
            keep(partial)

    async def score(self, group: InFlight, index: int) -> Score:
        """Return the score with which a finished response of a group is trained.

        Raises RewardError, and RewardNotApplicable if it has none.
        """
        response = group.partials[index]
        assert response is not None
        prompt = group.ticket.prompt
        return await self._scoring.in_training(prompt, response, self.terms(prompt))

    async def eval_score(self, prompt: Prompt, response: PartialRollout, terms: Terms) -> Score:
        """Return the score of a response in an evaluation. Raises as ``score``."""
        return await self._scoring.in_evaluation(prompt, response, terms)

    async def score_group(self, group: InFlight, indices: Sequence[int]) -> list[int]:
        """Score these finished responses of a group together. Returns the indices of those that have a score then.

        Raises RewardError where one has none and its group cannot do without it.
        """
        left = [(index, partial) for index in indices if (partial := group.partials[index]) and not group.scores[index]]
        prompt = group.ticket.prompt
        found = await self._scoring.of_group(prompt, [partial for _, partial in left], self.terms(prompt))
        last: RewardError | None = None
        for (index, _), score in zip(left, found, strict=True):
            if not isinstance(score, RewardError):
                group.scores[index] = score
            elif self.leave_out(group, index, score):
                last = score
            else:
                raise score
        scored = [index for index in indices if group.scores[index] is not None]
        if last is not None and len(scored) < (self._config.rollout.min_group_size or self._config.rollout.n):
            raise last  # Others were cut off by rollout.group_timeout_s.
        return scored

    def is_fatal(self, error: Exception, terms: Terms) -> bool:
        """Return whether a failure ends the run; else it costs only the response, the group or the problem.

        terms: those of the prompt.
        """
        if isinstance(error, RewardError):
            return self._config.reward.on_error == "fail" and not isinstance(error, RewardNotApplicable)
        if isinstance(error, EnvironmentFailure):
            return self._config.rollout.environment.on_error == "fail"
        if isinstance(error, AgentFailure):
            return terms.agent is None or self._config.rollout.agent_sections[terms.agent].on_error == "fail"
        return isinstance(error, EngineDied)

    async def unless_left_out(self, group: InFlight, index: int, make: Make[_T]) -> _T | None:
        """Return what ``make`` makes of a response; None if that failed and its group can do without it."""
        try:
            return await make(group, index)
        except COST_THEIR_GROUP as error:
            if not self.leave_out(group, index, error):
                raise
            return None

    def leave_out(self, group: InFlight, index: int, error: Exception) -> bool:
        """Return whether the group is published without a response that failed, as rollout.min_group_size allows."""
        settings = self._config.rollout
        needed = settings.min_group_size or settings.n
        if self.is_fatal(error, self.terms(group.ticket.prompt)) or settings.n - group.left_out <= needed:
            return False
        group.left_out += 1
        log.warning("response_left_out", group=group.group_id, response=index, reason=str(error))
        return True

    def why_filtered(self, group: InFlight, rollouts: Mapping[int, RolloutRecord]) -> str | None:
        """Return why a group with these rollouts, by index, is not to be trained; None if it is.

        Raises RewardError where rollout.filter.function failed.
        """
        return self._filter.reason(FinishedGroup.of(group, rollouts))

    def close(self) -> None:
        """Stop calling the user's functions."""
        self._rewards.close()
        for environment in self._environments.values():
            environment.close()

    def terms(self, prompt: Prompt) -> Terms:
        """Return the terms of a prompt's responses in training."""
        return self._config.terms(source_of(prompt.prompt_id), prompt.fields)

    async def _answer(
        self, environment: Environment, prompt: Prompt, partial: PartialRollout, texts: list[str]
    ) -> Int32Array | None:
        """Return the environment's turn after a turn of the policy; None when the response ends with that."""
        if partial.finish_reason != "stop":
            return None
        turns = partial.turns
        policy_turns = len(turns) // 2 + 1
        if policy_turns == self._config.rollout.environment.max_turns:
            return None
        return await environment.answer(prompt, turns, texts)
