"""RolloutActor: RolloutWorker in a process of its own, with the real engine, tokenizer, reward, logs and metrics.

Made a Ray actor by ``driver.actors``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from async_rl.config.schema import RunConfig
from async_rl.data.tokenizer import load_tokenizer
from async_rl.metrics.exporter import serve_metrics
from async_rl.metrics.timeline import Timeline
from async_rl.queue.client import open_groups
from async_rl.queue.handover import Outbox
from async_rl.rollout.worker import RolloutWorker, WorkerStats
from async_rl.runtime import logs
from async_rl.runtime.process import mark_semaphores


class RolloutActor(RolloutWorker):
    """RolloutWorker in a process of its own, with the real engine, tokenizer, reward, logs and metrics."""

    def __init__(self, config: RunConfig, replica: int, queue: Any, cores: tuple[int, ...] | None) -> None:
        from async_rl.rollout.engine.loader import load_engine
        from async_rl.rollout.environments.turns import Environment
        from async_rl.rollout.rewards.runner import RewardRunner

        logs.configure(config.run_dir, f"rollout-{replica}", console=False)
        mark_semaphores()  # vLLM's
        tokenizer = load_tokenizer(config)
        engine = load_engine(config.rollout.engine)(config, replica, cores=cores)
        multi_turn = config.rollout.environment.function is not None
        environment = Environment(config.rollout.environment, tokenizer) if multi_turn else None
        self._outbox = Outbox(queue, open_groups(config, f"rollout-{replica}"))
        timeline = Timeline(config.run_dir, f"rollout-{replica}", config.metrics.timeline_bytes)
        rewards = RewardRunner(config.reward)
        super().__init__(config, replica, self._outbox, engine, tokenizer, rewards, environment, timeline)
        self._metrics = serve_metrics(config, "rollout", replica, order=1 + replica)
        self._metrics.include("vllm:")

    async def groups(self) -> AsyncIterator[Any]:
        """The stream of what ``run`` finishes, message and meta in turn: for the driver, which hands it in."""
        async for item in self._outbox.stream(self.run()):
            yield item

    async def accepted(self, group_id: str) -> None:
        """The queue has a group of the stream."""
        self._outbox.accepted(group_id)

    def stats(self) -> WorkerStats:
        """The counters; the driver asks every second, and /metrics shows what it was told."""
        stats = super().stats()
        self._metrics.set("policy_version", stats.version)
        self._metrics.count_to("generated_tokens_total", stats.generated_tokens)
        self._metrics.count_to("resumed_prefill_tokens_total", stats.resumed_prefill_tokens)
        self._metrics.count_to("rollout_paused_seconds_total", stats.paused_s)
        self._metrics.count_to("groups_cut_total", stats.cut_groups)
        return stats

    async def shutdown(self) -> None:
        self._metrics.close()
        await super().shutdown()
