"""RolloutWorker: keeps one engine full and publishes complete groups.

It samples: it takes tickets, and completes and scores their responses. ``calls`` makes the engine calls, ``partial``
decides what a resumed one sends, ``filters`` which groups are not published, the queue's broker what may be issued, and
``actor`` when the gate before the engine is open. It knows neither the trainer nor Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeVar

import structlog

from async_rl.config.schema import RunConfig
from async_rl.metrics.timeline import Timeline
from async_rl.queue.broker import TIMEOUT
from async_rl.queue.client import QueueClient
from async_rl.rollout.agents import Agents
from async_rl.rollout.aside import aside
from async_rl.rollout.calls import EngineCalls, routing_bytes
from async_rl.rollout.capacity import Capacity
from async_rl.rollout.deadline import wait_in_time
from async_rl.rollout.engine.interface import RolloutEngine
from async_rl.rollout.engine.liveness import watch_engine
from async_rl.rollout.gate import Gate
from async_rl.rollout.in_flight import InFlight
from async_rl.rollout.making import AgentCapacity
from async_rl.rollout.moments import Moment
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.responses import COST_THEIR_GROUP, Make, Responses, failure_reason
from async_rl.rollout.stats import WorkerStats, worker_id
from async_rl.types import Group, RolloutRecord

log = structlog.get_logger(__name__)

_T = TypeVar("_T")


class RolloutWorker:
    """Samples the groups that one engine works on."""

    def __init__(
        self,
        config: RunConfig,
        replica: int,
        queue: QueueClient,
        engine: RolloutEngine,
        gate: Gate,
        responses: Responses,
        timeline: Timeline | None = None,
        tokenizer: Any = None,
    ) -> None:
        self._config = config
        self._name = worker_id(replica)
        self._queue = queue
        self._engine = engine
        self._gate = gate
        self._responses = responses
        self._stats = WorkerStats(replica)
        self.calls = EngineCalls(engine, gate, responses, self._stats, timeline)
        self.agents = Agents(config, responses, self.calls, gate, tokenizer)
        sections, sample = config.rollout.agent_sections, self.calls.sample
        self.making = AgentCapacity(config.rollout, sample, engine) if sections else None
        self._capacity = self.making or Capacity(config.rollout, sample)
        self._in_flight: dict[str, InFlight] = {}  # groups taken and not yet published
        self._adopted: list[InFlight] = []  # groups of another worker, which ``run`` begins with
        self._work: asyncio.Task[None] | None = None
        self._stopping = False

    # -- life ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Sample until ``stop``, or until the dataset is exhausted. Raises what a group raised, and EngineDied."""
        self._work = asyncio.create_task(self._keep_engine_full())
        alive = watch_engine(self._config, self._name, self._engine, self._gate)
        watches = [asyncio.create_task(watch) for watch in (alive, self._capacity.watch())]
        try:
            await asyncio.wait({self._work, *watches}, return_when=asyncio.FIRST_COMPLETED)
            for watch in watches:
                if watch.done() and not self._stopping:
                    watch.result()
            await self._work
        except asyncio.CancelledError:
            if not self._stopping:
                raise
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        finally:
            for task in (self._work, *watches):
                task.cancel()

    async def _keep_engine_full(self) -> None:
        await self.agents.start()
        async with asyncio.TaskGroup() as groups:

            def begin(group: InFlight) -> None:
                self._in_flight[group.group_id] = group
                self._capacity.begin_group(group.group_id)
                groups.create_task(self._sample_and_publish(group))

            for group in self._adopted:
                begin(group)
            self._adopted = []
            while True:
                tickets = await self._queue.take(self._name, await self._capacity.wait())
                if not tickets:
                    return  # the dataset is exhausted or the queue is closed; groups in flight finish first
                for ticket in tickets:
                    begin(InFlight.begin(ticket, self._config.rollout.n))

    async def stop(self) -> None:
        """Begin no more work and abort all calls. Partial rollouts are dropped; their groups stay outstanding.

        The engine can still evaluate.
        """
        self._stopping = True
        self._gate.close()
        await self._engine.pause("abort")
        await self._gate.wait_quiet()
        self._cancel_work()
        await self._engine.resume()

    async def close(self) -> None:
        """End all work now, without a word to the engine."""
        self._stopping = True
        self._gate.close()
        self._cancel_work()
        self._responses.close()
        await self.agents.close()

    def moment(self) -> Moment:
        """Return every group in flight as it is now, for a checkpoint or another worker.

        The tokens of a call under way are included once a pause has ended the call.
        """
        groups = (*self._adopted, *self._in_flight.values())
        return Moment(groups, self.calls.merging, of_agents=self.agents.plays)

    def adopt(self, groups: Sequence[InFlight]) -> list[str]:
        """Resume groups of another worker when ``run`` is called. Returns the ids of all that were adopted."""
        self._adopted += groups
        return [group.group_id for group in self._adopted]

    def stats(self) -> WorkerStats:
        """Return the counters, brought up to date."""
        self._stats.version, self._stats.sampled_tokens = self._engine.version, self._engine.sampled_tokens
        self._stats.running_trajectories = self._gate.calls
        self._stats.busy_s, self._stats.paused_s = self._gate.busy_s, self._gate.paused_s
        return self._stats

    # -- work ---------------------------------------------------------------------------------------------------

    def _cancel_work(self) -> None:
        self._capacity.close()
        if self._work is not None:
            self._work.cancel()

    async def _sample_and_publish(self, group: InFlight) -> None:
        """Complete a group and publish or filter it, or fail it alone where only its requests or user code failed."""
        group_id = group.group_id
        try:
            rollouts = await self.rollouts(group)
            published = Group(group_id, group.ticket.prompt, tuple(rollouts.values())) if rollouts else None
            reason = self._responses.why_filtered(group, rollouts) if rollouts else None
        except COST_THEIR_GROUP as error:
            if self._responses.is_fatal(error, self._responses.terms(group.ticket.prompt)):
                raise
            log.warning("group_failed", group=group_id, reason=str(error))
            await self._queue.fail(group_id, failure_reason(error))
        else:
            if published is None:
                await self._queue.return_group(group_id, TIMEOUT)
            elif reason is not None:
                log.info("group_filtered", group=group_id, reason=reason)
                await self._queue.filter_group(group_id, reason, self._config.rollout.filter.rest_epochs)
            else:
                await self._queue.put(published)
                self._stats.publish(published)
        # Kept when this was cancelled or has raised: another worker may adopt the group.
        del self._in_flight[group_id]
        self._capacity.end_group(group_id)

    async def rollouts(self, group: InFlight) -> dict[int, RolloutRecord] | None:
        """Make a group's rollouts; return them by index as ``_in_time`` does, or None. Raises what one has raised."""
        self._capacity.begin_group(group.group_id)
        if self.agents.plays(group.ticket.prompt) or not self._responses.whole_groups:
            made = await self._in_time(group, self._rollout)
            return None if made is None else dict(made)
        ended = await self._in_time(group, self._completed)
        if ended is None:
            return None
        scored = await self._responses.score_group(group, ended)
        self._stats.cut_groups += len(scored) < len(ended) == self._config.rollout.n
        return {index: await self._built(group, index) for index in scored}

    async def _in_time(self, group: InFlight, make: Make[_T]) -> tuple[_T, ...] | None:
        """Make something of each response, without those that failed and, after rollout.group_timeout_s, the late ones.

        Returns None if too few are finished by then.
        """
        settings = self._config.rollout
        tasks = [
            asyncio.create_task(self._responses.unless_left_out(group, index, make)) for index in range(settings.n)
        ]
        try:
            await self._capacity.all_begun(group.group_id, tasks)
            done, late = await wait_in_time(tasks, self._gate, settings.group_timeout_s)
            finished = tuple(made for task in tasks if task in done and (made := task.result()) is not None)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if late:
            needed = settings.min_group_size or settings.n
            log.warning("group_timed_out", group=group.group_id, finished=len(finished), needed=needed)
            if len(finished) < needed:
                return None
        self._stats.cut_groups += len(finished) < settings.n
        return finished

    async def _rollout(self, group: InFlight, index: int) -> tuple[int, RolloutRecord]:
        if (agent := self.agents.of_prompt(group.ticket.prompt)) is not None:
            if index in group.made:
                self._capacity.is_made(group.group_id)
            else:
                async with self._capacity.rollout(group, index) as call:
                    await agent.rollout_of(group, index, call)
            return index, group.made[index]
        await self._completed(group, index)
        if group.scores[index] is None:
            group.scores[index] = await self._responses.score(group, index)
        return index, await self._built(group, index)

    async def _completed(self, group: InFlight, index: int) -> int:
        prompt = group.ticket.prompt

        def keep(partial: PartialRollout) -> None:
            group.partials[index] = partial

        start = group.partials[index] or self._responses.begin(group.trajectory_id(index), prompt)
        async with self._capacity.rollout(group, index) as call:
            keep(await self._responses.complete(start, prompt, call, keep))
        return index

    async def _built(self, group: InFlight, index: int) -> RolloutRecord:
        partial = group.partials[index]
        nbytes = 0 if partial is None else routing_bytes(partial.routed_experts)
        return await aside(nbytes, lambda: group.rollout(index))
