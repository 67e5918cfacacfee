"""The words for a run's events: a table from each constant event name to a sentence for people. Pure.

The live view, ``async-rl watch`` and ``async-rl report`` show these sentences. The log has the name and the fields, as
has the output where there is no terminal.
"""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from types import MappingProxyType
from typing import Any

WORDS: Mapping[str, str] = MappingProxyType(
    {
        "engine_trainer_agree": "engine and trainer agree to {max_abs_diff:.1e} on the checkpoint's weights",
        "start_takes_long": "waiting for {missing} to start, for {waited_s} s; the cluster has {free} left",
        "run_without_checkpoint": "there is no checkpoint to restore: the run starts from its first step",
        "run_restoring": "restoring the run after step {step}",
        "work_restored": "restored the run after step {step}: {queued} groups queued, {resumed} in flight",
        "batch_set_aside": "the trainer failed on these groups twice, they are left out: {groups} ({reason})",
        "payloads_lost": "{groups} finished groups were lost with their host, their prompts are issued again",
        "copies_lost": "{groups} finished groups had one copy left after a host was lost, {copied} were copied again",
        "group_not_copied": "the finished group {group} has no second copy: {reason}",
        "trainer_restarted": "the trainer was restarted after step {step}",
        "worker_restarted": "{replica} was restarted",
        "replica_not_started": "{replica} did not start, the run begins with {others} others and tries it again: "
        "{reason}",
        "replica_joined": "{replica} has joined the run, {working} work",
        "replica_left": "{replica} has left with its host, {others} others remain; another host is asked for",
        "host_unfit": "the host {host} has joined the cluster and gets no replica: {reason}",
        "replicas_short": "only {present} of {needed} replicas have a host; the run fails in {patience_s} s",
        "process_died": "{process} died and is being restarted",
        "replica_lost": "{process} has died too often; the run continues with {others} others: {reason}",
        "stop_requested": "SIGTERM: training ends after a checkpoint",
        "queue_rebuilt": "the queue died and was rebuilt from its journal",
        "queue_bytes_exceeded": "queue.max_bytes is {max_bytes}, less than {groups} groups of a training step have: "
        "they are admitted, and workers wait with more; to queue further ahead, set it to {enough}",
        "checkpoint_written": "wrote the checkpoint of step {step} in {seconds} s",
        "evaluated": "evaluated: mean reward {reward}",
        "set_evaluated": "evaluated {set} at version {version}: mean reward {reward}, {k} responses per problem",
        "watchdog_stalled": "{description}",
        "groups_filtered": "more than rollout.filter.max_share = {limit:g} of the last groups were filtered (in all "
        "{reasons}); the run fails if that lasts for {abort_s:g} s",
        "run_finished": "finished; see {summary}",
        "run_interrupted": "interrupted; see {summary}",
        "run_failed": "failed: {reason}; see {summary}",
    }
)
"""Event name -> format string over the event's fields. Fields that it does not use are appended."""

RESTARTS = frozenset({"process_died", "queue_rebuilt"})
"""Events that tell of a process that died."""


def in_words(event: str, fields: Mapping[str, Any]) -> str:
    """Return an event as a sentence, or as ``name key=value`` if it has no words or lacks a field that they use."""
    template = WORDS.get(event)
    if template is not None:
        used = {name for _, name, _, _ in Formatter().parse(template) if name}
        rest = ", ".join(f"{key}={value}" for key, value in fields.items() if key not in used and value is not None)
        try:
            return template.format(**fields) + (f" ({rest})" if rest else "")
        except (KeyError, TypeError, ValueError):  # a log of another version, or a damaged one
            pass
    return " ".join([event, *(f"{key}={value}" for key, value in fields.items())])
