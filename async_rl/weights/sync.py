"""One sync: pause, push, canary, resume. Knows both sides as actor handles only; owns no version.

    pause     a replica stops generating, as partial_rollout.mode says
    transfer  trainer rank 0 drives vLLM's start / update / finish on it, which stamps the new version
    canary    it scores a fixed probe under the weights it received, the trainer under those it sent
    resume    rollouts go on

All replicas go through it together, or with sync.rolling one after the other, so that the others generate meanwhile.

A replica is resumed only after its canary agreed. Where it does not, or the transfer failed, the push is made once
more; then the layers are looked into, and the run ends. On any failure the engines stay stopped: better no tokens than
tokens of unknown weights. A replica that is dead or does not answer is named by ``ReplicaFailed``: whoever pushes takes
it from ``members`` and pushes again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import structlog

from async_rl.config.schema import RunConfig
from async_rl.errors import ReplicaFailed, TrainerDied, WeightSyncError, WeightSyncMismatch
from async_rl.metrics.summary import SyncRecord
from async_rl.models.config import ModelConfig
from async_rl.runtime.failures import is_worker_lost, unwrap_ray_error, user_facing_error
from async_rl.types import ExpertIds, Int32Array
from async_rl.weights.canary import (
    BATCHES,
    CANDIDATES,
    SEQUENCES,
    CanaryReport,
    agrees,
    candidates,
    coarser_dtype,
    compare,
    greedy_cover,
    make_probe,
    mismatch,
    reached,
    tolerance,
    wrong_numbering,
)
from async_rl.weights.fingerprint import NOISE, describe_layer_drift, describe_routing_drift, routing_differences

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Agreement:
    """The canary's outcome where every replica agreed: the worst report, and experts that the probe does not reach."""

    report: CanaryReport
    unreached_experts: int


Paused = Callable[[int], Awaitable[None]]
"""Called with each replica that stands still under its new weights, before it is resumed."""

# A worker's event loop answers within milliseconds; this long without an answer, its process hangs.
_ANSWER_S = 5.0


class Ranks(Protocol):
    """The trainer: ``fleet.TrainerRanks``."""

    async def call(
        self, method: str, *arguments: Any, shares: Sequence[Any] | None = None, **keywords: Any
    ) -> list[Any]: ...


class WeightSync:
    """Drives syncs between the trainer's ranks and the rollout workers that are ``members``, by replica."""

    def __init__(self, config: RunConfig, model: ModelConfig, trainers: Ranks) -> None:
        self._config = config
        self._model = model
        self._trainers = trainers
        self.members: dict[int, Any] = {}
        self._connected: dict[int, Any] = {}
        self._max_tokens = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        self._probe = make_probe(config.seed, model.vocab_size, max_tokens=self._max_tokens)
        self._batches = 0  # of candidates tried
        self._told_unreached = 0  # the largest number that the log has a warning of
        self._given_up: npt.NDArray[np.bool_] | None = None  # bool[L, E]: experts that no candidate reached

    async def begin(self) -> Agreement:
        """Before anything is sampled: complete the probe, and compare both sides on the weights they have.

        Under R3 also with the engine's routing replayed, so that routing which means something else to the trainer
        (other expert ids, other layers) ends the run here. Raises WeightSyncMismatch, InvalidTrajectory for routing
        that cannot be of this model.
        """
        await self._reach_experts(BATCHES)
        return await self._check(list(self.members), replay=self._config.trainer.router_replay == "R3")

    def reconnect(self) -> None:
        """The trainer is another one: connect it before the next push."""
        self._connected = {}

    async def push(self, version: int, *, paused: Paused | None = None, end_calls: bool = False) -> SyncRecord:
        """Bring every member to ``version``; rollouts stand still until ``resume``, or with sync.rolling until their
        replica's turn is over.

        end_calls: end running calls where they would be frozen, so that ``paused`` finds all of their tokens.
        Raises WeightSyncMismatch when the canary disagrees twice, WeightSyncError when a transfer fails twice or
        sync.timeout_s is over, ReplicaFailed.
        """
        phases: dict[str, float] = {}
        agreements: list[Agreement] = []
        retries: Counter[str] = Counter()
        turns = [[replica] for replica in self.members] if self._config.sync.rolling else [list(self.members)]
        try:
            for turn in turns:
                async with asyncio.timeout(self._config.sync.timeout_s):
                    agreements.append(await self._push_or_again(version, turn, phases, retries, end_calls))
                    if paused is not None:
                        for replica in turn:
                            await paused(replica)
                if self._config.sync.rolling:
                    await self._all(turn, "resume")
        except TimeoutError:
            raise await self._too_long(f"push of version {version}", phases) from None
        return SyncRecord(
            policy_version=version,
            seconds=sum(phases.values()),
            phases=phases,
            canary=max(agreement.report.max_abs_diff for agreement in agreements),
            unreached_experts=max(agreement.unreached_experts for agreement in agreements),
            retries=retries,
        )

    async def resume(self) -> None:
        """Let every member go on. One that fails here is found by whoever waits for its work."""
        await asyncio.gather(*(worker.resume.remote() for worker in self.members.values()), return_exceptions=True)

    async def stand_still(self, paused: Paused) -> None:
        """Have every member stop, without a push, for as long as ``paused`` takes. Raises ReplicaFailed, and
        WeightSyncError when sync.timeout_s is over."""
        everyone = list(self.members)
        try:
            async with asyncio.timeout(self._config.sync.timeout_s):
                await self._all(everyone, "pause", True)
                for replica in everyone:
                    await paused(replica)
                await self._all(everyone, "wake")
        except TimeoutError:
            raise await self._too_long("standstill for a checkpoint", {}) from None
        await self.resume()

    async def _push_or_again(
        self, version: int, replicas: list[int], phases: dict[str, float], retries: Counter[str], end_calls: bool
    ) -> Agreement:
        """Counts in ``retries`` why the push was made again."""
        try:
            return await self._push_once(version, replicas, phases, end_calls)
        except ReplicaFailed:
            raise
        except WeightSyncError as error:
            mismatch = isinstance(error, WeightSyncMismatch)
            if mismatch and self._config.async_training.partial_rollout.mode == "in_flight":
                raise  # frozen generations went on meanwhile, with weights that nobody knows
            log.warning("a push failed; pushing once more", version=version, reason=str(error))
            self.reconnect()
            retries["canary" if mismatch else "transfer"] += 1
            return await self._push_once(version, replicas, phases, end_calls)

    async def _push_once(
        self, version: int, replicas: list[int], phases: dict[str, float], end_calls: bool
    ) -> Agreement:
        """Adds to the seconds of each phase."""
        self._all_there(replicas)
        if self._connected != self.members:
            await self._transfer("connect", list(self.members.values()))
            self._connected = dict(self.members)
        self._all_there(replicas)
        only = None if len(replicas) == len(self._connected) else list(self._connected).index(replicas[0])
        with _timed(phases, "pause"):
            await self._all(replicas, "pause", end_calls)
        with _timed(phases, "transfer"):
            await self._transfer("push", version, only)
        with _timed(phases, "wake"):
            await self._all(replicas, "wake")
        with _timed(phases, "canary"):
            return await self._check(replicas, replay=False)

    async def _transfer(self, method: str, *arguments: Any) -> None:
        """A call of the trainer in which it calls the engines. Raises ReplicaFailed where one of them is at fault."""
        try:
            await self._trainers.call(method, *arguments)
        except TrainerDied:
            raise
        except Exception as error:
            await self._blame()
            if isinstance(error, WeightSyncError):
                raise
            raise WeightSyncError(f"{method}: {type(error).__name__}: {error}") from error

    async def _too_long(self, what: str, phases: dict[str, float]) -> WeightSyncError:
        """What to raise when sync.timeout_s is over."""
        try:
            await self._blame()
        except ReplicaFailed as failed:
            return failed
        mode = self._config.async_training.partial_rollout.mode
        return WeightSyncError(
            f"{what} took longer than sync.timeout_s = {self._config.sync.timeout_s:g} s; "
            f"finished phases: {', '.join(phases) or 'none'}. "
            + ("A push waits for the longest running generation: " if mode == "drain" else "")
            + "raise sync.timeout_s, or see the logs of the rollout workers"
        )

    async def _blame(self) -> None:
        """Raise ReplicaFailed of a member that is dead, hangs, or whose engine owes an answer."""
        for replica in {**self._connected, **self.members}:
            try:
                async with asyncio.timeout(_ANSWER_S):
                    unanswered = await self.on(replica, "unanswered")
            except TimeoutError:
                raise ReplicaFailed(replica, f"its process does not answer within {_ANSWER_S:g} s") from None
            if unanswered is not None:
                raise ReplicaFailed(replica, f"the engine does not answer {unanswered}")

    def _all_there(self, replicas: Sequence[int]) -> None:
        for replica in replicas:
            if replica not in self.members:
                raise ReplicaFailed(replica, "it died meanwhile")

    async def _all(self, replicas: Sequence[int], method: str, *arguments: Any) -> list[Any]:
        return await asyncio.gather(*(self.on(replica, method, *arguments) for replica in replicas))

    async def on(self, replica: int, method: str, *arguments: Any) -> Any:
        """What a member answers. Raises ReplicaFailed where it, or its engine, is dead."""
        self._all_there([replica])
        try:
            return await getattr(self.members[replica], method).remote(*arguments)
        except Exception as error:
            if is_worker_lost(error):
                raise ReplicaFailed(replica, str(unwrap_ray_error(error)).partition("\n")[0]) from error
            raise user_facing_error(error) from error

    # -- the canary ---------------------------------------------------------------------------------------------

    async def _check(self, replicas: list[int], *, replay: bool) -> Agreement:
        """Compare these replicas with the trainer on the probe. Raises WeightSyncMismatch.

        The trainer computes its side while the engines compute theirs, routing by itself. Where that is over the
        tolerance, or ``replay`` asks for it, it computes again with the engine's routing replayed, as in training: a
        tie between two experts that the two sides break differently is no alarm. In bfloat16 there are always some.
        """
        replay = replay or coarser_dtype(self._config) == "bfloat16"
        scored, native = await asyncio.gather(
            self._all(replicas, "score", self._probe),
            self._trainer("logprobs", self._probe, None),
        )
        limit = tolerance(self._config)
        reports = []
        for replica, scores in zip(replicas, scored, strict=True):
            logprobs = [score.logprobs for score in scores]
            routed_experts = None if scores[0].routed_experts is None else [score.routed_experts for score in scores]
            report = compare(logprobs, native)
            alike = agrees(report, limit)
            if routed_experts is not None and (replay or not alike):
                replayed = compare(logprobs, await self._trainer("logprobs", self._probe, routed_experts))
                if alike and not agrees(replayed, limit):
                    raise wrong_numbering(replica, replayed, await self._routing_verdict(routed_experts, first=False))
                report = replayed
            if not agrees(report, limit):
                raise mismatch(
                    self._config, replica, report, await self._layers_verdict(replica, report, routed_experts)
                )
            reports.append(report)
        return Agreement(
            report=max(reports, key=lambda report: report.max_abs_diff),
            unreached_experts=await self._count_unreached([score.routed_experts for score in scored[0]]),
        )

    async def _layers_verdict(self, replica: int, report: CanaryReport, routed_experts: list[ExpertIds] | None) -> str:
        """What tells the layers apart, on the worst sequence of the probe, with the engine's routing replayed."""
        index = report.sequence
        sequence = [self._probe[index]]
        rows = None if routed_experts is None else [routed_experts[index]]
        (engine,) = await self.on(replica, "fingerprints", sequence)
        if engine is not None:
            (trainer,) = await self._trainer("fingerprints", sequence, rows)
            return describe_layer_drift(engine, trainer, NOISE[coarser_dtype(self._config)])
        if routed_experts is not None:
            return await self._routing_verdict(routed_experts, first=True)
        return "the engine gives no fingerprints of its layers"

    async def _routing_verdict(self, routed_experts: list[ExpertIds], *, first: bool) -> str:
        """Where the experts that the engine chose differ from those that the trainer's own routers choose."""
        native = await self._trainer("native_routing", self._probe)
        return describe_routing_drift(routing_differences(routed_experts, native, self._model.moe_layers), first=first)

    async def _trainer(self, method: str, *arguments: Any) -> Any:
        """What a method of the trainer answers: every rank is called, for they compute together, and rank 0 counts."""
        first, *_ = await self._trainers.call(method, *arguments)
        return first

    # -- the probe ----------------------------------------------------------------------------------------------

    async def _count_unreached(self, routed: Sequence[ExpertIds | None]) -> int:
        """Experts that the probe does not reach any more. Training moves routers: where it has become more of them,
        one batch of candidates is tried, for the next push."""
        spec, known = self._model.routing_spec, self._given_up
        if spec is None or known is None or any(rows is None for rows in routed):
            return 0
        unreached = ~reached([rows for rows in routed if rows is not None], spec)
        if (unreached & ~known).any():
            await self._reach_experts(1)
        return int(unreached.sum())

    async def _reach_experts(self, batches: int) -> None:
        """Add sequences to the probe until the first member goes to every expert of every layer, or ``batches`` were
        tried."""
        spec = self._model.routing_spec
        if spec is None or not self._config.rollout.return_routed_experts:
            return
        known = reached(await self._routed(self._probe), spec)
        for _ in range(batches):
            if known.all():
                break
            tried = candidates(self._config.seed, self._batches, self._model.vocab_size, max_tokens=self._max_tokens)
            self._batches += 1
            routed = await self._routed(tried)
            chosen = greedy_cover(known, routed, spec)
            self._probe += [tried[index] for index in chosen]
            # Routers move as long as a run lasts; the probe must not grow with it. The sequences added first go first.
            surplus = len(self._probe) - SEQUENCES - BATCHES * CANDIDATES
            del self._probe[SEQUENCES : SEQUENCES + max(0, surplus)]
            known |= reached([routed[index] for index in chosen], spec)
        self._given_up = ~known
        if (unreached := int((~known).sum())) > self._told_unreached:
            self._told_unreached = unreached
            missing = [f"{self._model.moe_layers[layer]}:{expert}" for layer, expert in np.argwhere(~known)[:5]]
            log.warning(
                "the canary does not reach every expert, so it says nothing about the weights of the others",
                unreached=unreached,
                first_layer_and_expert=", ".join(missing),
            )

    async def _routed(self, sequences: list[Int32Array]) -> list[ExpertIds]:
        first = next(iter(self.members))
        return [score.routed_experts for score in await self.on(first, "score", sequences)]


@contextlib.contextmanager
def _timed(phases: dict[str, float], phase: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    phases[phase] = phases.get(phase, 0.0) + time.monotonic() - start
