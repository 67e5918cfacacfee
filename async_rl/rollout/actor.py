"""The actor of one replica: what the driver and vLLM's weight-transfer client call on it.

``RolloutReplica`` ties an engine to its worker and takes them through a weight sync; it needs no Ray. ``RolloutActor``
is that with the parts of a real run; ``driver.actors`` makes it a Ray actor. The names of the public methods are called
from other processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import structlog

from async_rl.config.schema import RunConfig
from async_rl.data.tokenizer import load_tokenizer
from async_rl.metrics.exporter import serve_metrics
from async_rl.metrics.timeline import Timeline
from async_rl.queue.client import QueueClient, open_groups
from async_rl.queue.handover import Outbox
from async_rl.rollout.engine.interface import (
    HasMetrics,
    PauseMode,
    RolloutEngine,
    Score,
    ScoresOnResume,
    WeightUpdate,
)
from async_rl.rollout.environments.turns import Environment, load_environments
from async_rl.rollout.evaluation import EvalProblem, EvalResult, evaluate
from async_rl.rollout.gate import Gate
from async_rl.rollout.moments import Moment, SavedGroup, Source, load
from async_rl.rollout.parts import EngineParts
from async_rl.rollout.responses import Responses
from async_rl.rollout.rewards.runner import RewardRunner
from async_rl.rollout.routing_policies import check_probe
from async_rl.rollout.stats import WorkerStats, worker_id
from async_rl.rollout.worker import RolloutWorker
from async_rl.runtime import logs, spool
from async_rl.runtime.cores import CoreShare
from async_rl.runtime.numa import own_cores
from async_rl.runtime.process import mark_semaphores, remove_semaphores
from async_rl.types import ExpertIds, Float32Array, Int32Array
from async_rl.weights.buckets import checksum
from async_rl.weights.on_host import FetchesWeights, for_hosts

if TYPE_CHECKING:
    from async_rl.weights.buckets import Publication
    from async_rl.weights.shm_file import Announcement

log = structlog.get_logger(__name__)

# Routed experts of a probe up to this size are sent with its scores, as Ray sends what is small within an answer.
_SENT_BYTES = 64 * 2**10

# What the engine does with calls under way at a weight sync, by async_training.partial_rollout.mode.
PAUSE_MODE: dict[str, PauseMode] = {"resume": "abort", "in_flight": "keep", "drain": "wait"}


class RolloutReplica:
    """One engine and its worker. The caller makes the engine, so that tests can bring their own."""

    def __init__(
        self,
        config: RunConfig,
        replica: int,
        queue: QueueClient,
        engine: RolloutEngine,
        tokenizer: Any,
        rewards: RewardRunner,
        environments: Mapping[str, Environment] = MappingProxyType({}),
        timeline: Timeline | None = None,
    ) -> None:
        self._config = config
        self._replica = replica
        self._engine = engine
        self._gate = Gate()
        self._responses = Responses(config, engine, tokenizer, rewards, environments, config.rollout.engine_of(replica))
        self._worker = RolloutWorker(config, replica, queue, engine, self._gate, self._responses, timeline, tokenizer)
        self._timeline = timeline
        self._pending_engine_call: str | None = None  # of a weight sync, and not answered yet
        self._frozen: tuple[int, Moment] | None = None  # training step and groups of a checkpoint
        self._writing = asyncio.Lock()
        self._probed: list[ExpertIds] = []  # routed experts of the canary's probe

    # -- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine. Raises EngineError when it does not come up."""
        began = time.monotonic()
        await self._engine.start()
        log.info("engine_ready", seconds=round(time.monotonic() - began, 1))

    async def run(self) -> None:
        """Sample until ``stop``; see ``RolloutWorker.run``."""
        await self._worker.run()

    async def stop(self) -> None:
        """Begin no more work and end what is under way; see ``RolloutWorker.stop``."""
        await self._worker.stop()

    async def shutdown(self) -> None:
        """End the work, and the engine with its processes, whatever they are doing."""
        await self._worker.close()
        await self._engine.shutdown()
        if self._timeline is not None:
            self._timeline.close()

    # -- groups in flight ---------------------------------------------------------------------------------------

    async def freeze(self, step: int) -> None:
        """Keep the groups in flight as they are now, for the checkpoint of ``step``, in place of earlier ones.

        The replica must be paused with ``end_calls``.
        """
        await self._gate.wait_quiet()
        self._frozen = step, self._worker.moment()

    async def write_in_flight(self, step: int, folder: Path) -> dict[str, SavedGroup]:
        """Write what was kept for ``step`` into ``folder``; return it by group id. Raises OSError."""
        kept, self._frozen = self._frozen, None
        if kept is None or kept[0] != step:
            raise RuntimeError(f"freeze({step}) must be called before write_in_flight({step})")
        async with self._writing:  # of an earlier checkpoint, which nothing waits for if its trainer died
            return await kept[1].write(folder, worker_id(self._replica))

    async def adopt(self, *sources: Source) -> list[str]:
        """Take messages of groups in flight of other replicas; see ``RolloutWorker.adopt``."""
        groups = await asyncio.to_thread(load, self._config, self._responses.stop_token_ids, sources)
        return self._worker.adopt(groups)

    def stats(self) -> WorkerStats:
        """Return the worker's counters."""
        return self._worker.stats()

    # -- pause and resume ---------------------------------------------------------------------------------------

    async def pause(self, *, end_calls: bool = False) -> None:
        """Begin no engine call, and stop the engine as partial_rollout.mode says.

        ``end_calls`` ends calls that "in_flight" would keep, as "resume" does: ``freeze`` then finds their tokens.
        What a call has sampled may reach the worker only after this returns: weights are loaded meanwhile.
        """
        self._gate.close()
        mode = PAUSE_MODE[self._config.async_training.partial_rollout.mode]
        if end_calls and mode == "keep":
            mode = "abort"
        if mode == "wait":
            # The engine computes while it drains: that time is generation, not pause.
            await self._gate.wait_quiet()
        self._gate.start_pause()
        with self._waiting_for("pause"):
            await self._engine.pause(mode)

    async def wake(self) -> None:
        """Let the engine compute again, for the canary and for evaluation; rollouts still wait."""
        with self._waiting_for("resume"):
            await self._engine.resume()

    async def resume(self) -> None:
        """Resume interrupted generations, and take new work."""
        paused = self._gate.open()
        if self._timeline is not None and paused:
            self._timeline.add("pause", paused)

    async def unanswered(self) -> str | None:
        """Return the engine call of a weight sync that has no answer yet; None if there is none.

        Raises EngineDied.
        """
        self._engine.check_alive()
        return self._pending_engine_call

    @contextlib.contextmanager
    def _waiting_for(self, engine_call: str) -> Iterator[None]:
        self._pending_engine_call = engine_call
        try:
            yield
        finally:
            self._pending_engine_call = None

    # -- weight transfer ----------------------------------------------------------------------------------------

    async def receive(self, update: Mapping[str, Any], version: int) -> None:
        """Take weights that the trainer has staged, as policy version ``version``; the replica must be paused.

        The same calls as those below, in one instead of four from another process. Raises WeightSyncError, EngineDied.
        """
        await self.start_weight_update()
        await self.update_weights(WeightUpdate(dict(update)))
        await self.finish_weight_update()
        await self.update_weight_version(str(version))

    # As vLLM's RayVLLMWeightSyncClient calls it.

    async def init_weight_transfer_engine(self, request: Any) -> None:
        """Agree with the sender on how weights travel."""
        with self._waiting_for("init_weight_transfer_engine"):
            await self._engine.init_weight_transfer_engine(request)

    async def start_weight_update(self) -> None:
        """Prepare the engine for new weights."""
        with self._waiting_for("start_weight_update"):
            await self._engine.start_weight_update()

    async def update_weights(self, request: Any) -> None:
        """Receive weights."""
        with self._waiting_for("update_weights"):
            await self._engine.update_weights(request)

    async def finish_weight_update(self) -> None:
        """Finish what ``start_weight_update`` began."""
        with self._waiting_for("finish_weight_update"):
            await self._engine.finish_weight_update()

    async def update_weight_version(self, version: str) -> None:
        """Set the policy version that the engine stamps on tokens from now on."""
        with self._waiting_for("update_weight_version"):
            await self._engine.update_weight_version(version)
        logs.bind(version=self._engine.version)

    # -- canary and evaluation ----------------------------------------------------------------------------------

    async def score(self, sequences: Sequence[Int32Array]) -> list[Score]:
        """Score fixed token sequences under the engine's weights, for the canary.

        Raises InvalidTrajectory when their routed experts cannot be those of the model.
        """
        with self._waiting_for("score"):
            scores = await self._engine.score(list(sequences))
        return self._checked(scores, sequences)

    async def wake_and_score(self, sequences: Sequence[Int32Array]) -> list[Score]:
        """Do ``wake`` and then ``score``, faster if the engine has a method for both.

        Where the routed experts are large, they stay here for ``probed_routing``, with their checksums in the scores:
        those of all replicas are about the same.
        """
        if isinstance(self._engine, ScoresOnResume):
            with self._waiting_for("score"):
                scores = await self._engine.resume_and_score(list(sequences))
            scores = self._checked(scores, sequences)
        else:
            await self.wake()
            scores = await self.score(sequences)
        found = (score.routed_experts for score in scores if score.routed_experts is not None)
        rows = [cast(ExpertIds, np.ascontiguousarray(each)) for each in found]
        self._probed = rows if sum(each.nbytes for each in rows) > _SENT_BYTES else []
        if not self._probed:
            return scores
        kept = zip(scores, self._probed, strict=True)
        return [Score(score.logprobs, None, left_behind=checksum(each.view(np.uint8))) for score, each in kept]

    async def probed_routing(self) -> list[ExpertIds]:
        """Return the routed experts of each sequence that the last ``wake_and_score`` left behind."""
        return self._probed

    def _checked(self, scores: list[Score], sequences: Sequence[Int32Array]) -> list[Score]:
        routed_experts = [score.routed_experts for score in scores if score.routed_experts is not None]
        if self._engine.routing_spec is not None and scores:
            check_probe(routed_experts, [len(sequence) for sequence in sequences], self._engine.routing_spec)
        return scores

    async def fingerprints(self, sequences: Sequence[Int32Array]) -> list[Float32Array | None]:
        """Fingerprint the engine's residual stream layer by layer, to find the layer at fault after a mismatch."""
        return await self._engine.fingerprints(list(sequences))

    async def evaluate(self, problems: Sequence[EvalProblem]) -> EvalResult:
        """Answer and score ``problems``. The weights must not change meanwhile."""
        at_once = self._config.rollout.evaluated_at_once
        return await evaluate(problems, self._engine, self._responses, self._worker.agents, at_once=at_once)


class RolloutActor(FetchesWeights, RolloutReplica):
    """A replica in a process of its own, with a real engine, tokenizer, reward, logs and metrics."""

    def __init__(
        self, config: RunConfig, replica: int, queue: Any, cores: CoreShare | None, parts: Sequence[Any] = ()
    ) -> None:
        """Make the replica. ``parts`` are the actors of its engine's other hosts; see ``rollout.parts``."""
        from async_rl.rollout.engine.loader import load_engine

        name = worker_id(replica)
        self._paths = spool.on_this_host(config)
        config = self._paths.config
        logs.configure(config.run_dir, name, console=False)
        mark_semaphores(name)  # those of vLLM
        tokenizer = load_tokenizer(config)
        engine = load_engine(config.rollout.engine_of(replica))(
            config, replica, cores=own_cores(cores, config.resources)
        )
        environments = load_environments(config, tokenizer)
        self._outbox = Outbox(queue, open_groups(config, name))
        timeline = Timeline(config.run_dir, name, config.metrics.timeline_bytes)
        rewards = RewardRunner(config.reward)
        self._rewards = rewards
        self._environments = environments.values()
        super().__init__(config, replica, self._outbox, engine, tokenizer, rewards, environments, timeline)
        self._metrics = serve_metrics(config, "rollout", replica, order=1 + replica)
        self._metrics.include("vllm:")
        if isinstance(engine, HasMetrics):
            self._metrics.include_from(engine.metrics)
        self._parts = EngineParts(config, parts)
        self._hosts: list[str] = []  # that the engine is on

    async def start(self) -> None:
        """Start the engine; see ``RolloutReplica.start``."""
        with self._paths.errors_name_the_run_folder():
            self._parts.start(self._engine)
            await super().start()

    async def write_in_flight(self, step: int, folder: Path) -> dict[str, SavedGroup]:
        """Write what was kept for ``step`` to what this host has for ``folder``; see ``RolloutReplica``."""
        return await super().write_in_flight(step, self._paths.here(folder))

    async def groups(self) -> AsyncIterator[Any]:
        """Run the worker, and stream message and meta of each finished group to the driver, which publishes them."""
        async for item in self._outbox.stream(self.run()):
            yield item

    async def salvage(self) -> AsyncIterator[Any]:
        """Stream id and message of each group in flight, in turn, because the engine has died.

        What a stream has yielded belongs to the caller, and survives this process.
        """
        async for group_id, message in self._worker.moment().messages():
            yield group_id
            yield message

    async def read_message(self, path: Path) -> tuple[npt.NDArray[np.uint8], int]:
        """Return the message of a finished group in a checkpoint's file, and its size. Raises OSError."""
        message = await asyncio.to_thread(np.fromfile, path, dtype=np.uint8)
        return message, message.nbytes

    async def accepted(self, group_id: str) -> None:
        """Note that the queue has a group of the stream."""
        self._outbox.accepted(group_id)

    async def unanswered(self) -> str | None:
        """Return the engine call without an answer; see ``RolloutReplica``. A part that is gone is a death, too."""
        await self._parts.check()
        return await super().unanswered()

    async def weights_hosts(self) -> list[tuple[str, Any]]:
        """Return the ids of the hosts that the engine is on, this one first, each with the actor of its part there.

        That of this host is None: it is this actor itself.
        """
        self._hosts = [await self.weights_host(), *await self._parts.hosts()]
        return list(zip(self._hosts, [None, *self._parts.actors], strict=True))

    async def fetch_weights(
        self, publication: Publication, host: int, hosts: int, timeout_s: float, others: Sequence[Any]
    ) -> Announcement:
        with self._waiting_for("fetch_weights"):
            return await super().fetch_weights(publication, host, hosts, timeout_s, others)

    async def update_weights(self, request: Any) -> None:
        """Receive weights, with sync.backend object_store from the files of the engine's hosts."""
        if "by_host" in request.update_info:
            files = request.update_info["by_host"]
            request = dataclasses.replace(request, update_info=for_hosts(files, self._hosts))
        await super().update_weights(request)

    def stats(self) -> WorkerStats:
        """Return the counters, and publish them on /metrics. The driver calls this every second."""
        stats = super().stats()
        self._metrics.set("policy_version", stats.version)
        self._metrics.count_to("generated_tokens_total", stats.generated_tokens)
        self._metrics.count_to("resumed_prefill_tokens_total", stats.resumed_prefill_tokens)
        self._metrics.count_to("rollout_paused_seconds_total", stats.paused_s)
        self._metrics.count_to("groups_cut_total", stats.cut_groups)
        self._metrics.count_to("reward_retries_total", self._rewards.retries)
        killed = {"reward": self._rewards.killed, "environment": sum(each.killed for each in self._environments)}
        for function, calls in killed.items():
            self._metrics.count_to("user_calls_killed_total", calls, function=function)
        for how, tokens in self._worker.calls.context_tokens.items():
            self._metrics.count_to("context_tokens_total", tokens, how=how)
        for part in (self._worker.agents, self._worker.making):
            if part is not None:
                part.publish(self._metrics)
        return stats

    async def shutdown(self) -> None:
        """Stop serving metrics, then end the replica."""
        self._metrics.close()
        await self.free_weights()
        await super().shutdown()
        await self._parts.shutdown()
        remove_semaphores(worker_id(self._replica))  # the engine's; hosts that joined have no supervisor
