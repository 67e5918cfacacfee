"""Greedy evaluation of a run's current weights on its held-out prompts, spread over the replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence

from async_rl.config.schema import RunConfig
from async_rl.driver.monitor import Monitor
from async_rl.driver.recorder import Recorder
from async_rl.driver.replicas import ReplicaSupervisor
from async_rl.errors import ReplicaFailed
from async_rl.rollout.evaluation import EvalResult
from async_rl.types import Prompt
from async_rl.weights.sync import WeightSync


class Evaluator:
    """Evaluates on ``prompts``; without any it does nothing."""

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[Prompt],
        *,
        sync: WeightSync,
        replicas: ReplicaSupervisor,
        monitor: Monitor,
        recorder: Recorder,
    ) -> None:
        self._every = config.eval.every
        self._prompts = prompts
        self._sync = sync
        self._replicas = replicas
        self._monitor = monitor
        self._recorder = recorder

    async def evaluate_if_due(self, version: int, step: int) -> None:
        """Evaluate at the versions that eval.every says."""
        if self._every and version % self._every == 0:
            await self.evaluate(version, step)

    async def evaluate(self, version: int, step: int) -> None:
        """Evaluate the weights of ``version`` after training step ``step`` and record the result, once per version.

        If a replica fails, evaluation begins again with the others.
        """
        while self._prompts and self._sync.members and self._recorder.evaluated != version:
            replicas = list(self._sync.members)
            shares = {replica: self._prompts[index :: len(replicas)] for index, replica in enumerate(replicas)}
            try:
                with self._monitor.phase("evaluation", step):
                    results = await asyncio.gather(
                        *(self._on(replica, share) for replica, share in shares.items() if share)
                    )
            except ReplicaFailed as error:
                self._replicas.evict(error)
                continue
            self._recorder.evaluation(results, version)

    def _on(self, replica: int, prompts: Sequence[Prompt]) -> Awaitable[EvalResult]:
        return self._sync.on(replica, lambda worker: worker.evaluate(prompts))
