"""What a rollout engine is, for everybody who uses one. Knows ``types``; neither vLLM nor Ray.

Shapes: P tokens sent, g tokens sampled by one call, N tokens of a scored sequence, L MoE layers, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from async_rl.types import ExpertIds, Float32Array, Int32Array, RoutingSpec

PauseMode = Literal["abort", "keep", "wait"]
CallEnd = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. ``greedy`` takes the likeliest token, and temperature and top_p are then of no effect."""

    temperature: float
    top_p: float
    greedy: bool = False


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What one call sampled, and nothing of what was sent to it.

    token_ids int32[g]; logprobs float32[g], of the distribution really sampled from; versions int32[g], the policy
    version that the engine had when it sampled each token: one version, unless weights were pushed while the call was
    kept; routed_experts [P+g-1 - first_row, L, K], the rows of the *full* sequence from the one asked for on, None when
    g is 0 and for an engine without ``routing``; finish_reason "abort" when a pause ended the call, which may be before
    its first token.
    """

    token_ids: Int32Array
    logprobs: Float32Array
    versions: Int32Array
    routed_experts: ExpertIds | None
    finish_reason: CallEnd


@dataclass(frozen=True, slots=True)
class Score:
    """A fixed sequence under the engine's weights: logprobs float32[N-1] of tokens 1.., of the unscaled distribution;
    routed_experts [N-1, L, K], None for a dense model."""

    logprobs: Float32Array
    routed_experts: ExpertIds | None


@runtime_checkable
class RolloutEngine(Protocol):
    """One replica of the policy that samples.

    A push is: ``pause``, then the weight-transfer methods as vLLM's clients call them on an actor, then ``resume``.
    ``version`` changes only in ``update_weight_version``, while the engine is paused.
    """

    @property
    def routing_spec(self) -> RoutingSpec | None:
        """Layout of routed experts; None for a dense model, and where rollout.return_routed_experts is off."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens that end a response."""

    @property
    def version(self) -> int:
        """The policy version of the weights in the engine."""

    async def start(self) -> None:
        """Load the model and be ready. Raises EngineError."""

    async def generate(
        self, request_id: str, token_ids: Int32Array, sampling: Sampling, max_tokens: int, first_row: int = 0
    ) -> EngineOutput:
        """Sample up to ``max_tokens`` tokens after ``token_ids`` int32[P]; routing is returned from ``first_row`` on.

        Raises EngineError.
        """

    def check_alive(self) -> None:
        """Raises EngineDied when a process of the engine has died; calls under way may then never return."""

    async def ping(self) -> None:
        """Returns when the engine has answered, between two of its steps. One that hangs never does."""

    async def pause(self, mode: PauseMode) -> None:
        """Stop computing: end running calls with what they have ("abort"), freeze them in place ("keep"), or let
        them finish ("wait"). Calls begun while paused wait for ``resume``."""

    async def resume(self) -> None:
        """Compute again. Prefixes cached under earlier weights are not used."""

    async def score(self, sequences: list[Int32Array]) -> list[Score]:
        """Log-probs of fixed sequences under the current weights. The engine must not be paused."""

    async def fingerprints(self, sequences: list[Int32Array]) -> list[Float32Array | None]:
        """Of the residual stream, float32[layers + 1, N-1, WIDTH] of each sequence as in ``weights.fingerprint``; None
        where the engine cannot tell. Slow; for the search after a fault. The engine must not be paused."""

    async def init_weight_transfer_engine(self, request: Any) -> None: ...

    async def start_weight_update(self) -> None: ...

    async def update_weights(self, request: Any) -> None: ...

    async def finish_weight_update(self) -> None: ...

    async def update_weight_version(self, version: str) -> None: ...

    async def shutdown(self) -> None:
        """End the engine and every process of it. May be called twice."""
