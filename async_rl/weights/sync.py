"""One sync: pause, push, canary, resume. Knows both sides as actor handles only; owns no version.

    pause     every replica stops generating, as partial_rollout.mode says
    transfer  trainer rank 0 drives vLLM's start / update / finish on every replica, which stamps the new version
    canary    every replica scores a fixed probe under the weights it received, the trainer under those it sent
    resume    rollouts go on

A replica is resumed only after its canary agreed. Where it does not, the push is made once more; then the layers are
looked into, and the run ends. On any failure the engines stay stopped: better no tokens than tokens of unknown weights.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

from async_rl.config import RunConfig
from async_rl.errors import WeightSyncError, WeightSyncMismatch
from async_rl.metrics.summary import SyncRecord
from async_rl.model_config import ModelConfig
from async_rl.types import ExpertIds, Int32Array
from async_rl.weights.canary import (
    BATCHES,
    CanaryReport,
    agrees,
    candidates,
    coarser_dtype,
    compare,
    make_probe,
    mismatch,
    reached,
    tolerance,
    worth_adding,
    wrong_numbering,
)
from async_rl.weights.fingerprint import NOISE, routing_differences, say_layers, say_routing

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Agreement:
    """The canary's outcome where every replica agreed: the worst report, and experts that the probe does not reach."""

    report: CanaryReport
    unreached_experts: int


class WeightSync:
    """Drives syncs between ``trainers`` (all ranks) and ``rollout_workers`` (all replicas)."""

    def __init__(
        self, config: RunConfig, model: ModelConfig, trainers: Sequence[Any], rollout_workers: Sequence[Any]
    ) -> None:
        self._config = config
        self._model = model
        self._trainers = trainers
        self._workers = rollout_workers
        self._max_tokens = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        self._probe = make_probe(config.seed, model.vocab_size, max_tokens=self._max_tokens)
        self._batches = 0  # of candidates tried
        self._given_up: npt.NDArray[np.bool_] | None = None  # bool[L, E]: experts that no candidate reached

    async def begin(self) -> Agreement:
        """Before anything is sampled: complete the probe, and compare both sides on the weights they loaded.

        Under R3 also with the engine's routing replayed, so that routing which means something else to the trainer
        (other expert ids, other layers) ends the run here. Raises WeightSyncMismatch, InvalidTrajectory for routing
        that cannot be of this model.
        """
        await self._reach_experts(BATCHES)
        return await self._check(replay=self._config.trainer.router_replay == "R3")

    async def push(self, version: int) -> SyncRecord:
        """Bring every replica to ``version``; rollouts stand still until ``resume``.

        Raises WeightSyncMismatch when the canary disagrees twice, WeightSyncError when sync.timeout_s is over.
        """
        phases: dict[str, float] = {}
        retries = 0
        try:
            async with asyncio.timeout(self._config.sync.timeout_s):
                try:
                    agreement = await self._push_once(version, phases)
                except WeightSyncMismatch as error:
                    if self._config.async_training.partial_rollout.mode == "in_flight":
                        raise  # frozen generations went on meanwhile, with weights that nobody knows
                    log.warning("the canary disagrees; pushing once more", version=version, reason=str(error))
                    retries = 1
                    agreement = await self._push_once(version, phases)
        except TimeoutError:
            mode = self._config.async_training.partial_rollout.mode
            raise WeightSyncError(
                f"push of version {version} took longer than sync.timeout_s = {self._config.sync.timeout_s:g} s; "
                f"finished phases: {', '.join(phases) or 'none'}. "
                + ("A push waits for the longest running generation: " if mode == "drain" else "")
                + "raise sync.timeout_s, or see the logs of the rollout workers"
            ) from None
        return SyncRecord(
            policy_version=version,
            seconds=sum(phases.values()),
            phases=phases,
            canary=agreement.report.max_abs_diff,
            unreached_experts=agreement.unreached_experts,
            retries=retries,
        )

    async def resume(self) -> None:
        await asyncio.gather(*(w.resume.remote() for w in self._workers))

    async def _push_once(self, version: int, phases: dict[str, float]) -> Agreement:
        """Adds to the seconds of each phase."""
        await _timed(phases, "pause", *(w.pause.remote() for w in self._workers))
        await _timed(phases, "transfer", *(t.push.remote(version) for t in self._trainers))
        await _timed(phases, "wake", *(w.wake.remote() for w in self._workers))
        start = time.monotonic()
        agreement = await self._check(replay=False)
        phases["canary"] = phases.get("canary", 0.0) + time.monotonic() - start
        return agreement

    # -- the canary ---------------------------------------------------------------------------------------------

    async def _check(self, *, replay: bool) -> Agreement:
        """Compare every replica with the trainer on the probe. Raises WeightSyncMismatch.

        The trainer computes its side while the engines compute theirs, routing by itself. Where that is over the
        tolerance, or ``replay`` asks for it, it computes again with the engine's routing replayed, as in training: a
        tie between two experts that the two sides break differently is no alarm. In bfloat16 there are always some.
        """
        replay = replay or coarser_dtype(self._config) == "bfloat16"
        scored, native = await asyncio.gather(
            asyncio.gather(*(worker.score.remote(self._probe) for worker in self._workers)),
            self._trainer("logprobs", self._probe, None),
        )
        limit = tolerance(self._config)
        reports = []
        for replica, scores in enumerate(scored):
            logprobs = [score.logprobs for score in scores]
            routing = None if scores[0].routed_experts is None else [score.routed_experts for score in scores]
            report = compare(logprobs, native)
            alike = agrees(report, limit)
            if routing is not None and (replay or not alike):
                replayed = compare(logprobs, await self._trainer("logprobs", self._probe, routing))
                if alike and not agrees(replayed, limit):
                    raise wrong_numbering(replica, replayed, await self._routing_verdict(routing, first=False))
                report = replayed
            if not agrees(report, limit):
                raise mismatch(self._config, replica, report, await self._layers_verdict(replica, report, routing))
            reports.append(report)
        return Agreement(
            report=max(reports, key=lambda report: report.max_abs_diff),
            unreached_experts=await self._count_unreached([score.routed_experts for score in scored[0]]),
        )

    async def _layers_verdict(self, replica: int, report: CanaryReport, routing: list[ExpertIds] | None) -> str:
        """What tells the layers apart, on the worst sequence of the probe, with the engine's routing replayed."""
        index = report.sequence
        sequence = [self._probe[index]]
        rows = None if routing is None else [routing[index]]
        (engine,) = await self._workers[replica].fingerprints.remote(sequence)
        if engine is not None:
            (trainer,) = await self._trainer("fingerprints", sequence, rows)
            return say_layers(engine, trainer, NOISE[coarser_dtype(self._config)])
        if routing is not None:
            return await self._routing_verdict(routing, first=True)
        return "the engine gives no fingerprints of its layers"

    async def _routing_verdict(self, routing: list[ExpertIds], *, first: bool) -> str:
        """Where the experts that the engine chose differ from those that the trainer's own routers choose."""
        native = await self._trainer("native_routing", self._probe)
        return say_routing(routing_differences(routing, native, self._model.moe_layers), first=first)

    async def _trainer(self, method: str, *arguments: Any) -> Any:
        """What a method of the trainer answers: every rank is called, for they compute together, and rank 0 counts."""
        first, *_ = await asyncio.gather(*(getattr(rank, method).remote(*arguments) for rank in self._trainers))
        return first

    # -- the probe ----------------------------------------------------------------------------------------------

    async def _count_unreached(self, routed: Sequence[ExpertIds | None]) -> int:
        """Experts that the probe does not reach any more. Training moves routers: where it has become more of them,
        one batch of candidates is tried, for the next push."""
        spec, known = self._model.routing, self._given_up
        if spec is None or known is None or any(rows is None for rows in routed):
            return 0
        unreached = ~reached([rows for rows in routed if rows is not None], spec)
        if (unreached & ~known).any():
            await self._reach_experts(1)
        return int(unreached.sum())

    async def _reach_experts(self, batches: int) -> None:
        """Add sequences to the probe until replica 0 goes to every expert of every layer, or ``batches`` were tried."""
        spec = self._model.routing
        if spec is None or not self._config.rollout.return_routed_experts:
            return
        known = reached(await self._routed(self._probe), spec)
        for _ in range(batches):
            if known.all():
                break
            tried = candidates(self._config.seed, self._batches, self._model.vocab_size, max_tokens=self._max_tokens)
            self._batches += 1
            routed = await self._routed(tried)
            chosen = worth_adding(known, routed, spec)
            self._probe += [tried[index] for index in chosen]
            known |= reached([routed[index] for index in chosen], spec)
        self._given_up = ~known
        if not known.all():
            missing = [f"{self._model.moe_layers[layer]}:{expert}" for layer, expert in np.argwhere(~known)[:5]]
            log.warning(
                "the canary does not reach every expert, so it says nothing about the weights of the others",
                unreached=int((~known).sum()),
                first_layer_and_expert=", ".join(missing),
            )

    async def _routed(self, sequences: list[Int32Array]) -> list[ExpertIds]:
        return [score.routed_experts for score in await self._workers[0].score.remote(sequences)]


async def _timed(phases: dict[str, float], phase: str, *calls: Any) -> None:
    start = time.monotonic()
    await asyncio.gather(*calls)
    phases[phase] = phases.get(phase, 0.0) + time.monotonic() - start
