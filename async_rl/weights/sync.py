"""One sync: pause, push, canary, resume. Knows both sides as actor handles only; owns no version.

    pause     every replica stops generating, as partial_rollout.mode says
    transfer  trainer rank 0 drives vLLM's start / update / finish on every replica, which stamps the new version
    canary    every replica scores a fixed probe under the weights it received, the trainer under those it sent
    resume    rollouts go on

A replica is resumed only after its canary agreed. On any failure the engines stay stopped: better no tokens than
tokens of unknown weights.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from async_rl.config import RunConfig
from async_rl.errors import WeightSyncError
from async_rl.metrics.summary import SyncRecord
from async_rl.types import ExpertIds, Float32Array, Int32Array
from async_rl.weights.canary import CanaryReport, check_canary, compare, tolerance


class WeightSync:
    """Drives syncs between ``trainers`` (all ranks) and ``rollout_workers`` (all replicas)."""

    def __init__(
        self, config: RunConfig, trainers: Sequence[Any], rollout_workers: Sequence[Any], probe: Sequence[Int32Array]
    ) -> None:
        self._config = config
        self._trainers = trainers
        self._workers = rollout_workers
        self._probe = list(probe)

    async def push(self, version: int) -> SyncRecord:
        """Bring every replica to ``version``; rollouts stand still until ``resume``.

        Raises WeightSyncMismatch when the canary disagrees, WeightSyncError when sync.timeout_s is over.
        """
        phases: dict[str, float] = {}
        try:
            async with asyncio.timeout(self._config.sync.timeout_s):
                await _timed(phases, "pause", *(w.pause.remote() for w in self._workers))
                await _timed(phases, "transfer", *(t.push.remote(version) for t in self._trainers))
                await _timed(phases, "wake", *(w.wake.remote() for w in self._workers))
                start = time.monotonic()
                report = await self.check()
                phases["canary"] = time.monotonic() - start
        except TimeoutError:
            mode = self._config.async_training.partial_rollout.mode
            raise WeightSyncError(
                f"push of version {version} took longer than sync.timeout_s = {self._config.sync.timeout_s:g} s; "
                f"finished phases: {', '.join(phases) or 'none'}. "
                + ("A push waits for the longest running generation: " if mode == "drain" else "")
                + "raise sync.timeout_s, or see the logs of the rollout workers"
            ) from None
        return SyncRecord(
            policy_version=version, seconds=sum(phases.values()), phases=phases, canary=report.max_abs_diff
        )

    async def resume(self) -> None:
        await asyncio.gather(*(w.resume.remote() for w in self._workers))

    async def check(self) -> CanaryReport:
        """Compare every replica with the trainer on the probe; the worst replica's report.

        The trainer computes its side while the engines compute theirs, routing by itself. Only where that is over the
        tolerance it computes again with the engine's routing replayed, as in training: a tie between two experts that
        the two sides break differently is no alarm.
        """
        scored, (expected, *_) = await asyncio.gather(
            asyncio.gather(*(worker.score.remote(self._probe) for worker in self._workers)),
            self._trainer_logprobs(None),
        )
        reports = []
        for replica, scores in enumerate(scored):
            logprobs = [score.logprobs for score in scores]
            counterpart = expected
            disagrees = compare(logprobs, expected).max_abs_diff > tolerance(self._config)
            if disagrees and scores[0].routed_experts is not None:
                counterpart, *_ = await self._trainer_logprobs([score.routed_experts for score in scores])
            reports.append(check_canary(self._config, replica, logprobs, counterpart))
        return max(reports, key=lambda report: report.max_abs_diff)

    async def _trainer_logprobs(self, routing: list[ExpertIds] | None) -> list[list[Float32Array]]:
        """The probe's log-probs under the trainer's weights, from every rank."""
        calls = (trainer.logprobs.remote(self._probe, routing) for trainer in self._trainers)
        result: list[list[Float32Array]] = await asyncio.gather(*calls)
        return result


async def _timed(phases: dict[str, float], phase: str, *calls: Any) -> None:
    start = time.monotonic()
    await asyncio.gather(*calls)
    phases[phase] = time.monotonic() - start
