"""Every metric of a run, declared once: name, kind, labels, unit, help, and why somebody looks at it. Pure.

Emitting something that is not declared here is an error (see ``exporter``), so this list is complete by
construction. Names follow Prometheus' conventions: base units, counters end in ``_total``, and each gets the
prefix ``async_rl_`` on the wire. ``metrics.jsonl`` uses the same names without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

PREFIX = "async_rl_"

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric. ``name`` is without the prefix.

    labels: every emission gives each of them. whole: an emission without any label is allowed as well, and
    stands for the value over all label values; only for means and extremes, which nobody sums over labels.
    buckets: upper bounds of a histogram, ascending; +Inf is implied. values: of the only label of a counter, those that
    are known beforehand; they start at 0, so that the first one counts as a rise.
    """

    name: str
    kind: Kind
    help: str
    why: str
    unit: str = ""
    labels: tuple[str, ...] = ()
    whole: bool = False
    buckets: tuple[float, ...] = ()
    values: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


# Staleness is a small integer; beyond 16 versions only the fact matters, not the number.
_STALENESS_BUCKETS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
_SEGMENT_BUCKETS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0)
# Powers of two, from a one-word answer to a long chain of thought.
_LENGTH_BUCKETS = tuple(float(2**i) for i in range(3, 16))
# From a tiny model's 10 ms push to a cluster's minutes, about three to a decade.
_SECONDS_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)

_LEARNING = (
    MetricSpec(
        "policy_version",
        "gauge",
        "Version of the weights; rises by one at every weight push.",
        why="Everything else is read against it; a flat line means that nothing is learnt or pushed.",
    ),
    MetricSpec(
        "training_steps_total",
        "counter",
        "Training steps finished.",
        why="Progress, and with rate() the pace of the run.",
    ),
    MetricSpec(
        "reward_mean",
        "gauge",
        "Mean reward of the trajectories of the last training step.",
        why="The learning curve, as the policy samples.",
    ),
    MetricSpec(
        "eval_reward_mean",
        "gauge",
        "Mean greedy reward on the held-out problems, at the last evaluation.",
        why="The learning curve that counts: fixed problems that are never trained on.",
    ),
    MetricSpec("loss", "gauge", "Policy loss of the last training step.", why="A jump or NaN shows a broken update."),
    MetricSpec(
        "grad_norm",
        "gauge",
        "Global gradient norm before clipping, last training step.",
        why="Spikes precede collapse; always above the clip means the learning rate is really the clip.",
    ),
    MetricSpec(
        "updates_skipped_total",
        "counter",
        "Optimizer updates that were not made, by reason.",
        labels=("reason",),
        values=("non_finite", "no_tokens"),
        why="`non_finite`: a gradient was NaN or infinite. `no_tokens`: every token was over the staleness bound.",
    ),
    MetricSpec("learning_rate", "gauge", "Learning rate of the last optimizer step.", why="To see the warm-up end."),
    MetricSpec(
        "entropy",
        "gauge",
        "Mean entropy of the policy over trained tokens.",
        unit="nats",
        why="Falls to zero when the policy stops exploring.",
    ),
)

_SAME_POLICY = (
    MetricSpec(
        "ppo_kl",
        "gauge",
        "Mean of behaviour minus current log-prob over trained tokens, by staleness; unlabelled over all.",
        labels=("staleness",),
        whole=True,
        unit="nats",
        why="Staleness 0 is pure engine-versus-trainer mismatch, about 0 if all is well; the rest is drift.",
    ),
    MetricSpec(
        "ppo_kl_k3",
        "gauge",
        "Low-variance, non-negative estimate (k3) of the same divergence.",
        unit="nats",
        why="Cannot cancel out the way the plain mean can.",
    ),
    MetricSpec(
        "rollout_logprob_abs_diff_mean",
        "gauge",
        "Mean |behaviour - current log-prob| over trained tokens, by staleness; unlabelled over all.",
        labels=("staleness",),
        whole=True,
        unit="nats",
        why="At staleness 0 it measures how well replay makes engine and trainer one function.",
    ),
    MetricSpec(
        "rollout_logprob_abs_diff_max",
        "gauge",
        "Largest |behaviour - current log-prob| of a trained token, by staleness; unlabelled over all.",
        labels=("staleness",),
        whole=True,
        unit="nats",
        why="One wrong routing row shows here long before it moves a mean.",
    ),
    MetricSpec(
        "ppo_kl_by_resume_position",
        "gauge",
        "Mean of behaviour minus current log-prob over trained tokens, by position relative to a resume point.",
        labels=("position",),
        unit="nats",
        why="`before` and `first` or `after` apart from `uninterrupted`: what the routing policy gets wrong.",
    ),
    MetricSpec(
        "rollout_logprob_abs_diff_mean_by_resume_position",
        "gauge",
        "Mean |behaviour - current log-prob| over trained tokens, by position relative to a resume point.",
        labels=("position",),
        unit="nats",
        why="With policy `replace` the tokens `before` the last resume point have newer routing than log-probs.",
    ),
    MetricSpec(
        "rollout_logprob_abs_diff_max_by_resume_position",
        "gauge",
        "Largest |behaviour - current log-prob| of a trained token, by position relative to a resume point.",
        labels=("position",),
        unit="nats",
        why="A resume that went wrong shows at `first` before anywhere else.",
    ),
    MetricSpec(
        "extreme_token_fraction",
        "gauge",
        "Share of trained tokens with |log importance ratio| > log(tau).",
        labels=("tau",),
        unit="ratio",
        why="Tokens whose correction is mostly noise; a rise means too much staleness or a mismatch.",
    ),
    MetricSpec(
        "clip_fraction",
        "gauge",
        "Share of trained tokens whose loss was clipped.",
        unit="ratio",
        why="Far above 0.2, most of the batch teaches nothing: lower staleness or learning rate.",
    ),
    MetricSpec(
        "effective_sample_size_ratio",
        "gauge",
        "Effective sample size of the importance weights over the number of trained tokens.",
        unit="ratio",
        why="1 on policy; near 0 a few tokens carry the whole gradient.",
    ),
    MetricSpec(
        "router_disagreement_ratio",
        "gauge",
        "Share of the replayed choices of an expert that the trainer's own router would not have made.",
        unit="ratio",
        why="What replay puts right: a few percent. Near that of random choices, it is not these tokens' routing.",
    ),
    MetricSpec(
        "rollout_temperature_ratio",
        "gauge",
        "Temperature behind the engine's log-probs over the trainer's, fitted to trained tokens of staleness 0.",
        unit="ratio",
        why="1. Anything else, with a good fit: the two compute log-probs of different distributions.",
    ),
    MetricSpec(
        "rollout_temperature_explained_ratio",
        "gauge",
        "Share of the squared log-prob differences at staleness 0 that the fitted temperature explains.",
        unit="ratio",
        why="Near 0 the difference, if there is one, has another cause.",
    ),
    MetricSpec(
        "router_fallback_rows_total",
        "counter",
        "Rows without recorded routing that the native router handled.",
        why="More than a handful means that replay is not doing its work.",
    ),
    MetricSpec(
        "exact_extra_tokens_total",
        "counter",
        "Positions that the trainer computed again as the prefix of a later segment.",
        why="The price of routing policy `exact`.",
    ),
    MetricSpec(
        "padding_ratio",
        "gauge",
        "Share of computed positions that belong to no sequence.",
        unit="ratio",
        why="What the layout's multiples (tp, cp, trainer.microbatch_multiple) cost.",
    ),
    MetricSpec(
        "rank_cost_ratio",
        "gauge",
        "Work of the costliest data-parallel rank over the mean.",
        unit="ratio",
        why="Above 1.1 the other ranks wait: more groups per step, or fewer data-parallel ranks.",
    ),
)

_STALENESS = (
    MetricSpec(
        "token_staleness",
        "histogram",
        "Policy version that trained a token minus the one that sampled it.",
        unit="versions",
        buckets=_STALENESS_BUCKETS,
        why="What the staleness settings really do.",
    ),
    MetricSpec(
        "tokens_masked_total",
        "counter",
        "Response tokens kept out of the loss, by reason.",
        labels=("reason",),
        values=("stale", "not_sampled"),
        why="A lot of `stale` asks for a lower staleness_threshold; `not_sampled` is text of the environment.",
    ),
    MetricSpec(
        "groups_dropped_total",
        "counter",
        "Groups dropped and their prompts issued again, by reason.",
        labels=("reason",),
        values=("stale", "worker_lost", "timeout", "payload_lost"),
        why="Generated for nothing, and prompts that come around later.",
    ),
)

_PARTIAL = (
    MetricSpec(
        "trajectories_total",
        "counter",
        "Trajectories trained.",
        why="Denominator of the partial share.",
    ),
    MetricSpec(
        "partial_rollouts_total",
        "counter",
        "Trajectories trained that had more than one segment.",
        why="How often pushes cut generations.",
    ),
    MetricSpec(
        "segments_per_trajectory",
        "histogram",
        "Segments of a trained trajectory.",
        unit="segments",
        buckets=_SEGMENT_BUCKETS,
        why="Many segments mean pushes that come faster than long responses finish.",
    ),
    MetricSpec(
        "response_tokens",
        "histogram",
        "Response length of a trained trajectory.",
        unit="tokens",
        buckets=_LENGTH_BUCKETS,
        why="The long tail is what asynchrony is for.",
    ),
    MetricSpec(
        "resumed_prefill_tokens_total",
        "counter",
        "Tokens computed again because a generation was resumed.",
        why="The price of mode `resume`.",
    ),
)

_FLOW = (
    MetricSpec(
        "queue_groups",
        "gauge",
        "Groups in the queue.",
        why="Always full: trainer-bound. Always empty: rollout-bound.",
    ),
    MetricSpec(
        "queue_bytes",
        "gauge",
        "Payload bytes in the queue.",
        unit="bytes",
        why="Memory, against queue_limit_bytes.",
    ),
    MetricSpec(
        "queue_limit_groups",
        "gauge",
        "Groups that the queue holds at most, queue.max_groups.",
        why="At it, workers wait to hand in what they have finished.",
    ),
    MetricSpec(
        "queue_limit_bytes",
        "gauge",
        "Payload bytes that the queue holds at most, queue.max_bytes.",
        unit="bytes",
        why="At it, workers wait to hand in what they have finished.",
    ),
    MetricSpec(
        "groups_outstanding",
        "gauge",
        "Groups issued and neither trained, returned nor failed.",
        why="At the admission limit, rollout waits for the next version.",
    ),
    MetricSpec(
        "groups_issued_total",
        "counter",
        "Groups handed to rollout workers.",
        why="Left side of conservation.",
    ),
    MetricSpec("groups_trained_total", "counter", "Groups consumed by training steps.", why="Throughput that counts."),
    MetricSpec(
        "groups_returned_total",
        "counter",
        "Groups whose prompt went back to the dataset, to be issued again.",
        why="Work thrown away; drops are among them.",
    ),
    MetricSpec(
        "groups_cut_total",
        "counter",
        "Groups handed in after rollout.group_timeout_s without their last responses.",
        why="The longest responses are what is missing, so a high share teaches brevity.",
    ),
    MetricSpec(
        "groups_failed_total",
        "counter",
        "Groups given up for good, by reason.",
        labels=("reason",),
        values=("reward", "environment", "timeout"),
        why="Prompts that teach nothing: look at the reward function first.",
    ),
    MetricSpec(
        "dataset_bad_rows_total",
        "counter",
        "Dataset rows skipped, by dataset (train, eval).",
        labels=("dataset",),
        why="A dataset that silently shrinks.",
    ),
    MetricSpec("generated_tokens_total", "counter", "Response tokens sampled.", why="Rollout throughput."),
    MetricSpec(
        "trained_tokens_total",
        "counter",
        "Response tokens that contributed a gradient.",
        why="Trainer throughput.",
    ),
)

_WAITING = (
    MetricSpec(
        "rollout_paused_seconds_total",
        "counter",
        "How long a replica stood still for pushes and checkpoints.",
        unit="seconds",
        why="The price of pushes; with sync.rolling the replicas pay it one after the other.",
    ),
    MetricSpec(
        "rollout_idle_ratio",
        "gauge",
        "Share of the last step's time in which rollout had nothing to run.",
        unit="ratio",
        why="High: admission or the queue holds it back; raise staleness_threshold or speed up the trainer.",
    ),
    MetricSpec(
        "trainer_idle_ratio",
        "gauge",
        "Share of the last step's time in which the trainer waited.",
        unit="ratio",
        why="High: rollout is the bottleneck; add replicas.",
    ),
    MetricSpec(
        "overlap_efficiency",
        "gauge",
        "Busy time of the busier side over wall time, since the first step.",
        unit="ratio",
        why="1 is perfect overlap; the one number for how well asynchrony works.",
    ),
    MetricSpec(
        "step_seconds",
        "histogram",
        "Wall time of a training step, waiting included.",
        unit="seconds",
        buckets=_SECONDS_BUCKETS,
        why="Pace and its spread.",
    ),
    MetricSpec(
        "training_loop_phase",
        "gauge",
        "1 for what the training loop is at: waiting for groups, an update, a push, a checkpoint, ...",
        labels=("phase",),
        why="What the run is at when it seems to stand still.",
    ),
    MetricSpec(
        "process_restarts_total",
        "counter",
        "Processes that died and were started again, by kind.",
        labels=("process",),
        values=("rollout", "trainer", "queue"),
        why="One now and then is an accident; a rate is a fault of the machine or of the settings.",
    ),
    MetricSpec(
        "checkpoints_total",
        "counter",
        "Checkpoints written.",
        why="What a trainer that dies goes back to; flat although checkpoint.every is set: look at the log.",
    ),
    MetricSpec(
        "watchdog_stalled_seconds",
        "gauge",
        "How long nothing has moved, by what is waited for.",
        unit="seconds",
        labels=("waiting_for",),
        why="Above zero for minutes: the run hangs, and this says where.",
    ),
)

_PUSHES = (
    MetricSpec(
        "sync_seconds",
        "histogram",
        "Duration of each phase of a weight push.",
        unit="seconds",
        labels=("phase",),
        buckets=_SECONDS_BUCKETS,
        why="Generation stands still meanwhile.",
    ),
    MetricSpec(
        "sync_canary_logprob_abs_diff",
        "gauge",
        "Largest |engine - trainer| log-prob on the canary of the last push.",
        unit="nats",
        why="Proof that the weights arrived; above tolerance the run stops.",
    ),
    MetricSpec(
        "sync_canary_unreached_experts",
        "gauge",
        "Experts, of all MoE layers, that no token of the canary of the last push went to.",
        why="The canary says nothing about their weights; routers that collapse show here too.",
    ),
    MetricSpec(
        "sync_retries_total",
        "counter",
        "Weight pushes made again, by reason.",
        labels=("reason",),
        values=("canary", "transfer"),
        why="`canary`: weights arrived wrong; `transfer`: they did not arrive. A second failure in a row ends the run.",
    ),
)

SECTIONS: Mapping[str, tuple[MetricSpec, ...]] = MappingProxyType(
    {
        "Is it learning": _LEARNING,
        "Is it still the same policy": _SAME_POLICY,
        "Staleness": _STALENESS,
        "Partial rollouts": _PARTIAL,
        "Where the groups are": _FLOW,
        "Who waits": _WAITING,
        "Weight pushes": _PUSHES,
    }
)
"""Every metric, by the question that it answers."""

METRICS: Mapping[str, MetricSpec] = MappingProxyType({spec.name: spec for specs in SECTIONS.values() for spec in specs})
"""Every metric by its name without prefix."""


def series_key(name: str, labels: Mapping[str, str]) -> str:
    """``ppo_kl{staleness="0"}``: how one series is written in logs and in ``metrics.jsonl``."""
    if not labels:
        return name
    return name + "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}"
