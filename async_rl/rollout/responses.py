"""A response from its beginning to its reward: as many engine calls as its interruptions and turns take.

The caller supplies the engine call: ``worker`` one that samples, ``evaluation`` one that is greedy.
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

# (partial rollout, request id) -> the partial rollout after one more engine call.
Call = Callable[[PartialRollout, str], Awaitable[PartialRollout]]
Keep = Callable[[PartialRollout], None]


class Responses:
    """Completes responses: it holds what all of them share, their limit and the user's environment and reward."""

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
        """Begin the response to a prompt; ``name`` becomes its trajectory id."""
        return PartialRollout.begin(
            name,
            prompt.token_ids,
            max_response_tokens=self._config.rollout.max_response_tokens,
            eos_token_id=self._engine.stop_token_ids,
            routing_spec=self._engine.routing_spec,
            routing_policy=self._config.async_training.partial_rollout.routing,
        )

    async def complete(
        self, partial: PartialRollout, prompt: Prompt, call: Call, keep: Keep = lambda _: None
    ) -> PartialRollout:
        """Complete ``partial`` and return it. ``keep`` is called with each state. Raises EnvironmentFailure."""
        calls = itertools.count()
        while True:
            while not partial.finished:
                partial = await call(partial, f"{partial.trajectory_id}/{next(calls)}")
                keep(partial)
            answer = await self._answer(prompt, partial)
            if answer is None:
                return partial
            partial = partial.append_turn(answer)
            keep(partial)

    async def reward(self, prompt: Prompt, response: PartialRollout) -> float:
        """Return the reward of a finished response. Raises RewardError."""
        text = self._tokenizer.decode(response.response_ids, skip_special_tokens=True)
        return await self._rewards.score(prompt, text)

    def is_fatal(self, error: RewardError | EnvironmentFailure) -> bool:
        """Return whether a failure of the user's function ends the run; else it costs only the group or the problem."""
        section = self._config.reward if isinstance(error, RewardError) else self._config.rollout.environment
        return section.on_error == "fail"

    def close(self) -> None:
        """Stop calling the user's functions."""
        self._rewards.close()
        if self._environment is not None:
            self._environment.close()

    async def _answer(self, prompt: Prompt, partial: PartialRollout) -> Int32Array | None:
        """Return the environment's turn after a turn of the policy; None when the response ends with that."""
        if self._environment is None or partial.finish_reason != "stop":
            return None
        turns = partial.turns
        policy_turns = len(turns) // 2 + 1
        if policy_turns == self._config.rollout.environment.max_turns:
            return None
        return await self._environment.answer(prompt, turns)
