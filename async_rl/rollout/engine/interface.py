"""The interface of a rollout engine, which ``rollout.engine`` selects. It knows ``types``, neither vLLM nor Ray.

Shapes: P tokens sent, g tokens sampled by one call, N tokens of a scored sequence, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from async_rl.types import ExpertIds, Float32Array, Int32Array, RoutingSpec

PauseMode = Literal["abort", "keep", "wait"]
CallEnd = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. With ``greedy`` the likeliest token is taken, and the others have no effect."""

    temperature: float
    top_p: float
    greedy: bool = False
    top_k: int = 0
    """Likeliest tokens to draw from; 0 for all. Only evaluations set it."""
    stop: tuple[str, ...] = ()
    """Stop strings: a call may end at the token that completes one. What an engine samples beyond it is cut off."""
    stop_token_ids: tuple[int, ...] = ()
    """Stop tokens beside the engine's own; as with stop strings, what is sampled beyond one is cut off."""
    turn_start: int = 0
    """Index into the tokens sent from which on the stop strings are looked for; tokens of earlier calls may be behind
    it."""


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What one call sampled, without what was sent to it."""

    token_ids: Int32Array
    """int32[g]"""
    logprobs: Float32Array
    """float32[g], of the distribution really sampled from."""
    versions: Int32Array
    """int32[g], the policy version with which each token was sampled. There are several after a sync that froze the
    call."""
    routed_experts: ExpertIds | None
    """[P+g-1 - first_row, L, K], the rows of the *full* sequence from ``first_row`` on. None when g is 0, and for an
    engine without ``routing_spec``."""
    finish_reason: CallEnd
    """Is "abort" when a pause ended the call, which may be before its first token."""
    cached_tokens: int | None = None
    """How many of the P tokens sent were read from the prefix cache; None where the engine does not say."""


@dataclass(frozen=True, slots=True)
class Score:
    """A fixed sequence of N tokens under the engine's weights."""

    logprobs: Float32Array
    """float32[N-1], of the tokens after the first, of the distribution at temperature 1."""
    routed_experts: ExpertIds | None
    """[N-1, L, K]; None for a dense model."""
    left_behind: int | None = None
    """The xxh3_64 of routed experts that the replica has kept instead, for ``probed_routing``."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine has to do."""

    waiting: int = 0
    """Calls that it has taken and does not compute yet, for lack of a place or of KV cache."""
    kv_use: float = 0.0
    """Share of the KV cache that the calls under way have."""
    kv_tokens: int = 0
    """Tokens that the KV cache has room for; 0 where that is unknown."""


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """The request of ``update_weights``, with the field of vLLM's WeightTransferUpdateRequest."""

    update_info: dict[str, Any]
    """What the backend of sync.backend takes, such as the announcement of a file."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one host has of an engine that spans hosts (rollout.hosts_per_engine)."""

    number: int
    """From 0, in the order of ranks. Part 0 has the engine core too, which calls the ranks of all parts."""
    address: str
    """The address of this host."""
    meeting: tuple[str, int]
    """Host and port at which the ranks of all parts meet; the first rank listens there."""


@runtime_checkable
class RolloutEngine(Protocol):
    """One replica of the policy that samples.

    It is created as ``Class(config, replica, cores=cores)``: ``cores`` are the CPUs it should compute on, or None.

    A weight sync is: ``pause``, then the weight-transfer methods as vLLM's clients call them on an actor, then
    ``resume``. ``version`` changes only in ``update_weight_version``, while the engine is paused.
    """

    @property
    def routing_spec(self) -> RoutingSpec | None:
        """Layout of routed experts; None for a dense model, and if rollout.return_routed_experts is off."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens that end a response; those of rollout.stop_token_ids end it as well."""

    @property
    def version(self) -> int:
        """The policy version of the weights in the engine."""

    @property
    def sampled_tokens(self) -> int:
        """Tokens sampled since the start, those of calls under way included; the watchdog takes them for progress."""

    async def start(self) -> None:
        """Load the model and get ready to sample. Raises EngineError."""

    async def generate(
        self, request_id: str, token_ids: Int32Array, sampling: Sampling, max_tokens: int, first_row: int = 0
    ) -> EngineOutput:
        """Sample up to ``max_tokens`` tokens after ``token_ids`` int32[P]; return routed experts from ``first_row`` on.

        Raises EngineError.
        """

    def check_alive(self) -> None:
        """Raise EngineDied when a process of the engine has died. Calls under way may then never return."""

    async def ping(self) -> None:
        """Wait until the engine has answered, between two of its steps. If it hangs, this never returns."""

    async def pause(self, mode: PauseMode) -> None:
        """Stop computing. Calls begun while paused wait for ``resume``.

        Calls under way end with the tokens they have ("abort"), are frozen in place ("keep"), or finish first ("wait").
        """

    async def resume(self) -> None:
        """Compute again. Prefixes cached under earlier weights are not reused."""

    async def score(self, sequences: list[Int32Array]) -> list[Score]:
        """Score fixed sequences under the current weights. The engine must not be paused."""

    async def fingerprints(self, sequences: list[Int32Array]) -> list[Float32Array | None]:
        """Fingerprint the residual stream of each sequence, float32[layers + 1, N-1, WIDTH].

        ``weights.fingerprint`` says how; None for an engine that cannot. Slow; for the search after a fault. The engine
        must not be paused.
        """

    async def init_weight_transfer_engine(self, request: Any) -> None: ...

    async def start_weight_update(self) -> None: ...

    async def update_weights(self, request: Any) -> None: ...

    async def finish_weight_update(self) -> None: ...

    async def update_weight_version(self, version: str) -> None: ...

    async def shutdown(self) -> None:
        """End the engine and all of its processes. May be called twice."""


@runtime_checkable
class ScoresOnResume(Protocol):
    """What an engine may have in addition: it makes the pause of a weight sync shorter."""

    async def resume_and_score(self, sequences: list[Int32Array]) -> list[Score]:
        """Do ``resume`` and then ``score`` as one."""


@runtime_checkable
class ReportsLoad(Protocol):
    """What an engine may have in addition: rollouts of agents then begin only where it has room for what they cache."""

    async def load(self) -> EngineLoad:
        """Return what it has to do, as of its last step. Raises EngineError."""


@runtime_checkable
class SpansHosts(Protocol):
    """What an engine has in addition that can have ranks on other hosts; ``Part`` 0 of it is a ``RolloutEngine``."""

    def span(self, part: Part) -> None:
        """Say which part of an engine this is, before its ``start``."""

    def lose_part(self, why: str) -> None:
        """End the engine, whatever it is doing, because another part has ended. May be called from any thread."""


@runtime_checkable
class HasMetrics(Protocol):
    """What an engine may have in addition: metrics of its own, which the worker serves with its own."""

    def metrics(self) -> Iterable[Any]:
        """Return them as they are now, as prometheus_client's ``Metric``. It is called in a thread of its own."""
