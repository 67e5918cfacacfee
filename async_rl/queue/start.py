"""How the queue starts in a run: the broker from the settings, and the Ray actor around it.

Knows the settings, Ray, and every part of the queue; no part of the queue knows this file.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import ray
import structlog
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from async_rl.config.schema import RunConfig
from async_rl.queue.actor import QueueActor, begin
from async_rl.queue.broker import Broker
from async_rl.queue.broker_state import BrokerSettings, PlainState, PromptSource, unusable_prompts
from async_rl.queue.client import QueueClient, open_groups
from async_rl.queue.copies import Copies
from async_rl.queue.journal import FileJournal, Journal
from async_rl.queue.staleness import window_limit
from async_rl.runtime import logs

log = structlog.get_logger(__name__)

# Prompts, <epoch>-<line of the file>, that one line of the log names; the count covers the rest.
_NAMED = 5

MAX_CONCURRENCY = 10_000
"""Calls that may be inside the actor at once, one per waiting worker or batch of groups. Ray's default of
1,000 could fill up with waiting calls, and then the ``ack`` that makes room would not even start."""


def build_broker(config: RunConfig, source: PromptSource) -> Broker:
    """Build the broker that a run's settings describe."""
    training = config.async_training
    settings = BrokerSettings(
        required_groups=config.required_groups,
        window_limit=window_limit(
            config.required_groups, training.staleness_threshold, training.trigger_parameter_sync_step
        ),
        max_staleness=training.max_staleness,
        on_stale=training.on_stale,
        max_groups=config.queue.max_groups,
        max_bytes=config.queue.max_bytes,
        max_attempts=config.rollout.max_attempts,
        can_rewind=config.checkpoint.periodic,
    )
    return Broker(source, settings)


def start_queue(
    config: RunConfig, source: PromptSource, *, journal: Path | None = None, state: Mapping[str, Any] | None = None
) -> QueueClient:
    """Start the queue's actor, into which ``source`` moves; return a client that can be sent to other actors.

    journal: a file from which the actor is rebuilt when it dies, up to recovery.max_restarts times. Without one, the
    first death is final. With queue.backend redis the journal is in Redis, and the actor starts from what it holds.
    state: what ``QueueClient.state`` gave for a checkpoint, to start from where the journal is empty.
    """
    broker = build_broker(config, source)
    if state is not None:
        plain = cast(PlainState, state)
        broker.restore(plain)
        report_other_prompts(plain, source)
    open_journal: Callable[[], Journal] | None = None
    # On the driver's host, which has the journal, and without which there is no run to rebuild the queue for.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"scheduling_strategy": here}
    if config.queue.backend == "redis":
        from async_rl.queue.redis_store import RedisJournal

        open_journal = functools.partial(RedisJournal, config.queue.redis, config.name)
        _begin(open_journal(), broker)
    elif journal is not None:
        open_journal = functools.partial(FileJournal, journal)
        _begin(FileJournal(journal, create=True), broker)
    if open_journal is not None:
        options |= {"max_restarts": config.recovery.max_restarts, "max_task_retries": -1}
    actor_class = ray.remote(num_cpus=0, max_concurrency=MAX_CONCURRENCY, **options)(_QueueProcess)
    # The broker holds the dataset. Ray does not keep a large argument until the actor restarts, and complains of any
    # reference among the arguments. A pickled reference keeps its object for as long as this process lives.
    actor = actor_class.remote(config, ray.cloudpickle.dumps(ray.put(broker)), open_journal)
    copies = Copies(config.resources.device) if config.queue.copies > 1 else None
    return QueueClient(actor, open_groups(config, "driver"), copies)


def report_other_prompts(plain: PlainState, source: PromptSource) -> None:
    """Log what a run that is resumed from ``plain`` does otherwise than before, because of other settings of data."""
    if given_up := unusable_prompts(plain, source):
        log.warning("prompts_given_up", count=len(given_up), prompts=given_up[:_NAMED], reason="bad rows or removed")
    before, now = plain["source"].get("settings"), source.state().get("settings")
    if isinstance(before, Mapping) and isinstance(now, Mapping):  # by source, of which some may be new
        shared = before.keys() & now.keys()
        before, now = ({name: each[name] for name in shared} for each in (before, now))
    if before and now and before != now:  # release 0.2 wrote none
        log.warning("data_settings_changed", reason="rows make other prompts than before the run was resumed")


def _begin(journal: Journal, broker: Broker) -> None:
    with contextlib.closing(journal):
        begin(journal, broker)


class _QueueProcess(QueueActor):
    """QueueActor in a process of its own."""

    def __init__(self, config: RunConfig, broker: bytes, open_journal: Callable[[], Journal] | None) -> None:
        logs.configure(config.run_dir if config.run_dir.is_dir() else None, "queue", console=False)
        super().__init__(cast(Broker, ray.get(ray.cloudpickle.loads(broker))), open_journal)
