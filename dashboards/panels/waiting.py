"""Who waits."""

from __future__ import annotations

from .panel import TOKENS_PER_SECOND, Panel, Query, Row, mean, per_second, quantile

PHASES = (
    ("groups", "waits for groups", "yellow"),
    ("update", "update", "green"),
    ("push", "weight sync", "blue"),
    ("checkpoint", "checkpoint", "purple"),
    ("evaluation", "evaluation", "semi-dark-blue"),
    ("restart", "restart", "red"),
    ("export", "export", "orange"),
    ("start", "start", "text"),
)
"""The phases of the training loop: value of the label, text, colour. A phase that is not listed shows as "other"."""


def _phase_number() -> str:
    """Return one series per run whose value is the place of its phase in PHASES, from 1; 0 if it is not listed."""
    known = [
        f'{place} * max by (run) (async_rl_training_loop_phase{{phase="{phase}"}})'
        for place, (phase, _, _) in enumerate(PHASES, start=1)
    ]
    return " or ".join([*known, "0 * max by (run) (async_rl_training_loop_phase{})"])


WAITING = Row(
    "Who waits",
    (
        (
            Panel(
                "Phase of the training loop",
                "none",
                (Query(_phase_number()),),
                "The training loop's phase at each scrape. Phases shorter than the scrape interval are seen "
                "by chance, in proportion to their length.",
                "mostly update. A lot of waiting: rollout is the bottleneck. Long weight syncs: all replicas wait.",
                "waiting: `rollout.replicas` or `async_training.staleness_threshold` up. Weight syncs: "
                "`async_training.trigger_parameter_sync_step` up, `sync.rolling`. Checkpoints: `checkpoint.every` up.",
                kind="phases",
                width=24,
                height=5,
            ),
        ),
        (
            Panel(
                "Policy versions over replicas",
                "none",
                (
                    Query('async_rl_policy_version{role="pipeline"}', "{{run}} trainer"),
                    Query(
                        'async_rl_policy_version{role="rollout", replica=~"$replica"}', "{{run}} replica {{replica}}"
                    ),
                ),
                "The policy version of each process. Each version has its own colour.",
                "all replicas step together with the trainer; with sync.rolling one after the other. A replica that "
                "stays "
                "behind is dead, or waits for its weights.",
                "`sync.rolling`, `sync.timeout_s`; `async_training.trigger_parameter_sync_step` sets how long a "
                "version lasts.",
                kind="versions",
                width=24,
                height=7,
            ),
        ),
        (
            Panel(
                "Idle share",
                "percentunit",
                (
                    Query("async_rl_rollout_idle_ratio{}", "{{run}} rollout", "orange"),
                    Query("async_rl_trainer_idle_ratio{}", "{{run}} trainer", "blue"),
                ),
                "Share of the last step's time in which each side had nothing to do.",
                "one of them near zero: that side is the bottleneck.",
                "rollout idle: `async_training.staleness_threshold` or `queue.max_groups` up. Trainer idle: "
                "`rollout.replicas` up, or `rollout.max_num_seqs`.",
                high=1,
            ),
            Panel(
                "Overlap efficiency",
                "percentunit",
                (Query("async_rl_overlap_efficiency{}"),),
                "Busy time of the busier side over wall time, since the first step: the one number for how well "
                "asynchrony works.",
                "above 90 %.",
                "`async_training.staleness_threshold` up, `trainer.streaming` on, "
                "`async_training.require_batches` down.",
                high=1,
            ),
            Panel(
                "Step time",
                "s",
                (
                    Query(mean("async_rl_step_seconds", "run"), "{{run}} mean", "blue"),
                    Query(quantile(0.95, "async_rl_step_seconds"), "{{run}} 95 % below", "orange"),
                ),
                "Wall time of a training step, waiting included.",
                "level, and both lines near each other. A 95 % line far above the mean: weight syncs, checkpoints or "
                "stragglers.",
                "`trainer.tokens_per_microbatch`, `trainer.groups_per_step`, `trainer.recompute`; stragglers: "
                "`rollout.group_timeout_s`.",
            ),
        ),
        (
            Panel(
                "Queue, groups",
                "short",
                (
                    Query("async_rl_queue_groups{}", "{{run}} queued", "blue"),
                    Query("async_rl_queue_limit_groups{}", "{{run}} limit", "red", dashed=True),
                ),
                "Finished groups that wait to be trained, and the limit.",
                "between empty and full. Always full: the trainer is the bottleneck. Always empty: rollout is.",
                "`queue.max_groups`; full: `async_training.staleness_threshold` down saves staleness at no cost. "
                "Empty: `rollout.replicas` up.",
            ),
            Panel(
                "Queue, bytes",
                "bytes",
                (
                    Query("async_rl_queue_bytes{}", "{{run}} queued", "blue"),
                    Query("async_rl_queue_limit_bytes{}", "{{run}} limit", "red", dashed=True),
                ),
                "Payload bytes in the queue, and the limit.",
                "well below the limit. At it, workers wait to submit their finished groups.",
                "`queue.max_bytes` up, or `queue.max_groups` down so that the other bound holds first.",
            ),
            Panel(
                "Groups outstanding",
                "short",
                (Query("async_rl_groups_outstanding{}"),),
                "Groups issued and neither trained, returned, failed nor filtered: in flight, queued or leased.",
                "rises to the admission limit only shortly before a weight sync. At it, rollout waits for the next "
                "version.",
                "`async_training.staleness_threshold` is the budget; `trainer.groups_per_step` times "
                "`async_training.require_batches` is what a step takes of it.",
            ),
        ),
        (
            Panel(
                "Groups per minute",
                "none",
                (
                    Query("60 * " + per_second("async_rl_groups_issued_total"), "{{run}} issued", "blue"),
                    Query("60 * " + per_second("async_rl_groups_trained_total"), "{{run}} trained", "green"),
                    Query("60 * " + per_second("async_rl_groups_returned_total"), "{{run}} returned", "red"),
                ),
                "Groups issued to rollout, groups trained, and groups whose prompt was returned to be issued again.",
                "issued and trained on top of each other, returned at zero.",
                "returned: `async_training.max_staleness` up or `async_training.on_stale` mask; "
                "`rollout.group_timeout_s` up.",
            ),
            Panel(
                "Weight sync time by phase",
                "s",
                (
                    Query(
                        mean("async_rl_sync_seconds", "run", 'phase="total"'),
                        "{{run}} total",
                        "text",
                        dashed=True,
                    ),
                    Query(mean("async_rl_sync_seconds", "run, phase", 'phase!="total"'), "{{run}} {{phase}}"),
                ),
                "Mean duration of a weight sync and of its phases for the slowest replica: pause, transfer, canary.",
                "transfer is most of it. Generation is paused for this long.",
                "pause is long with `async_training.partial_rollout.mode` drain: use resume. Transfer: `sync.backend`. "
                "Too frequent: `async_training.trigger_parameter_sync_step` up, `sync.rolling`.",
            ),
            Panel(
                "Share of time that a replica is paused",
                "percentunit",
                (
                    Query(
                        per_second("async_rl_rollout_paused_seconds_total", "run, replica", 'replica=~"$replica"'),
                        "{{run}} replica {{replica}}",
                    ),
                ),
                "Share of time in which each replica was paused for weight syncs and checkpoints.",
                "a few percent, and the same for all.",
                "`async_training.trigger_parameter_sync_step` up, `sync.rolling`, `checkpoint.every` up.",
                high=1,
            ),
        ),
        (
            Panel(
                "Tokens generated and trained",
                TOKENS_PER_SECOND,
                (
                    Query(per_second("async_rl_generated_tokens_total"), "{{run}} generated", "orange"),
                    Query(per_second("async_rl_trained_tokens_total"), "{{run}} trained", "blue"),
                ),
                "Response tokens sampled by all replicas, and those that contributed a gradient.",
                "level, and together over a few steps; the gap is discarded or masked work.",
                "`async_training.max_staleness` up or `async_training.staleness_threshold` down closes the gap.",
                width=12,
            ),
            Panel(
                "Tokens generated by each replica",
                TOKENS_PER_SECOND,
                (
                    Query(
                        per_second("async_rl_generated_tokens_total", "run, replica", 'replica=~"$replica"'),
                        "{{run}} replica {{replica}}",
                    ),
                ),
                "Response tokens sampled by each replica.",
                "all alike. One lower than the others is on a slow machine, or has just been restarted.",
                "`rollout.max_num_seqs`, `rollout.max_num_batched_tokens`; on CPU `resources.engine_threads`.",
                width=12,
            ),
        ),
        (
            Panel(
                "Bytes of weights sent",
                "Bps",
                (Query(per_second("async_rl_sync_published_bytes_total", "run, kind"), "{{run}} {{kind}}"),),
                "Bytes of weights that the trainer puts into the object store (`sync.backend` object_store): all "
                "weights, or what has changed. Its host's link carries them about once.",
                "with `sync.delta.full_every` above 1 mostly delta, and low.",
                "`sync.delta.full_every` up, where weights cross slow links.",
                width=8,
            ),
            Panel(
                "Weights sent, by kind",
                "short",
                (Query("sum by (run, kind) (async_rl_sync_publications_total{})", "{{run}} {{kind}}"),),
                "How often all weights were sent, and how often what had changed.",
                "full rises by one in `sync.delta.full_every` weight syncs, when replicas join and at second attempts.",
                "`sync.delta.max_ratio` up where deltas are too large, which also makes full rise.",
                width=8,
            ),
            Panel(
                "Share of elements that a weight sync changes",
                "percentunit",
                (Query("async_rl_sync_changed_ratio{}", "{{run}}"),),
                "Share of the weights' elements whose bits are others than at the weight sync before, with deltas.",
                "up to a few percent in bfloat16.",
                "`sync.delta.full_every` 1 where it is large: then a delta saves little.",
                width=8,
            ),
        ),
    ),
)
