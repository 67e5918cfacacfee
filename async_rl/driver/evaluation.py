"""Greedy evaluation of a run's current weights on its held-out prompts, spread over the replicas.

Within training it runs beside the rollouts (eval.beside_rollouts): requests of both share the engines, and what must
not change the weights meanwhile, a weight sync or a pause, waits for ``finished``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

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
        self._settings = config.eval
        self._prompts = prompts
        self._sync = sync
        self._replicas = replicas
        self._monitor = monitor
        self._recorder = recorder
        self._running: asyncio.Task[None] | None = None

    def is_due(self, version: int) -> bool:
        """Return whether eval.every asks for an evaluation of this version."""
        return bool(self._settings.every) and version % self._settings.every == 0

    def pauses(self, version: int) -> bool:
        """Return whether this version is evaluated before rollouts resume."""
        return self.is_due(version) and not self._settings.beside_rollouts

    async def while_paused(self, version: int, step: int) -> None:
        """Evaluate a version that is due, before rollouts resume, unless it is evaluated beside them."""
        if self.pauses(version):
            await self.evaluate(version, step)

    def beside_rollouts(self, version: int) -> None:
        """Begin to evaluate a version that is due, now that rollouts have resumed, unless that was done."""
        if self.is_due(version) and self._settings.beside_rollouts:
            self._running = asyncio.ensure_future(self._evaluate(version))

    async def finished(self, step: int) -> None:
        """Return once no evaluation is under way. Raises what it raised."""
        if (running := self._running) is not None:
            with self._monitor.phase("evaluation", step):
                await asyncio.wait([running])
            self._running = None
            if not running.cancelled():
                running.result()

    async def evaluate(self, version: int, step: int) -> None:
        """Evaluate the weights of ``version`` after training step ``step`` and record the result, once per version."""
        await self.finished(step)
        with self._monitor.phase("evaluation", step):
            await self._evaluate(version)

    def cancel(self) -> None:
        """End an evaluation that is under way, without a result."""
        if self._running is not None:
            self._running.cancel()

    async def _evaluate(self, version: int) -> None:
        """Have each replica answer its share of the prompts; the share of one that fails goes to the others."""
        left, results = list(self._prompts), []
        while left and self._sync.members and self._recorder.evaluated != version:
            replicas = list(self._sync.members)
            shares = {replica: left[index :: len(replicas)] for index, replica in enumerate(replicas)}
            asked = {replica: share for replica, share in shares.items() if share}
            answers = await asyncio.gather(*(self._on(*each) for each in asked.items()))
            results += [answer for answer in answers if answer is not None]
            lost = (share for share, answer in zip(asked.values(), answers, strict=True) if answer is None)
            left = [prompt for share in lost for prompt in share]
        if results and not left:
            self._recorder.evaluation(results, version)

    async def _on(self, replica: int, prompts: Sequence[Prompt]) -> EvalResult | None:
        """Return a replica's result on these prompts; None if it failed."""
        try:
            return await self._sync.on(replica, lambda worker: worker.evaluate(prompts))
        except ReplicaFailed as error:
            self._replicas.evict(error)
            return None
