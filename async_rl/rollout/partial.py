"""A response in the making: what an interrupted generation keeps, and what its next engine call is given.

Pure: no engine, no clock. Knows ``types``, ``routing``, and what an engine returns.

Invariants: one token has one log-prob and one version (1), an interruption anywhere leaves that so (2), and what was
recorded when a token was sampled is never touched again (3): arrays only grow, by a new array.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, field
from dataclasses import replace as changed

import numpy as np

from async_rl.errors import InvalidTrajectory
from async_rl.rollout import routing as rows
from async_rl.rollout.engine import EngineOutput
from async_rl.types import (
    ExpertIds,
    FinishReason,
    Float32Array,
    Int32Array,
    RoutingSpec,
    Segment,
    Trajectory,
)


@dataclass(frozen=True, slots=True)
class PartialRollout:
    """A trajectory between engine calls.

    prompt_ids int32[P]; response_ids int32[G], logprobs float32[G], versions int32[G] of the tokens so far; segments
    cover them; routed_experts [P+G-1, L, K] of the last call that sampled anything. finish_reason is None until the
    response has ended.
    """

    trajectory_id: str
    prompt_ids: Int32Array
    max_response_tokens: int
    stop_token_ids: frozenset[int]
    routing: RoutingSpec | None
    response_ids: Int32Array = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    logprobs: Float32Array = field(default_factory=lambda: np.empty(0, dtype=np.float32))
    versions: Int32Array = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    segments: tuple[Segment, ...] = ()
    routed_experts: ExpertIds | None = None
    finish_reason: FinishReason | None = None

    @classmethod
    def begin(
        cls,
        trajectory_id: str,
        prompt_ids: Int32Array,
        *,
        max_response_tokens: int,
        eos_token_id: int | Collection[int] | None,
        routing: RoutingSpec | None,
    ) -> PartialRollout:
        """A response without a token. ``eos_token_id``: the token or tokens that end it; ``routing``: None if dense."""
        if max_response_tokens <= 0:
            raise InvalidTrajectory(
                f"trajectory {trajectory_id}: max_response_tokens is {max_response_tokens}, must be > 0"
            )
        stop = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id
        return cls(trajectory_id, prompt_ids, max_response_tokens, frozenset(stop), routing)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def next_request(self) -> tuple[Int32Array, int]:
        """(tokens to send int32[P+G], how many may be sampled): the prompt, and all that was sampled after it."""
        if self.finished:
            raise InvalidTrajectory(f"trajectory {self.trajectory_id}: it has ended ({self.finish_reason})")
        return np.concatenate([self.prompt_ids, self.response_ids]), self.max_response_tokens - len(self.response_ids)

    def absorb(self, output: EngineOutput) -> PartialRollout:
        """The state after one more call. Raises InvalidTrajectory when the output cannot be of this trajectory."""
        _, budget = self.next_request()
        name = f"trajectory {self.trajectory_id}"
        new = len(output.token_ids)
        if len(output.logprobs) != new or len(output.versions) != new:
            raise InvalidTrajectory(
                f"{name}: a call returned {new} tokens, {len(output.logprobs)} logprobs, {len(output.versions)} stamps"
            )
        if new > budget:
            raise InvalidTrajectory(f"{name}: a call returned {new} tokens, {budget} were left of the response limit")
        if new == 0:
            if output.finish_reason != "abort":
                raise InvalidTrajectory(f"{name}: a call ended by {output.finish_reason!r} without a token")
            return self
        return changed(
            self,
            response_ids=np.concatenate([self.response_ids, output.token_ids]),
            logprobs=np.concatenate([self.logprobs, output.logprobs]),
            versions=np.concatenate([self.versions, output.versions]),
            segments=self.segments + _segments(output.versions, len(self.response_ids)),
            routed_experts=self._routing_after(name, output),
            finish_reason=self._finish_reason_after(output),
        )

    def to_trajectory(self, reward: float) -> Trajectory:
        """The finished trajectory, validated. Raises InvalidTrajectory while the response goes on."""
        if self.finish_reason is None:
            raise InvalidTrajectory(f"trajectory {self.trajectory_id}: the response has not ended")
        return Trajectory(
            trajectory_id=self.trajectory_id,
            prompt_ids=self.prompt_ids,
            response_ids=self.response_ids,
            logprobs=self.logprobs,
            versions=self.versions,
            segments=self.segments,
            reward=reward,
            finish_reason=self.finish_reason,
            routed_experts=self.routed_experts,
            routing=self.routing,
        )

    def _routing_after(self, name: str, output: EngineOutput) -> ExpertIds | None:
        if self.routing is None:
            return None
        if output.routed_experts is None:
            raise InvalidTrajectory(f"{name}: a call returned {len(output.token_ids)} tokens without their routing")
        total = len(self.prompt_ids) + len(self.response_ids) + len(output.token_ids)
        return rows.replace(name, output.routed_experts, rows=total - 1, spec=self.routing)

    def _finish_reason_after(self, output: EngineOutput) -> FinishReason | None:
        """A call may be aborted in the very step that ended the response; what counts is the tokens."""
        if output.finish_reason != "abort":
            return output.finish_reason
        if int(output.token_ids[-1]) in self.stop_token_ids:
            return "stop"
        if len(self.response_ids) + len(output.token_ids) == self.max_response_tokens:
            return "length"
        return None


def _segments(versions: Int32Array, start: int) -> tuple[Segment, ...]:
    """One segment per run of one version: several in one call if weights were pushed while it was frozen."""
    cuts = [0, *(np.flatnonzero(np.diff(versions)) + 1).tolist(), len(versions)]
    return tuple(Segment(start + a, start + b, int(versions[a])) for a, b in itertools.pairwise(cuts))
