"""From the records of a run to its /metrics and to the lines of metrics.jsonl.

A training step's values come from the declarations (``MetricSpec.read``), so a new metric needs no code here. Weight
syncs and group counts have few metrics, which are published by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from async_rl.config.inputs import HELD_OUT
from async_rl.metrics.declared import METRICS
from async_rl.metrics.evaluation import EvalLine, largest_pass
from async_rl.metrics.exporter import Metrics
from async_rl.metrics.records import GroupCounts, StepRecord, SyncRecord
from async_rl.metrics.spec import MetricSpec, Parts, Split, Value


def publish_start(metrics: Metrics) -> None:
    """Set every counter whose labels are known to 0, so that its first count is a rise, and what is 0 in most runs."""
    for spec in METRICS.values():
        for value in spec.values:
            metrics.count_to(spec.name, 0, **{spec.labels[0]: value})
    metrics.count_to("checkpoints_total", 0)
    metrics.set("rollout_replicas_lost", 0)


def publish_step(metrics: Metrics, record: StepRecord) -> None:
    """Publish everything that one training step gives. Workers count the tokens that they generate and resume."""
    metrics.inc("training_steps_total")
    for spec in METRICS.values():
        if spec.read is not None:
            _publish(metrics, spec, spec.read(record))


def _publish(metrics: Metrics, spec: MetricSpec, value: Any) -> None:
    """Emit a ``spec.Value``, which has the type that the metric's kind and labels ask for."""
    if spec.kind == "gauge":
        _set(metrics, spec, value)
    elif spec.kind == "counter":
        counts = value if isinstance(value, Mapping) else {None: value}
        for label, count in counts.items():
            metrics.inc(spec.name, count, **({} if label is None else {spec.labels[0]: label}))
    elif isinstance(value, Mapping):
        for observed, count in value.items():
            metrics.observe(spec.name, observed, count=count)
    else:
        metrics.observe_each(spec.name, value if isinstance(value, tuple) else (value,))


def _set(metrics: Metrics, spec: MetricSpec, value: Any) -> None:
    if isinstance(value, Split):
        metrics.set_all(spec.name, value.whole, _known(value.parts))
    elif isinstance(value, Mapping):
        metrics.set_all(spec.name, None, _known(value))
    elif value is not None:
        metrics.set(spec.name, value, **spec.fixed_labels)


def _known(parts: Parts) -> dict[Any, float]:
    return {label: value for label, value in parts.items() if value is not None}


# The gauges of an evaluation set: they are set when its evaluation ends, and columns of the step that it falls into.
_EVAL: Mapping[str, Callable[[EvalLine], float | None]] = MappingProxyType(
    {
        "eval_avg": lambda line: line["avg"]["mean"],
        "eval_avg_stderr": lambda line: line["avg"]["stderr"],
        "eval_pass_at_k": largest_pass,
        "eval_truncated_ratio": lambda line: line["truncated"],
        "eval_response_tokens_mean": lambda line: line["response_tokens_mean"],
    }
)

# Columns of a row that no metric gives: the step's time, and values that Prometheus computes itself or gets from syncs.
_ROW: Mapping[str, Callable[[StepRecord], Any]] = MappingProxyType(
    {
        "step": lambda record: record.step,
        "time": lambda record: record.time,
        "elapsed_s": lambda record: record.elapsed_s,
        "groups": lambda record: record.groups,
        "groups_filtered": lambda record: dict(record.groups_filtered),
        "max_segments": lambda record: max(record.segments, default=0),
        "response_tokens_mean": lambda record: sum(record.response_tokens) / max(1, len(record.response_tokens)),
        "response_tokens_max": lambda record: max(record.response_tokens, default=0),
        "turns_per_rollout_mean": lambda record: sum(record.rollout_turns) / max(1, len(record.rollout_turns)),
        "turns_per_rollout_max": lambda record: max(record.rollout_turns, default=0),
        "trajectories_per_rollout_mean": lambda record: (
            sum(record.rollout_branches) / max(1, len(record.rollout_branches))
        ),
        "on_policy_logprob_abs_diff_mean": lambda record: record.on_policy and record.on_policy.abs_mean,
        "on_policy_logprob_abs_diff_max": lambda record: record.on_policy and record.on_policy.abs_max,
        "trained_tokens_by_resume_position": lambda record: {
            position: part.tokens for position, part in record.report.agreement_by_resume_position.items()
        },
        "sync_seconds": lambda record: (
            record.last_sync and {"total": record.last_sync.seconds, **record.last_sync.phases}
        ),
        "sync_canary_logprob_abs_diff": lambda record: record.last_sync and record.last_sync.canary,
        "eval_version": lambda record: {name: line["policy_version"] for name, line in record.evals.items()},
        "replica_versions": lambda record: {str(replica): v for replica, v in record.replica_versions.items()},
    }
)


def step_row(record: StepRecord) -> dict[str, Any]:
    """Return a training step's line of metrics.jsonl: flat, except for splits by a label, which are mappings."""
    row = {key: read(record) for key, read in _ROW.items()}
    row |= {key: {name: read(line) for name, line in record.evals.items()} for key, read in _EVAL.items()}
    for spec in METRICS.values():
        if spec.read is not None:
            row.update(_columns(spec, spec.read(record)))
    return row


def _columns(spec: MetricSpec, value: Value) -> dict[str, Any]:
    name = spec.name.removesuffix("_total")
    if isinstance(value, Split):
        return {name: value.whole, f"{name}_by_{spec.labels[0]}": _with_text_keys(value.parts)}
    if isinstance(value, Mapping):
        return {name: _with_text_keys(value)}
    # Single observations would fill the file; _ROW has their mean and maximum.
    return {} if isinstance(value, tuple) else {name: value}


def _with_text_keys(parts: Parts) -> dict[str, Any]:
    return {str(label): value for label, value in parts.items()}


def publish_sync(metrics: Metrics, record: SyncRecord) -> None:
    """Publish one weight sync: its duration as a whole and by phase, and the canary."""
    metrics.set("policy_version", record.policy_version)
    metrics.observe("sync_seconds", record.seconds, phase="total")
    for phase, seconds in record.phases.items():
        metrics.observe("sync_seconds", seconds, phase=phase)
    if record.canary is not None:
        metrics.set("sync_canary_logprob_abs_diff", record.canary)
    metrics.set("sync_canary_unreached_experts", record.unreached_experts)
    for reason, count in record.retries.items():
        metrics.inc("sync_retries_total", count, reason=reason)


def publish_groups(metrics: Metrics, counts: GroupCounts) -> None:
    """Publish how many groups are in each state. Drops and failures have a reason and are published by the driver."""
    metrics.set("groups_outstanding", counts.outstanding)
    metrics.count_to("groups_issued_total", counts.issued)
    metrics.count_to("groups_trained_total", counts.trained)
    metrics.count_to("groups_returned_total", counts.returned)


def publish_eval(metrics: Metrics, line: EvalLine) -> None:
    """Publish the results of an evaluation set."""
    if line["set"] == HELD_OUT:
        metrics.set("eval_reward_mean", line["avg"]["mean"])
    for name, read in _EVAL.items():
        if (value := read(line)) is not None:
            metrics.set(name, value, set=line["set"])
    for metric, mean in line.get("metrics", {}).items():
        metrics.set("eval_metric_mean", mean, set=line["set"], metric=metric)
