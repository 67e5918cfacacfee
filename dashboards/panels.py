"""What the dashboard shows: rows of panels with their queries, units and advice. Pure data, which ``build`` draws.

In a query, ``{`` opens the label filters of a metric and is always written, even where it holds none: ``build`` puts
the filter by ``$run`` into each, so that no panel ever mixes in a run that was not chosen. ``$window`` is the time that
rates are taken over; the reader chooses it, because a training step takes 50 ms here and ten minutes elsewhere.

What has one value per run carries the run in its legend, so that two runs can be laid over each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["timeseries", "stat", "heatmap", "phases", "versions"]
Hue = Literal["blue", "green", "orange", "red", "purple", "text"]


@dataclass(frozen=True, slots=True)
class Query:
    """One expression. hue: its series are shades of this colour; none is the palette."""

    expr: str
    legend: str = "{{run}}"
    hue: Hue | None = None
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    about: what it shows. good: what it looks like when all is well. turn: which flag to change when it is not, in
    backticks. low, high: ends of the axis, None leaves it to the data. steps: (from, colour) above green; coloured
    background on a stat, lines elsewhere. centred: zero in the middle of the axis.
    """

    title: str
    unit: str
    queries: tuple[Query, ...]
    about: str
    good: str
    turn: str
    kind: Kind = "timeseries"
    width: int = 8
    height: int = 7
    low: float | None = 0
    high: float | None = None
    steps: tuple[tuple[float, str], ...] = ()
    centred: bool = False

    @property
    def description(self) -> str:
        return f"{self.about}\n\n**Good:** {self.good}\n\n**Turn:** {self.turn}"


Band = tuple[Panel | tuple[Panel, ...], ...]
"""Panels side by side; a tuple among them is a column of panels, one above the other, as wide as its first."""


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    bands: tuple[Band, ...]


PHASES = (
    ("groups", "waits for groups", "yellow"),
    ("update", "update", "green"),
    ("push", "push", "blue"),
    ("checkpoint", "checkpoint", "purple"),
    ("evaluation", "evaluation", "semi-dark-blue"),
    ("restart", "restart", "red"),
)
"""What the training loop can be at: value of the label, text, colour. A phase that is not listed shows as "other"."""

NATS = "suffix:nats"
TOKENS_PER_SECOND = "si:tok/s"


def _by_staleness(metric: str) -> tuple[Query, ...]:
    """The whole, on-policy tokens (staleness 0) and stale ones, told apart by colour. An absent label matches ""."""
    return (
        Query(f'{metric}{{staleness=""}}', "{{run}} all tokens", "blue", dashed=True),
        Query(f'{metric}{{staleness="0"}}', "{{run}} on policy (staleness 0)", "green"),
        Query(f'{metric}{{staleness!~"|0"}}', "{{run}} stale by {{staleness}}", "orange"),
    )


def _mean(histogram: str, by: str, filters: str = "") -> str:
    """Mean of a histogram's observations in the window."""
    total, count = (f"sum by ({by}) (rate({histogram}_{part}{{{filters}}}[$window]))" for part in ("sum", "count"))
    return f"{total} / {count}"


def _quantile(share: float, histogram: str) -> str:
    return f"histogram_quantile({share}, sum by (run, le) (rate({histogram}_bucket{{}}[$window])))"


def _per_second(counter: str, by: str = "run", filters: str = "") -> str:
    return f"sum by ({by}) (rate({counter}{{{filters}}}[$window]))"


def _phase_number() -> str:
    """One series per run whose value is the place of its phase in PHASES, from 1; 0 is a phase that is not listed."""
    known = [
        f'{place} * max by (run) (async_rl_training_loop_phase{{phase="{phase}"}})'
        for place, (phase, _, _) in enumerate(PHASES, start=1)
    ]
    return " or ".join([*known, "0 * max by (run) (async_rl_training_loop_phase{})"])


LEARNING = Row(
    "Is it learning",
    (
        (
            Panel(
                "Policy version",
                "none",
                (Query('max by (run) (async_rl_policy_version{role="pipeline"})'),),
                "Version of the weights; rises by one at every push.",
                "it rises steadily. Flat: nothing is learnt or pushed; see the phase of the training loop below.",
                "`async_training.trigger_parameter_sync_step` says how many training steps a push is apart.",
                kind="stat",
                width=6,
                height=4,
            ),
            Panel(
                "Training steps",
                "short",
                (Query("max by (run) (async_rl_training_steps_total{})"),),
                "Training steps finished.",
                "a straight line up to `trainer.steps`.",
                "`trainer.steps` is where the run ends.",
                kind="stat",
                width=6,
                height=4,
            ),
            Panel(
                "Steps per minute",
                "none",
                (Query("60 * " + _per_second("async_rl_training_steps_total")),),
                "Pace of the run over the window.",
                "steady. A fall with a busy trainer means longer responses; with an idle one, that rollout is slower.",
                "`rollout.replicas` where the trainer waits, `async_training.staleness_threshold` where rollout does.",
                kind="stat",
                width=6,
                height=4,
            ),
            Panel(
                "Updates skipped",
                "none",
                (Query("sum by (run, reason) (async_rl_updates_skipped_total{})", "{{run}} {{reason}}"),),
                "Optimizer updates that were not made. non_finite: a gradient was NaN or infinite. no_tokens: every "
                "token was over the staleness bound.",
                "zero.",
                "non_finite: lower `trainer.optimizer.lr`. no_tokens: raise `async_training.max_staleness` or lower "
                "`async_training.staleness_threshold`.",
                kind="stat",
                width=6,
                height=4,
                steps=((1, "red"),),
            ),
        ),
        (
            Panel(
                "Reward",
                "none",
                (
                    Query("async_rl_reward_mean{}", "{{run}} sampled", "blue"),
                    Query("async_rl_eval_reward_mean{}", "{{run}} held out, greedy", "green"),
                ),
                "Mean reward of what each step trained, and on the held-out problems, which are never trained on.",
                "both rise. Sampled reward that rises alone means that the training problems are learnt by heart.",
                "flat from the start: `trainer.optimizer.lr` up, or `rollout.n` up where all responses of a group get "
                "the same reward. Rises, then falls: `trainer.optimizer.lr` down, and see whether it is still the same "
                "policy. `eval.every` sets how often the held-out problems are asked.",
                width=12,
                height=9,
                low=None,
            ),
            Panel(
                "Response length",
                "si:tok",
                (
                    Query(_mean("async_rl_response_tokens", "run"), "{{run}} mean", "blue"),
                    Query(_quantile(0.5, "async_rl_response_tokens"), "{{run}} median", "green"),
                    Query(_quantile(0.95, "async_rl_response_tokens"), "{{run}} 95 % below", "orange"),
                ),
                "Length of the responses that were trained. Quantiles are as coarse as the histogram, whose bounds are "
                "powers of two.",
                "the median moves slowly, and the tail stays below `rollout.max_response_tokens`.",
                "the tail sits at the limit: raise `rollout.max_response_tokens`. Lengths and entropy collapse: "
                "lower `trainer.optimizer.lr`. `rollout.group_timeout_s` cuts the tail, which teaches brevity.",
                width=12,
                height=9,
            ),
        ),
        (
            Panel(
                "Entropy",
                NATS,
                (Query("async_rl_entropy{}"),),
                "Mean entropy of the policy over trained tokens.",
                "it falls slowly and stays above zero.",
                "a fall to zero is a policy that no longer explores: raise `trainer.loss.clip_high` above "
                "`trainer.loss.clip_low`, or lower `trainer.optimizer.lr`.",
                width=6,
            ),
            Panel(
                "Gradient norm",
                "none",
                (Query("async_rl_grad_norm{}"),),
                "Global norm before clipping. The line is at 1, the default of the clip.",
                "of one order of magnitude, mostly below the clip.",
                "always above `trainer.optimizer.clip_grad`: the clip is the real learning rate; lower "
                "`trainer.optimizer.lr`. Spikes come before a collapse: lower `async_training.staleness_threshold`.",
                width=6,
                steps=((1, "orange"),),
            ),
            Panel(
                "Loss",
                "none",
                (Query("async_rl_loss{}"),),
                "Policy loss of each training step.",
                "small and around zero, without a trend. Jumps and NaN show a broken update.",
                "`trainer.optimizer.lr` down; `trainer.loss.dual_clip` bounds what one token with a negative advantage "
                "can do.",
                width=6,
                low=None,
                centred=True,
            ),
            Panel(
                "Learning rate",
                "sci",
                (Query("async_rl_learning_rate{}"),),
                "Learning rate of the last optimizer step.",
                "the warm-up ends and the schedule begins where they should.",
                "`trainer.optimizer.lr`, `trainer.optimizer.warmup_steps`, `trainer.optimizer.schedule`.",
                width=6,
            ),
        ),
    ),
)

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
                    "lower `async_training.staleness_threshold`, or push more often: "
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
                _by_staleness("async_rl_ppo_kl"),
                "Mean of behaviour minus current log-prob over trained tokens. **Green, staleness 0,** is pure "
                "mismatch of engine and trainer: both are the same version. **Orange** is drift: tokens that older "
                "versions sampled, one line for each age, paler and darker shades. Blue, dashed, is the whole.",
                "green is flat at zero (1e-8 in float32, some 1e-3 in bfloat16). Orange is ordered by age, bounded, "
                "and comes back after each push.",
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
                    "Canary of the last push",
                    NATS,
                    (Query("async_rl_sync_canary_logprob_abs_diff{}"),),
                    "Largest |engine - trainer| log-prob on a probe that is scored on both sides after every push.",
                    "far below the tolerance: 1e-4 in float32, 0.5 in bfloat16. Above it the push is made again, and "
                    "then the run ends.",
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
                    "Experts of all MoE layers that no token of the canary went to.",
                    "zero. Others were pushed without proof; a number that grows shows routers that collapse.",
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
                    "Rows without recorded routing, which the trainer's own router handled.",
                    "a handful at most. More means that replay does not do its work.",
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
                "Low-variance estimate of the same divergence. It is never negative, so nothing cancels out.",
                "small and level. It grows while ppo_kl stays at zero: tokens move both ways.",
                "`async_training.staleness_threshold` or `trainer.optimizer.lr` down; `trainer.loss.kl_coef` holds the "
                "policy near the checkpoint it started from.",
            ),
            Panel(
                "|behaviour - current|, mean, by staleness",
                NATS,
                _by_staleness("async_rl_rollout_logprob_abs_diff_mean"),
                "Mean absolute difference of log-probs. Green, staleness 0, is how well engine and trainer are one "
                "function.",
                "green at 1e-7 in float32, 5e-3 in bfloat16, and level; orange ordered by age.",
                "green grows: `trainer.router_replay`, `rollout.dtype`, `async_training.partial_rollout.routing`. "
                "Orange grows: `async_training.staleness_threshold` down.",
            ),
            Panel(
                "|behaviour - current|, largest, by staleness",
                NATS,
                _by_staleness("async_rl_rollout_logprob_abs_diff_max"),
                "The one token that differs most. A wrong row of routing shows here long before it moves a mean.",
                "green within a small multiple of its mean.",
                "green jumps: `trainer.router_replay` R3 and `trainer.verify_replay_steps` up, which compares experts "
                "executed with experts asked for. Orange: `async_training.max_staleness` down.",
            ),
        ),
        (
            Panel(
                "Router disagreement",
                "percentunit",
                (Query("async_rl_router_disagreement_ratio{}"),),
                "Share of the replayed choices of an expert that the trainer's own router would not have made: what "
                "replay puts right.",
                "a few percent, more with staleness. Near that of random choices, 1 - top-k / experts, what is "
                "replayed is not the routing of these tokens.",
                "`trainer.router_replay` R3; `trainer.verify_replay_steps` up compares experts executed with experts "
                "asked for.",
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
                "the ratio is 1. Off it with most explained, the engine's log-probs are of another temperature.",
                "`rollout.temperature`, which both sides use; look for what changes logits in the engine alone.",
                width=12,
            ),
        ),
        (
            Panel(
                "ppo_kl by resume position",
                NATS,
                (Query("async_rl_ppo_kl_by_resume_position{}", "{{run}} {{position}}"),),
                "Mean of behaviour minus current log-prob, by where a token stands: before the last resume point, the "
                "first after it, later, or in a response that was never interrupted.",
                "all together. before and first apart from uninterrupted is what the routing policy gets wrong.",
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
                "With routing replace, the tokens before the last resume point have newer routing than log-probs.",
                "before is of the order of uninterrupted.",
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
                "`async_training.partial_rollout.mode` drain tells whether resuming is at fault.",
            ),
        ),
    ),
)

WAITING = Row(
    "Who waits",
    (
        (
            Panel(
                "Phase of the training loop",
                "none",
                (Query(_phase_number()),),
                "What the training loop was at when it was scraped. Phases shorter than the scrape interval are seen "
                "by chance, in proportion to their length.",
                "mostly update. A lot of waiting: rollout is the bottleneck. Long pushes: everybody waits.",
                "waiting: `rollout.replicas` or `async_training.staleness_threshold` up. Pushes: "
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
                "Which version everybody has. The colour goes by the number.",
                "all replicas step together with the trainer; with sync.rolling one after the other. One that stays "
                "behind is dead, or waits for its weights.",
                "`sync.rolling`, `sync.timeout_s`; `async_training.trigger_parameter_sync_step` is how long one lasts.",
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
                "one of them near zero; which one is the bottleneck.",
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
                    Query(_mean("async_rl_step_seconds", "run"), "{{run}} mean", "blue"),
                    Query(_quantile(0.95, "async_rl_step_seconds"), "{{run}} 95 % below", "orange"),
                ),
                "Wall time of a training step, waiting included.",
                "level, and both lines near each other. A 95 % far above the mean: pushes, checkpoints or stragglers.",
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
                "Finished groups that wait to be trained, and how many fit.",
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
                "Payload bytes in the queue, and how many fit.",
                "well below the limit. At it, workers wait to hand in what they have finished.",
                "`queue.max_bytes` up, or `queue.max_groups` down so that the other bound holds first.",
            ),
            Panel(
                "Groups outstanding",
                "short",
                (Query("async_rl_groups_outstanding{}"),),
                "Groups issued and neither trained, returned nor failed: in flight, queued or leased.",
                "rises to the admission limit only shortly before a push. At it, rollout waits for the next version.",
                "`async_training.staleness_threshold` is the budget; `trainer.groups_per_step` times "
                "`async_training.require_batches` is what a step takes of it.",
            ),
        ),
        (
            Panel(
                "Groups per minute",
                "none",
                (
                    Query("60 * " + _per_second("async_rl_groups_issued_total"), "{{run}} issued", "blue"),
                    Query("60 * " + _per_second("async_rl_groups_trained_total"), "{{run}} trained", "green"),
                    Query("60 * " + _per_second("async_rl_groups_returned_total"), "{{run}} returned", "red"),
                ),
                "Groups handed to rollout, groups trained, and groups whose prompt went back to be issued again.",
                "issued and trained on top of each other, returned at zero.",
                "returned: `async_training.max_staleness` up or `async_training.on_stale` mask; "
                "`rollout.group_timeout_s` up.",
            ),
            Panel(
                "Push time by phase",
                "s",
                (
                    Query(
                        _mean("async_rl_sync_seconds", "run", 'phase="total"'),
                        "{{run}} total",
                        "text",
                        dashed=True,
                    ),
                    Query(_mean("async_rl_sync_seconds", "run, phase", 'phase!="total"'), "{{run}} {{phase}}"),
                ),
                "Mean duration of a weight push and of each of its phases: pause, transfer, wake, canary.",
                "transfer is most of it. Generation stands still meanwhile.",
                "pause is long with `async_training.partial_rollout.mode` drain: use resume. Transfer: `sync.backend`. "
                "The whole too often: `async_training.trigger_parameter_sync_step` up, `sync.rolling`.",
            ),
            Panel(
                "Share of time that a replica is paused",
                "percentunit",
                (
                    Query(
                        _per_second("async_rl_rollout_paused_seconds_total", "run, replica", 'replica=~"$replica"'),
                        "{{run}} replica {{replica}}",
                    ),
                ),
                "How much of the time each replica stood still for pushes and checkpoints.",
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
                    Query(_per_second("async_rl_generated_tokens_total"), "{{run}} generated", "orange"),
                    Query(_per_second("async_rl_trained_tokens_total"), "{{run}} trained", "blue"),
                ),
                "Response tokens sampled by all replicas, and those that contributed a gradient.",
                "level, and together over a few steps; the gap is work thrown away or masked.",
                "`async_training.max_staleness` up or `async_training.staleness_threshold` down closes the gap.",
                width=12,
            ),
            Panel(
                "Tokens generated by each replica",
                TOKENS_PER_SECOND,
                (
                    Query(
                        _per_second("async_rl_generated_tokens_total", "run, replica", 'replica=~"$replica"'),
                        "{{run}} replica {{replica}}",
                    ),
                ),
                "Response tokens sampled by each replica.",
                "all alike. One lower than the others is a slow machine, or has just been started again.",
                "`rollout.max_num_seqs`, `rollout.max_num_batched_tokens`; on CPU `resources.engine_threads`.",
                width=12,
            ),
        ),
    ),
)

PARTIAL = Row(
    "Partial rollouts",
    (
        (
            Panel(
                "Token staleness",
                "short",
                (Query("sum by (le) (increase(async_rl_token_staleness_bucket{}[$window]))", "{{le}}"),),
                "Trained tokens by policy version that trained them minus the one that sampled them. One map for each "
                "run that is chosen; the stronger the colour, the more tokens.",
                "strong at 0 and 1, with a tail that ends below the bound. Its mean is about the staleness threshold.",
                "`async_training.staleness_threshold` moves the whole, `async_training.max_staleness` cuts the tail, "
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
                    Query(_mean("async_rl_token_staleness", "run"), "{{run}} mean", "blue"),
                    Query(_quantile(0.95, "async_rl_token_staleness"), "{{run}} 95 % below", "orange"),
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
                        _per_second("async_rl_partial_rollouts_total")
                        + " / "
                        + _per_second("async_rl_trajectories_total")
                    ),
                ),
                "Trained responses with more than one segment, of all trained.",
                "what the length of a response over the time between pushes makes of it; not bad as such, as long as "
                "first and before agree with uninterrupted above.",
                "`async_training.trigger_parameter_sync_step` up for fewer; `async_training.partial_rollout.mode` "
                "drain for none.",
                high=1,
            ),
            Panel(
                "Segments of a response",
                "none",
                (
                    Query(_mean("async_rl_segments_per_trajectory", "run"), "{{run}} mean", "blue"),
                    Query(_quantile(0.95, "async_rl_segments_per_trajectory"), "{{run}} 95 % below", "orange"),
                ),
                "Into how many pieces pushes cut a response.",
                "near 1; a tail of a few. Many: pushes come faster than long responses finish.",
                "`async_training.trigger_parameter_sync_step` up; stragglers: `rollout.group_timeout_s`.",
            ),
        ),
        (
            Panel(
                "Tokens masked",
                TOKENS_PER_SECOND,
                (Query(_per_second("async_rl_tokens_masked_total", "run, reason"), "{{run}} {{reason}}"),),
                "Response tokens kept out of the loss. stale: over the bound. not_sampled: text of the environment.",
                "stale below a few percent of the tokens trained.",
                "stale: `async_training.staleness_threshold` down, or `async_training.max_staleness` up.",
            ),
            Panel(
                "Prefill because of resuming",
                TOKENS_PER_SECOND,
                (
                    Query(
                        _per_second("async_rl_resumed_prefill_tokens_total", "run, replica", 'replica=~"$replica"'),
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
                (Query(_per_second("async_rl_exact_extra_tokens_total")),),
                "Positions that the trainer computed again as the prefix of a later segment: the price of routing "
                "exact.",
                "zero unless routing is exact, and then below the tokens trained.",
                "`async_training.partial_rollout.routing` replace pays none of it.",
            ),
        ),
    ),
)

_ENGINE_LEGEND = "{{run}} replica {{replica}}"


def _engine(metric: str, *, rate: bool = False) -> str:
    """A metric of vLLM by replica; an engine with several data-parallel parts counts as one."""
    inner = f'{metric}{{replica=~"$replica"}}'
    return f"sum by (run, replica) ({f'rate({inner}[$window])' if rate else inner})"


ENGINES = Row(
    "Engines",
    (
        (
            Panel(
                "Tokens decoded",
                TOKENS_PER_SECOND,
                (Query(_engine("vllm:generation_tokens_total", rate=True), _ENGINE_LEGEND),),
                "Tokens that vLLM sampled, those of evaluations and of the canary included.",
                "level but for the pauses of pushes, and the same on all replicas.",
                "`rollout.max_num_seqs` up as long as the KV cache is not full; `rollout.enforce_eager` off.",
            ),
            Panel(
                "Tokens prefilled",
                TOKENS_PER_SECOND,
                (Query(_engine("vllm:prompt_tokens_total", rate=True), _ENGINE_LEGEND),),
                "Prompt tokens that vLLM took in; resumed responses are among them.",
                "small against the tokens decoded, with a peak after each push.",
                "`async_training.partial_rollout.mode` in_flight resumes without prefill; "
                "`rollout.max_num_batched_tokens` bounds the peak.",
            ),
            Panel(
                "KV cache in use",
                "percentunit",
                (Query('max by (run, replica) (vllm:kv_cache_usage_perc{replica=~"$replica"})', _ENGINE_LEGEND),),
                "Share of the KV cache that requests hold.",
                "high but below 100 %: at the top, requests are preempted.",
                "full: `rollout.kv_cache_bytes` on CPU, `rollout.gpu_memory_utilization` on a GPU, or "
                "`rollout.max_num_seqs` down. Low: `rollout.max_num_seqs` up.",
                high=1,
                steps=((0.95, "red"),),
            ),
        ),
        (
            Panel(
                "Requests running",
                "short",
                (Query(_engine("vllm:num_requests_running"), _ENGINE_LEGEND),),
                "Sequences that each engine decodes at once.",
                "near `rollout.max_num_seqs`. A long slope down before each push is the tail of long responses.",
                "`async_training.staleness_threshold` up gives the engines more to do; `rollout.max_num_seqs` is "
                "the most.",
            ),
            Panel(
                "Requests waiting",
                "short",
                (Query(_engine("vllm:num_requests_waiting"), _ENGINE_LEGEND),),
                "Sequences that wait for a place in an engine.",
                "near zero. Many that wait long grow stale before they begin.",
                "`rollout.replicas` up, `rollout.max_num_seqs` up, or `async_training.staleness_threshold` down.",
            ),
            Panel(
                "Preemptions",
                "none",
                (Query(_engine("vllm:num_preemptions_total"), _ENGINE_LEGEND),),
                "Requests that lost their KV cache to others and are computed again; a total since the engine started.",
                "flat.",
                "`rollout.kv_cache_bytes` or `rollout.gpu_memory_utilization` up, `rollout.max_num_seqs` down.",
            ),
        ),
    ),
)

HEALTH = Row(
    "Health",
    (
        (
            Panel(
                "Standing still",
                "s",
                (
                    Query(
                        "max by (run, waiting_for) (async_rl_watchdog_stalled_seconds{})",
                        "{{run}} waits for {{waiting_for}}",
                    ),
                ),
                "For how long nothing has moved, by what is waited for. The line is at the default of "
                "watchdog.stall_s.",
                "a low sawtooth. Above the line the log says who waits for whom.",
                "`watchdog.stall_s` is when it is logged, `watchdog.abort_s` when the run ends; waits for admission: "
                "`async_training.staleness_threshold` up; for generation: `rollout.group_timeout_s`.",
                steps=((60, "red"),),
            ),
            Panel(
                "Restarts and checkpoints",
                "none",
                (
                    Query("sum by (run, process) (async_rl_process_restarts_total{})", "{{run}} {{process}}"),
                    Query("async_rl_checkpoints_total{}", "{{run}} checkpoints", dashed=True),
                ),
                "Processes that died and were started again, by kind, and checkpoints written.",
                "restarts flat, checkpoints rising if asked for. One restart now and then is an accident; a slope is a "
                "fault of the machine or of the settings.",
                "`recovery.max_restarts` within `recovery.period_s` end the run; `checkpoint.every` says how much a "
                "trainer that dies loses.",
            ),
            Panel(
                "Memory of each process",
                "bytes",
                (
                    Query('process_resident_memory_bytes{role="pipeline"}', "{{run}} pipeline"),
                    Query(
                        'process_resident_memory_bytes{role!="pipeline", replica=~"$replica"}',
                        "{{run}} {{role}} {{replica}}",
                    ),
                ),
                "Resident memory. Shared memory counts in each process that has touched it.",
                "level after the first steps.",
                "pipeline grows: `queue.max_bytes` down. Trainer: `trainer.tokens_per_microbatch` down, "
                "`trainer.recompute`. Rollout: `rollout.kv_cache_bytes` down.",
            ),
        ),
        (
            Panel(
                "Groups dropped",
                "none",
                (Query("sum by (run, reason) (async_rl_groups_dropped_total{})", "{{run}} {{reason}}"),),
                "Groups generated for nothing: dropped, and their prompts issued again.",
                "flat. A drop after a restart (worker_lost, payload_lost) is as it should be.",
                "stale: `async_training.max_staleness` up or `async_training.on_stale` mask. timeout: "
                "`rollout.group_timeout_s` up or `rollout.min_group_size` down.",
            ),
            Panel(
                "Groups failed",
                "none",
                (Query("sum by (run, reason) (async_rl_groups_failed_total{})", "{{run}} {{reason}}"),),
                "Groups given up for good: prompts that teach nothing.",
                "zero. Look at the reward function first.",
                "`reward.timeout_s`, `reward.on_error`, `rollout.environment.timeout_s`; timeout: "
                "`rollout.max_attempts` up.",
            ),
            Panel(
                "Groups cut",
                "none",
                (
                    Query(
                        'sum by (run, replica) (async_rl_groups_cut_total{replica=~"$replica"})',
                        "{{run}} replica {{replica}}",
                    ),
                ),
                "Groups handed in after rollout.group_timeout_s without their last responses.",
                "a small share of all groups: the longest responses are what is missing, so cutting teaches brevity.",
                "`rollout.group_timeout_s` up, `rollout.min_group_size` up.",
            ),
        ),
        (
            Panel(
                "Bad rows of the datasets",
                "none",
                (Query("sum by (run, dataset) (async_rl_dataset_bad_rows_total{})", "{{run}} {{dataset}}"),),
                "Rows of the training and the evaluation file that were skipped.",
                "zero: a dataset that shrinks silently is another dataset.",
                "`data.on_bad_row` fail ends the run at the first; `data.max_prompt_tokens` up where rows are too "
                "long.",
                kind="stat",
                width=6,
                steps=((1, "red"),),
            ),
            Panel(
                "Pushes made again",
                "none",
                (Query("sum by (run, reason) (async_rl_sync_retries_total{})", "{{run}} {{reason}}"),),
                "Weight pushes made again. canary: the weights arrived wrong, and the log names the layer; transfer: "
                "they did not arrive. A second failure ends the run.",
                "zero.",
                "`sync.backend` shm on one host to see whether the transfer is at fault; `sync.canary_tolerance` only "
                "with a reason.",
                kind="stat",
                width=6,
                steps=((1, "red"),),
            ),
            Panel(
                "Padding",
                "percentunit",
                (Query("async_rl_padding_ratio{}"),),
                "Share of the positions that the trainer computes and that belong to no sequence.",
                "a few percent.",
                "`trainer.tokens_per_microbatch` up, `trainer.microbatch_multiple` down, `trainer.parallel.cp` down.",
                width=6,
                high=1,
            ),
            Panel(
                "Work of the costliest rank",
                "percentunit",
                (Query("async_rl_rank_cost_ratio{}"),),
                "Work of the costliest data-parallel rank over the mean.",
                "below 110 %. Above it the other ranks wait for one.",
                "`trainer.groups_per_step` up, or `trainer.parallel.dp` down.",
                width=6,
                low=1,
                steps=((1.1, "orange"),),
            ),
        ),
    ),
)

ROWS = (LEARNING, SAME_POLICY, WAITING, PARTIAL, ENGINES, HEALTH)


@dataclass(frozen=True, slots=True)
class Mark:
    """Events drawn over every panel. The query gives a value above zero where one is."""

    name: str
    expr: str
    text: str
    colour: str


# A counter or version now against one step of the query ago: changes() over a step would miss those between the last
# sample of one step and the first of the next.
MARKS = (
    Mark(
        "Pushes",
        'async_rl_policy_version{role="pipeline"} - async_rl_policy_version{role="pipeline"} offset $__interval > 0',
        "{{run}}: new weights",
        "blue",
    ),
    Mark(
        "Checkpoints",
        "async_rl_checkpoints_total{} - async_rl_checkpoints_total{} offset $__interval > 0",
        "{{run}}: checkpoint",
        "purple",
    ),
    Mark(
        "Restarts",
        "async_rl_process_restarts_total{} - async_rl_process_restarts_total{} offset $__interval > 0",
        "{{run}}: {{process}} started again",
        "red",
    ),
)
