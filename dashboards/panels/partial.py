"""Partial rollouts."""

from __future__ import annotations

from .panel import TOKENS_PER_SECOND, Panel, Query, Row, mean, per_second, quantile

PARTIAL = Row(
    "Partial rollouts",
    (
        (
            Panel(
                "Token staleness",
                "short",
                (Query("sum by (le) (increase(async_rl_token_staleness_bucket{}[$window]))", "{{le}}"),),
                "Trained tokens by policy version that trained them minus the one that sampled them. One map for each "
                "chosen run; the stronger the colour, the more tokens.",
                "strong at 0 and 1, with a tail that ends below the bound. Its mean is about the staleness threshold.",
                "`async_training.staleness_threshold` moves all of it, `async_training.max_staleness` cuts the tail, "
                "`async_training.trigger_parameter_sync_step` makes each version longer.",
                kind="heatmap",
                width=24,
                height=9,
            ),
        ),
        (
            Panel(
                "Mean token staleness",
                "none",
                (
                    Query(mean("async_rl_token_staleness", "run"), "{{run}} mean", "blue"),
                    Query(quantile(0.95, "async_rl_token_staleness"), "{{run}} 95 % below", "orange"),
                ),
                "Age of trained tokens in versions.",
                "the mean is about `async_training.staleness_threshold`, whatever the lengths.",
                "`async_training.staleness_threshold`; the bound `async_training.max_staleness` should be twice it at "
                "least, so that it catches stragglers only.",
            ),
            Panel(
                "Share of responses that were interrupted",
                "percentunit",
                (
                    Query(
                        per_second("async_rl_partial_rollouts_total")
                        + " / "
                        + per_second("async_rl_trajectories_total")
                    ),
                ),
                "Trained responses with more than one segment, of all trained.",
                "depends on the length of responses and the time between weight syncs. Not bad as such, as long as "
                "first and before agree with uninterrupted above.",
                "`async_training.trigger_parameter_sync_step` up for fewer; `async_training.partial_rollout.mode` "
                "drain for none.",
                high=1,
            ),
            Panel(
                "Segments of a response",
                "none",
                (
                    Query(mean("async_rl_segments_per_trajectory", "run"), "{{run}} mean", "blue"),
                    Query(quantile(0.95, "async_rl_segments_per_trajectory"), "{{run}} 95 % below", "orange"),
                ),
                "Number of pieces into which weight syncs cut a response.",
                "near 1; a tail of a few. Many: weight syncs come faster than long responses finish.",
                "`async_training.trigger_parameter_sync_step` up; stragglers: `rollout.group_timeout_s`.",
            ),
        ),
        (
            Panel(
                "Tokens masked",
                TOKENS_PER_SECOND,
                (Query(per_second("async_rl_tokens_masked_total", "run, reason"), "{{run}} {{reason}}"),),
                "Response tokens kept out of the loss. stale: over the bound. not_sampled: text of the environment.",
                "stale below a few percent of the tokens trained.",
                "stale: `async_training.staleness_threshold` down, or `async_training.max_staleness` up.",
            ),
            Panel(
                "Prefill because of resuming",
                TOKENS_PER_SECOND,
                (
                    Query(
                        per_second("async_rl_resumed_prefill_tokens_total", "run, replica", 'replica=~"$replica"'),
                        "{{run}} replica {{replica}}",
                    ),
                ),
                "Tokens computed again because a generation was resumed: the price of mode resume.",
                "less than the tokens generated.",
                "`async_training.partial_rollout.mode` in_flight pays none of it; "
                "`async_training.trigger_parameter_sync_step` up pays it less often.",
            ),
            Panel(
                "Positions trained again",
                TOKENS_PER_SECOND,
                (Query(per_second("async_rl_exact_extra_tokens_total")),),
                "Positions that the trainer computed again as the prefix of a later segment: the price of routing "
                "exact.",
                "zero unless routing is exact, and then below the tokens trained.",
                "`async_training.partial_rollout.routing` replace pays none of it.",
            ),
        ),
    ),
)
