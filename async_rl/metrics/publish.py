"""From a record to the metrics on the wire: which field of ``summary``'s records feeds which metric."""

from __future__ import annotations

from async_rl.metrics.declared import METRICS
from async_rl.metrics.exporter import Metrics
from async_rl.metrics.summary import GroupCounts, StepRecord, SyncRecord


def publish_start(metrics: Metrics) -> None:
    """Before anything is counted: a counter whose reasons are known begins at 0, so that the first one is a rise."""
    for spec in METRICS.values():
        for value in spec.values:
            metrics.count_to(spec.name, 0, **{spec.labels[0]: value})
    metrics.count_to("checkpoints_total", 0)


def publish_step(metrics: Metrics, record: StepRecord) -> None:
    """Everything that one training step says. Tokens generated and resumed are counted by the workers."""
    for name in (
        "policy_version",
        "reward_mean",
        "loss",
        "grad_norm",
        "learning_rate",
        "entropy",
        "ppo_kl_k3",
        "clip_fraction",
        "effective_sample_size_ratio",
        "queue_groups",
        "queue_bytes",
        "groups_outstanding",
        "rollout_idle_ratio",
        "trainer_idle_ratio",
        "overlap_efficiency",
        "padding_ratio",
        "rank_cost_ratio",
    ):
        metrics.set(name, getattr(record, name))
    for name, value in (
        ("eval_reward_mean", record.eval_reward_mean),
        ("router_disagreement_ratio", record.router_disagreement_ratio),
    ):
        if value is not None:
            metrics.set(name, value)
    if record.temperature is not None:
        ratio, explained = record.temperature
        metrics.set("rollout_temperature_ratio", ratio)
        metrics.set("rollout_temperature_explained_ratio", explained)
    metrics.set("extreme_token_fraction", record.extreme_token_fraction, tau=2)

    whole, split = record.agreement, record.agreement_by_staleness
    metrics.set_all("ppo_kl", whole.kl, {age: part.kl for age, part in split.items()})
    metrics.set_all(
        "rollout_logprob_abs_diff_mean",
        whole.abs_mean,
        {age: part.abs_mean for age, part in split.items() if part.abs_mean is not None},
    )
    metrics.set_all(
        "rollout_logprob_abs_diff_max",
        whole.abs_max,
        {age: part.abs_max for age, part in split.items() if part.abs_max is not None},
    )
    positions = record.agreement_by_resume_position
    metrics.set_all("ppo_kl_by_resume_position", None, {name: part.kl for name, part in positions.items()})
    metrics.set_all(
        "rollout_logprob_abs_diff_mean_by_resume_position",
        None,
        {name: part.abs_mean for name, part in positions.items() if part.abs_mean is not None},
    )
    metrics.set_all(
        "rollout_logprob_abs_diff_max_by_resume_position",
        None,
        {name: part.abs_max for name, part in positions.items() if part.abs_max is not None},
    )
    for age, tokens in record.token_staleness.items():
        metrics.observe("token_staleness", age, count=tokens)

    metrics.inc("training_steps_total")
    metrics.inc("trained_tokens_total", whole.tokens)
    metrics.inc("trajectories_total", record.trajectories)
    metrics.inc("partial_rollouts_total", record.partial)
    metrics.inc("router_fallback_rows_total", record.router_fallback_rows)
    metrics.inc("exact_extra_tokens_total", record.exact_extra_tokens)
    for reason, tokens in record.tokens_masked.items():
        metrics.inc("tokens_masked_total", tokens, reason=reason)
    for reason, updates in record.updates_skipped.items():
        metrics.inc("updates_skipped_total", updates, reason=reason)
    for segments in record.segments:
        metrics.observe("segments_per_trajectory", segments)
    for length in record.response_tokens:
        metrics.observe("response_tokens", length)
    metrics.observe("step_seconds", record.step_s)


def publish_sync(metrics: Metrics, record: SyncRecord) -> None:
    """One weight push: its duration as a whole and by phase, and the canary."""
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
    """Where the groups are. Drops and failures carry a reason, so whoever decides them counts them."""
    metrics.set("groups_outstanding", counts.outstanding)
    metrics.count_to("groups_issued_total", counts.issued)
    metrics.count_to("groups_trained_total", counts.trained)
    metrics.count_to("groups_returned_total", counts.returned)
