"""Is it still the same policy."""

from __future__ import annotations

from .panel import NATS, Panel, Query, Row, by_staleness

SAME_POLICY = Row(
    "Is it still the same policy",
    (
        (
            (
                Panel(
                    "Clip fraction",
                    "percentunit",
                    (Query("async_rl_clip_fraction{}"),),
                    "Share of trained tokens whose loss was clipped.",
                    "below 20 %. Far above it, most of the batch teaches nothing.",
                    "lower `async_training.staleness_threshold` or `trainer.optimizer.lr`; `trainer.loss.clip_high` "
                    "and `trainer.loss.clip_low` are the clip itself.",
                    kind="stat",
                    width=5,
                    height=5,
                    high=1,
                    steps=((0.2, "yellow"), (0.4, "red")),
                ),
                Panel(
                    "Extreme tokens",
                    "percentunit",
                    (
                        Query(
                            "max by (run, tau) (async_rl_extreme_token_fraction{})",
                            "{{run}} ratio beyond {{tau}}",
                        ),
                    ),
                    "Share of trained tokens whose importance ratio is above tau or below 1/tau.",
                    "below 1 %. These are tokens whose correction is mostly noise.",
                    "lower `async_training.max_staleness`; `trainer.loss.importance.level` with mode mask leaves them "
                    "out. High at staleness 0 too: the engine and the trainer disagree; see `trainer.router_replay`.",
                    kind="stat",
                    width=5,
                    height=5,
                    high=1,
                    steps=((0.01, "yellow"), (0.05, "red")),
                ),
                Panel(
                    "Effective sample size",
                    "percentunit",
                    (Query("async_rl_effective_sample_size_ratio{}"),),
                    "Effective sample size of the importance weights over the number of trained tokens.",
                    "near 100 %, which is on policy. Near zero a few tokens carry the whole gradient.",
                    "lower `async_training.staleness_threshold`, or sync more often: "
                    "`async_training.trigger_parameter_sync_step` down.",
                    kind="stat",
                    width=5,
                    height=5,
                    high=1,
                    steps=((0, "red"), (0.3, "yellow"), (0.7, "green")),
                ),
            ),
            Panel(
                "ppo_kl by token staleness",
                NATS,
                by_staleness("async_rl_ppo_kl"),
                "Mean of behaviour minus current log-prob over trained tokens. **Green, staleness 0,** is pure "
                "mismatch of engine and trainer: both have the same version. **Orange** is drift: tokens that older "
                "versions sampled, one line for each age, in shades. Blue, dashed, is the mean over all tokens.",
                "green is flat at zero (1e-8 in float32, some 1e-3 in bfloat16). Orange is ordered by age, bounded, "
                "and falls after each weight sync.",
                "green away from zero: `trainer.router_replay` R3, `async_training.partial_rollout.routing`, "
                "`rollout.dtype`. Orange grows: `async_training.staleness_threshold` down, "
                "`async_training.max_staleness` down, `async_training.trigger_parameter_sync_step` down, or "
                "`trainer.optimizer.lr` down.",
                width=14,
                height=15,
                low=None,
                centred=True,
            ),
            (
                Panel(
                    "Canary of the last weight sync",
                    NATS,
                    (Query("async_rl_sync_canary_logprob_abs_diff{}"),),
                    "Largest |engine - trainer| log-prob on a probe that is scored on both sides after every weight "
                    "sync.",
                    "within three times of the first sync's, or far below 1e-4 in float32 and 0.5 in bfloat16. Above "
                    "what is allowed, the sync is repeated, and then the run ends.",
                    "`sync.canary_tolerance`, but only if you know why the two differ.",
                    kind="stat",
                    width=5,
                    height=5,
                    steps=((0.5, "red"),),
                ),
                Panel(
                    "Experts that the canary missed",
                    "none",
                    (Query("async_rl_sync_canary_unreached_experts{}"),),
                    "Experts of all MoE layers to which no token of the canary was routed.",
                    "zero. The canary does not check the others; a number that grows shows routers that collapse.",
                    "lower `trainer.optimizer.lr` when it grows; the canary's own width is not a setting, only its "
                    "`sync.canary_tolerance`.",
                    kind="stat",
                    width=5,
                    height=5,
                    steps=((1, "yellow"),),
                ),
                Panel(
                    "Router fallback rows",
                    "short",
                    (Query("sum by (run) (async_rl_router_fallback_rows_total{})"),),
                    "Rows without recorded experts, which the trainer's own router handled.",
                    "a handful at most. More means that replay does not work.",
                    "`rollout.return_routed_experts` on, `trainer.router_replay` R3.",
                    kind="stat",
                    width=5,
                    height=5,
                    steps=((10, "yellow"), (1000, "red")),
                ),
            ),
        ),
        (
            Panel(
                "KL, k3 estimate",
                NATS,
                (Query("async_rl_ppo_kl_k3{}"),),
                "Low-variance estimate of the same divergence. It is never negative, so its terms cannot cancel.",
                "small and level. It grows while ppo_kl stays at zero: tokens move both ways.",
                "`async_training.staleness_threshold` or `trainer.optimizer.lr` down; `trainer.loss.kl_coef` holds the "
                "policy near the checkpoint it started from.",
            ),
            Panel(
                "|behaviour - current|, mean, by staleness",
                NATS,
                by_staleness("async_rl_rollout_logprob_abs_diff_mean"),
                "Mean absolute difference of log-probs. Green, staleness 0, is how closely engine and trainer agree.",
                "green at 1e-7 in float32, 5e-3 in bfloat16, and level; orange ordered by age.",
                "green grows: `trainer.router_replay`, `rollout.dtype`, `async_training.partial_rollout.routing`. "
                "Orange grows: `async_training.staleness_threshold` down.",
            ),
            Panel(
                "|behaviour - current|, largest, by staleness",
                NATS,
                by_staleness("async_rl_rollout_logprob_abs_diff_max"),
                "The one token that differs most. A wrong row of routed experts shows here long before it moves a "
                "mean.",
                "green within a small multiple of its mean.",
                "green jumps: `trainer.router_replay` R3 and `trainer.verify_replay_steps` up, which compares executed "
                "with requested experts. Orange: `async_training.max_staleness` down.",
            ),
        ),
        (
            Panel(
                "Router disagreement",
                "percentunit",
                (Query("async_rl_router_disagreement_ratio{}"),),
                "Share of the replayed choices of an expert that the trainer's own router would not have made: what "
                "replay corrects.",
                "a few percent, more with staleness. As high as for random choices, 1 - top-k / experts, the "
                "replayed rows belong to other tokens.",
                "`trainer.router_replay` R3; `trainer.verify_replay_steps` up compares executed with requested "
                "experts.",
                width=12,
                high=1,
            ),
            Panel(
                "Temperature behind the engine's log-probs",
                "none",
                (
                    Query("async_rl_rollout_temperature_ratio{}", "{{run}} ratio"),
                    Query("async_rl_rollout_temperature_explained_ratio{}", "{{run}} explained"),
                ),
                "Fitted to the log-prob differences of tokens of staleness 0: the engine's temperature over the "
                "trainer's, and the share of the squared differences that it explains.",
                "the ratio is 1. At another value with most explained, the engine's log-probs have another "
                "temperature.",
                "`rollout.temperature`, which both sides use; look for a setting that changes logits in the engine "
                "alone.",
                width=12,
            ),
        ),
        (
            Panel(
                "ppo_kl by resume position",
                NATS,
                (Query("async_rl_ppo_kl_by_resume_position{}", "{{run}} {{position}}"),),
                "Mean of behaviour minus current log-prob, by the position of a token: before the last resume point, "
                "the "
                "first after it, later, or in a response that was never interrupted.",
                "all equal. Where before and first differ from uninterrupted, the routing policy causes an error.",
                "`async_training.partial_rollout.routing`: exact is right everywhere, replace is cheap; "
                "`async_training.partial_rollout.mode` drain has no resume points.",
                low=None,
                centred=True,
            ),
            Panel(
                "|behaviour - current|, mean, by resume position",
                NATS,
                (
                    Query(
                        "async_rl_rollout_logprob_abs_diff_mean_by_resume_position{}",
                        "{{run}} {{position}}",
                    ),
                ),
                "With routing replace, the tokens before the last resume point have newer routed experts than "
                "log-probs.",
                "before is about as large as uninterrupted.",
                "`async_training.partial_rollout.routing` to preserve or exact.",
            ),
            Panel(
                "|behaviour - current|, largest, by resume position",
                NATS,
                (
                    Query(
                        "async_rl_rollout_logprob_abs_diff_max_by_resume_position{}",
                        "{{run}} {{position}}",
                    ),
                ),
                "A resume that went wrong shows at first before anywhere else.",
                "first no higher than the others.",
                "`async_training.partial_rollout.mode` drain shows whether resuming is at fault.",
            ),
        ),
        (
            Panel(
                "ppo_kl by engine",
                NATS,
                (Query("async_rl_ppo_kl_by_engine{}", "{{run}} {{engine}}"),),
                "Mean of behaviour minus current log-prob, by the engine that sampled a token. A run has several with "
                "`rollout.engines`.",
                "all equal, as far as their tokens are equally stale.",
                "`rollout.engines` without the one that differs; the canary's largest difference is over all engines.",
                width=12,
                low=None,
                centred=True,
            ),
            Panel(
                "|behaviour - current|, mean, by engine",
                NATS,
                (Query("async_rl_rollout_logprob_abs_diff_mean_by_engine{}", "{{run}} {{engine}}"),),
                "Its terms cannot cancel, unlike those of the plain mean.",
                "all equal, as far as their tokens are equally stale.",
                "`rollout.engines` without the one that differs.",
                width=12,
            ),
        ),
    ),
)
