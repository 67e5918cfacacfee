"""A response from its beginning to its reward: as many engine calls as its interruptions and turns take.

Who makes a call, and when, is the caller's to say: the worker for training, ``evaluation`` for greedy ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from typing import Any

from async_rl.config.schema import RunConfig
from async_rl.errors import EnvironmentFailure, RewardError
from async_rl.rollout.engine.interface import RolloutEngine
from async_rl.rollout.environments.turns import Environment
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.rewards.runner import RewardRunner
from async_rl.types import Int32Array, Prompt

# (what there is of a response, request id) -> the same after one more engine call.
Call = Callable[[PartialRollout, str], Awaitable[PartialRollout]]
Keep = Callable[[PartialRollout], None]


class Responses:
    """What all responses of a run have in common: their budget, and the user's environment and reward."""

    def __init__(
        self,
        config: RunConfig,
        engine: RolloutEngine,
        tokenizer: Any,
        rewards: RewardRunner,
        environment: Environment | None,
    ) -> None:
        self._config = config
        self._engine = engine
        self._tokenizer = tokenizer
        self._rewards = rewards
        self._environment = environment

    def begin(self, name: str, prompt: Prompt) -> PartialRollout:
        """A response of which nothing is there yet."""
        return PartialRollout.begin(
            name,
            prompt.token_ids,
            max_response_tokens=self._config.rollout.max_response_tokens,
            eos_token_id=self._engine.stop_token_ids,
            routing_spec=self._engine.routing_spec,
            policy=self._config.async_training.partial_rollout.routing,
        )

    async def complete(
        self, partial: PartialRollout, prompt: Prompt, call: Call, keep: Keep = lambda _: None
    ) -> PartialRollout:
        """The whole response that ``partial`` becomes; ``keep`` is told of each state. Raises EnvironmentFailure."""
        calls = itertools.count()
        while True:
            while not partial.finished:
                partial = await call(partial, f"{partial.trajectory_id}/{next(calls)}")
                keep(partial)
            answer = await self._answer(prompt, partial)
            if answer is None:
                return partial
            partial = partial.go_on(answer)
            keep(partial)

    async def reward(self, prompt: Prompt, response: PartialRollout) -> float:
        """Raises RewardError."""
        text = self._tokenizer.decode(response.response_ids, skip_special_tokens=True)
        return await self._rewards.score(prompt, text)

    def is_fatal(self, error: RewardError | EnvironmentFailure) -> bool:
        """Whether a failure of the user's function ends the run, or costs what it was called for only."""
        section = self._config.reward if isinstance(error, RewardError) else self._config.rollout.environment
        return section.on_error == "fail"

    def close(self) -> None:
        """Call the user's functions no more."""
        self._rewards.close()
        if self._environment is not None:
            self._environment.close()

    async def _answer(self, prompt: Prompt, partial: PartialRollout) -> Int32Array | None:
        """What the environment says to a turn that has just ended; None when the response ends with it."""
        if self._environment is None or partial.finish_reason != "stop":
            return None
        turns = partial.turns
        policy_turns = len(turns) // 2 + 1
        if policy_turns == self._config.rollout.environment.max_turns:
            return None
        return await self._environment.answer(prompt, turns)
