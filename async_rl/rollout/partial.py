"""A partial rollout: what an interrupted generation keeps, and what its next engine call is given.

Pure: no engine, no clock. It knows ``types``, ``routing_policies``, and what an engine returns.

Invariants: one token has one log-prob and one version (1), an interruption at any point keeps this true (2), and what
was recorded when a token was sampled never changes (3): arrays only grow, and each growth makes a new array.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from async_rl.config.fields import RoutingPolicy
from async_rl.errors import InvalidTrajectory
from async_rl.rollout import routing_policies
from async_rl.rollout.engine.interface import EngineOutput
from async_rl.types import (
    NOT_SAMPLED,
    ExpertIds,
    FinishReason,
    Float32Array,
    Int32Array,
    RoutingSpec,
    Segment,
    Trajectory,
    check_routing,
    check_segments,
)


class Request(NamedTuple):
    """The arguments of the next engine call."""

    token_ids: Int32Array
    """int32[P+G]: the prompt and the response so far."""
    max_tokens: int
    """How many tokens may be sampled."""
    first_row: int
    """The first row of routed experts that is missing; the call returns the rows from there on."""


@dataclass(frozen=True, slots=True)
class PartialRollout:
    """A trajectory between engine calls.

    prompt_ids int32[P]; response_ids int32[G], logprobs float32[G], versions int32[G] of the tokens so far, of which
    segments cover the sampled ones; routed_experts [n, L, K], the rows that ``routing_policy`` keeps of the calls so
    far, for all tokens before the last sampled one, or None ``without_repeated_rows``. finish_reason is None until the
    response has ended.
    """

    trajectory_id: str
    prompt_ids: Int32Array
    max_response_tokens: int
    stop_token_ids: frozenset[int]
    routing_spec: RoutingSpec | None
    routing_policy: RoutingPolicy = "replace"
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
        routing_spec: RoutingSpec | None,
        routing_policy: RoutingPolicy = "replace",
    ) -> PartialRollout:
        """Begin a response, which has no token yet.

        ``eos_token_id`` is the token or tokens that end it. ``routing_spec`` is None if the engine returns no routed
        experts.
        """
        if max_response_tokens <= 0:
            raise InvalidTrajectory(
                f"trajectory {trajectory_id}: max_response_tokens is {max_response_tokens}, must be > 0"
            )
        stop = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id
        return cls(trajectory_id, prompt_ids, max_response_tokens, frozenset(stop), routing_spec, routing_policy)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def interrupted(self) -> bool:
        """Whether the next call resumes in the middle of a turn, and so computes again what earlier calls computed."""
        return bool(self.segments) and self.segments[-1].stop == len(self.response_ids)

    @property
    def _rows_come_again(self) -> bool:
        return self.routing_policy == "replace" and not self.finished

    @property
    def turns(self) -> tuple[Int32Array, ...]:
        """The response so far, split into the turns of policy and environment; the policy's turn is first."""
        sampled = self.versions != NOT_SAMPLED
        return tuple(np.split(self.response_ids, np.flatnonzero(sampled[1:] != sampled[:-1]) + 1))

    def check(self) -> None:
        """Raise InvalidTrajectory unless engine calls can lead to this state. For a state that came from elsewhere."""
        name, count = f"trajectory {self.trajectory_id}", len(self.response_ids)
        arrays = (self.response_ids, np.int32), (self.logprobs, np.float32), (self.versions, np.int32)
        if any(array.shape != (count,) or array.dtype != dtype for array, dtype in arrays):
            raise InvalidTrajectory(
                f"{name}: {count} response tokens, {self.logprobs.dtype}{list(self.logprobs.shape)} logprobs, "
                f"{self.versions.dtype}{list(self.versions.shape)} versions"
            )
        if count > self.max_response_tokens:
            raise InvalidTrajectory(f"{name}: {count} response tokens, more than {self.max_response_tokens} allowed")
        if count and (not self.segments or self.segments[0].start != 0):
            raise InvalidTrajectory(f"{name}: a partial rollout whose first token was not sampled")
        check_segments(name, self.segments, self.versions)
        none, without = self.routed_experts is None, self.routing_spec is None or not self.segments
        if none != without and not (none and self._rows_come_again):
            raise InvalidTrajectory(
                f"{name}: a partial rollout has routed experts without a sampled MoE token, or lacks them"
            )
        if self.routed_experts is not None and self.routing_spec is not None:
            known = len(self.prompt_ids) + self.segments[-1].stop - 1
            check_routing(name, self.routed_experts, rows=known, spec=self.routing_spec)

    def without_repeated_rows(self) -> PartialRollout:
        """Return the state without routed experts if the next call returns all of them in place of the present ones."""
        return replace(self, routed_experts=None) if self._rows_come_again else self

    def next_request(self) -> Request:
        """Return the arguments of the next engine call. Raises InvalidTrajectory when the response has ended."""
        if self.finished:
            raise InvalidTrajectory(f"trajectory {self.trajectory_id}: it has ended ({self.finish_reason})")
        known = 0 if self.routed_experts is None else len(self.routed_experts)
        return Request(
            np.concatenate([self.prompt_ids, self.response_ids]),
            self.max_response_tokens - len(self.response_ids),
            routing_policies.first_row(self.routing_policy, known),
        )

    def absorb(self, output: EngineOutput, engine: str = "", temperature: float | None = None) -> PartialRollout:
        """Return the state after one more call. Raises InvalidTrajectory if the output cannot be of this trajectory."""
        request = self.next_request()
        name, new, budget = f"trajectory {self.trajectory_id}", len(output.token_ids), request.max_tokens
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
        segments, routed_experts = self._merged(name, request, output)
        return replace(
            self,
            response_ids=np.concatenate([self.response_ids, output.token_ids]),
            logprobs=np.concatenate([self.logprobs, output.logprobs]),
            versions=np.concatenate([self.versions, output.versions]),
            segments=segments + _segments(output.versions, len(self.response_ids), engine, temperature),
            routed_experts=routed_experts,
            finish_reason=self._finish_reason_after(output),
        )

    def append_turn(self, token_ids: Int32Array) -> PartialRollout:
        """Return the state after the environment's turn, int32[n], which follows a turn of the policy that stopped.

        These tokens have no behaviour log-prob and no version. Their routed experts come with the next call, which
        reads them. If they leave no room for another token, the response ends without them, as of finish_reason length.
        """
        name = f"trajectory {self.trajectory_id}"
        if self.finish_reason != "stop":
            raise InvalidTrajectory(f"{name}: a turn that has not stopped ({self.finish_reason}) takes no answer")
        count = len(token_ids)
        if count == 0:
            raise InvalidTrajectory(f"{name}: a turn was answered without a token")
        if len(self.response_ids) + count >= self.max_response_tokens:
            return replace(self, finish_reason="length")
        return replace(
            self,
            response_ids=np.concatenate([self.response_ids, token_ids]),
            logprobs=np.concatenate([self.logprobs, np.full(count, np.nan, dtype=np.float32)]),
            versions=np.concatenate([self.versions, np.full(count, NOT_SAMPLED, dtype=np.int32)]),
            finish_reason=None,
        )

    def to_trajectory(self, **more: Any) -> Trajectory:
        """Return the finished trajectory, with ``more`` fields. Raises InvalidTrajectory if it has not ended."""
        if self.finish_reason is None:
            raise InvalidTrajectory(f"trajectory {self.trajectory_id}: the response has not ended")
        return Trajectory(
            trajectory_id=self.trajectory_id,
            prompt_ids=self.prompt_ids,
            response_ids=self.response_ids,
            logprobs=self.logprobs,
            versions=self.versions,
            segments=self.segments,
            finish_reason=self.finish_reason,
            routed_experts=self.routed_experts,
            routing_spec=self.routing_spec,
            **more,
        )

    def _merged(
        self, name: str, request: Request, output: EngineOutput
    ) -> tuple[tuple[Segment, ...], ExpertIds | None]:
        """Return the segments so far and the routed experts kept, after this call's rows were checked and merged in."""
        if self.routing_spec is None:
            if output.routed_experts is not None:
                raise InvalidTrajectory(f"{name}: a call returned routed experts, and the model has no MoE layer")
            return self.segments, None
        if output.routed_experts is None:
            raise InvalidTrajectory(
                f"{name}: a call returned {len(output.token_ids)} tokens without their routed experts"
            )
        total = len(request.token_ids) + len(output.token_ids) - 1
        known = 0 if self.routed_experts is None else len(self.routed_experts)
        routing_policies.check(
            name,
            output.routed_experts,
            rows=total - request.first_row,
            spec=self.routing_spec,
            known=max(0, known - request.first_row),
        )
        return routing_policies.MERGE_POLICIES[self.routing_policy](
            self.segments, self.routed_experts, output.routed_experts
        )

    def _finish_reason_after(self, output: EngineOutput) -> FinishReason | None:
        """Return why the response ended, by its tokens: a call may be aborted in the very step that ended it."""
        if output.finish_reason != "abort":
            return output.finish_reason
        if int(output.token_ids[-1]) in self.stop_token_ids:
            return "stop"
        if len(self.response_ids) + len(output.token_ids) == self.max_response_tokens:
            return "length"
        return None


def _segments(versions: Int32Array, start: int, engine: str, temperature: float | None) -> tuple[Segment, ...]:
    """Return one segment per run of one version: several if the call was frozen during a weight sync."""
    cuts = [0, *(np.flatnonzero(np.diff(versions)) + 1).tolist(), len(versions)]
    return tuple(Segment(start + a, start + b, int(versions[a]), None, engine, temperature) for a, b in pairwise(cuts))
