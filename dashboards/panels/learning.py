"""Is it learning."""

from __future__ import annotations

from .panel import NATS, Panel, Query, Row, mean, per_second, quantile

LEARNING = Row(
    "Is it learning",
    (
        (
            Panel(
                "Policy version",
                "none",
                (Query('max by (run) (async_rl_policy_version{role="pipeline"})'),),
                "Version of the weights; rises by one at every weight sync.",
                "it rises steadily. Flat: nothing is learnt or synced; see the phase of the training loop below.",
                "`async_training.trigger_parameter_sync_step` is the number of training steps between two weight "
                "syncs.",
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
                (Query("60 * " + per_second("async_rl_training_steps_total")),),
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
                    Query('async_rl_reward_mean{source=""}', "{{run}} sampled", "blue"),
                    Query("async_rl_eval_reward_mean{}", "{{run}} held out, greedy", "green"),
                ),
                "Mean reward of the responses that each step trained, and on the held-out problems, which are never "
                "trained on.",
                "both rise. Sampled reward that rises alone means that the training problems are memorized.",
                "flat from the start: `trainer.optimizer.lr` up, or `rollout.n` up where all responses of a group get "
                "the same reward. Rises, then falls: `trainer.optimizer.lr` down, and check the row on the same "
                "policy. `eval.every` sets how often the held-out problems are evaluated.",
                width=12,
                height=9,
                low=None,
            ),
            Panel(
                "Response length",
                "si:tok",
                (
                    Query(mean("async_rl_response_tokens", "run"), "{{run}} mean", "blue"),
                    Query(quantile(0.5, "async_rl_response_tokens"), "{{run}} median", "green"),
                    Query(quantile(0.95, "async_rl_response_tokens"), "{{run}} 95 % below", "orange"),
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
                "Reward by source",
                "none",
                (Query('async_rl_reward_mean{source!=""}', "{{run}} {{source}}"),),
                "Mean reward of the responses that each step trained, of each source of `data.sources`. Empty for a "
                "single dataset.",
                "all rise, the hard ones later.",
                "level at its best: the source is too easy, lower its `data.sources` weight. Level at its worst: it is "
                "too hard or its reward is wrong; look at its responses in samples.jsonl.",
                width=12,
                height=8,
                low=None,
            ),
            Panel(
                "Share of prompts by source",
                "percentunit",
                (Query("async_rl_issued_share{}", "{{run}} {{source}}"),),
                "Share of the groups issued since the run began that each source of `data.sources` had, groups of "
                "prompts that came again among them.",
                "level, at the weights' ratio.",
                "drifts: the weights were changed, or the groups of one source are returned more often. Compare "
                "groups dropped and failed by reason.",
                width=12,
                height=8,
            ),
        ),
        (
            Panel(
                "Parts of the reward",
                "none",
                (Query("async_rl_reward_part_mean{}", "{{run}} {{part}}"),),
                "Mean of each named part of the reward, over the trained responses that have it. Empty where the "
                "reward is one number.",
                "the parts rise together.",
                "a part that rises alone is the cheap one: lower its weight in `reward.functions`. Where the part "
                "overlong falls, responses grow into the penalty of `reward.overlong_tokens`.",
                width=8,
                height=8,
                low=None,
            ),
            Panel(
                "Metrics of agents",
                "none",
                (
                    Query("async_rl_rollout_metric_mean{}", "{{run}} {{metric}}"),
                    Query("async_rl_eval_metric_mean{}", "{{run}} {{set}} {{metric}}"),
                ),
                "Mean of each metric that agents return beside the reward, over the trained rollouts that have it, and "
                "over those of each evaluation set. Empty where none does.",
                "as the agent's author says.",
                "the agent; `rollout.agent.function` returns them as the metrics of its Outcome.",
                width=8,
                height=8,
                low=None,
            ),
            Panel(
                "Share of responses that were cut off",
                "percentunit",
                (
                    Query(
                        per_second("async_rl_truncated_responses_total")
                        + " / "
                        + per_second("async_rl_trajectories_total")
                    ),
                ),
                "Trained responses that ended at the longest length, of all trained.",
                "low, and it falls.",
                "raise `rollout.max_response_tokens`; `reward.overlong_tokens` for a penalty before the limit, "
                "`trainer.mask_truncated` or `reward.truncated` to leave them out.",
                width=8,
                height=8,
                high=1,
            ),
        ),
        (
            Panel(
                "Evaluation sets",
                "none",
                (
                    Query("async_rl_eval_avg{}", "{{run}} {{set}} mean reward", "green"),
                    Query("async_rl_eval_pass_at_k{}", "{{run}} {{set}} pass@k", "blue"),
                    Query("async_rl_eval_avg_stderr{}", "{{run}} {{set}} standard error", "orange"),
                ),
                "Of each set of problems the mean reward, the chance that one of k responses passes, and the standard "
                "error of the mean over the problems.",
                "both rise, by more than twice the standard error.",
                "more problems (`eval.n`, `eval.sets`) for a smaller error. pass@k that falls while the mean rises: "
                "the policy narrows; raise `trainer.loss.clip_high` or lower `trainer.optimizer.lr`.",
                width=12,
                height=8,
                low=None,
            ),
            Panel(
                "Evaluation responses that were cut off",
                "percentunit",
                (Query("async_rl_eval_truncated_ratio{}", "{{run}} {{set}}"),),
                "Share of the responses of each set's last evaluation that ended at the longest length.",
                "near zero: else the results are of the limit as much as of the policy.",
                "raise `rollout.max_response_tokens`.",
                width=6,
                height=8,
                high=1,
            ),
            Panel(
                "Evaluation response length",
                "si:tok",
                (Query("async_rl_eval_response_tokens_mean{}", "{{run}} {{set}}"),),
                "Mean length of the responses of each set's last evaluation.",
                "it grows only while the mean reward does.",
                "`reward.overlong_tokens` for a penalty of long responses.",
                width=6,
                height=8,
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
                "within one order of magnitude, mostly below the clip.",
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
