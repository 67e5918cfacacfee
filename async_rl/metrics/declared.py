"""Every metric of a run, declared once: name, kind, meaning, how to read it, and how a step's record gives it. Pure.

To add a metric of training steps:

1. Compute it. A value of the trainer is a field of ``records.StepReport``, filled in ``trainer/report.py`` (a sum over
   tokens is one entry of ``trainer/policy_sums.SUMS``). A value that only the driver knows is a field of
   ``records.StepRecord``, filled in ``driver/step_record.py``.
2. Declare it here, in the section whose question it answers, with ``read``. That alone puts it into /metrics,
   metrics.jsonl, the loggers and docs/reference/metrics.md.
3. Show it: a panel in ``dashboards/panels/``, then ``make generate``. A test fails for a metric without a panel.

A metric without ``read`` is emitted where it is counted, by ``Metrics.set``, ``inc``, ``count_to`` or ``observe``.
Emitting a metric that is not declared here is an error (see ``exporter``). Names follow Prometheus' conventions: base
units, counters end in ``_total``, and each gets the prefix ``async_rl_`` on the wire. ``metrics.jsonl`` uses the names
without the prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from async_rl.metrics.records import StepRecord, TokenAgreement
from async_rl.metrics.spec import MetricSpec, Split
from async_rl.types import ROLLOUT_ENDS

# Staleness is a small integer; beyond 16 versions only the fact matters, not the number.
_STALENESS_BUCKETS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
_SEGMENT_BUCKETS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0)
# Fine around the default of rollout.max_kv_use; above 1 there is more than the cache holds.
_KV_USE_BUCKETS = (0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.5)
# From one answer to a long session with tools.
_TURN_BUCKETS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0, 128.0)
# Powers of two, from a one-word answer to a long chain of thought.
_LENGTH_BUCKETS = tuple(float(2**i) for i in range(3, 16))
# From a tiny model's 10 ms weight sync to a cluster's minutes, about three to a decade.
_SECONDS_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


def _by_staleness(record: StepRecord, name: str) -> Split:
    """One number of ``TokenAgreement`` over all trained tokens and by their staleness, ascending."""
    split = record.report.agreement_by_staleness
    return Split(getattr(record.report.agreement, name), {age: getattr(split[age], name) for age in sorted(split)})


def _numbers(split: Mapping[str, TokenAgreement], name: str) -> Mapping[str, float | None]:
    """One number of each ``TokenAgreement`` of a split."""
    return {label: getattr(part, name) for label, part in split.items()}


_LEARNING = (
    MetricSpec(
        "policy_version",
        "gauge",
        "Version of the weights; rises by one at every weight sync.",
        "Compare everything else with it; a flat line means that nothing is learnt or synced.",
        lambda record: record.policy_version,
    ),
    MetricSpec(
        "training_steps_total",
        "counter",
        "Training steps finished.",
        "Progress, and with rate() the pace of the run.",
    ),
    MetricSpec(
        "reward_mean",
        "gauge",
        "Mean reward of the rollouts of the last training step, and of those of each source of data.sources.",
        "The learning curve of the policy as it samples; it should rise. A source that stays level is too easy, too "
        "hard, or scored wrongly.",
        lambda record: Split(record.reward_mean, record.reward_by_source),
        labels=("source",),
        whole=True,
    ),
    MetricSpec(
        "issued_share",
        "gauge",
        "Share of the groups issued since the run began that each source of data.sources had.",
        "Follows the weights, except for prompts that are issued again and for weights that were changed.",
        lambda record: record.issued_share,
        labels=("source",),
    ),
    MetricSpec(
        "reward_part_mean",
        "gauge",
        "Mean of each named part of the reward over the rollouts of the last training step that have it.",
        "Shows which part the policy earns; one that rises alone is the cheap one, and may want a smaller weight.",
        lambda record: record.reward_parts,
        labels=("part",),
    ),
    MetricSpec(
        "rollout_metric_mean",
        "gauge",
        "Mean of each metric that agents return beside the reward, over the rollouts of the last training step that "
        "have it.",
        "What the agent counts: tool errors, steps, tests passed.",
        lambda record: record.rollout_metrics,
        labels=("metric",),
    ),
    MetricSpec(
        "eval_reward_mean",
        "gauge",
        "Mean greedy reward on the held-out problems, at the last evaluation.",
        "The learning curve that counts: fixed problems that are never trained on.",
        lambda record: record.eval_reward_mean,
    ),
    MetricSpec(
        "eval_avg",
        "gauge",
        "Mean reward over the responses to an evaluation set's problems (avg@k), at its last evaluation.",
        "Compare its changes with eval_avg_stderr: twice that is chance.",
        labels=("set",),
    ),
    MetricSpec(
        "eval_avg_stderr",
        "gauge",
        "Standard error of eval_avg over the problems; the responses to one problem count as one observation.",
        "More problems make it smaller, more responses per problem only a little.",
        labels=("set",),
    ),
    MetricSpec(
        "eval_pass_at_k",
        "gauge",
        "Chance that one of k responses to a problem passes, for the largest k that the set reports (pass@k).",
        "Reward that rises while this falls: the policy narrows to what it can do already.",
        labels=("set",),
    ),
    MetricSpec(
        "eval_truncated_ratio",
        "gauge",
        "Share of an evaluation's responses that ended at rollout.max_response_tokens.",
        "Near 0; above, the results are of the limit as much as of the policy.",
        labels=("set",),
    ),
    MetricSpec(
        "eval_response_tokens_mean",
        "gauge",
        "Mean length of an evaluation's responses, in tokens.",
        "Growth with a flat eval_avg is padding.",
        labels=("set",),
    ),
    MetricSpec(
        "eval_metric_mean",
        "gauge",
        "Mean of each metric that an agent returns beside the reward, over the rollouts of an evaluation set that have "
        "it.",
        "What it says is the agent's to know; beside rollout_metric_mean it shows what is only learned by heart.",
        labels=("set", "metric"),
    ),
    MetricSpec(
        "loss",
        "gauge",
        "Policy loss of the last training step.",
        "A jump or NaN shows a broken update.",
        lambda record: record.report.loss,
    ),
    MetricSpec(
        "grad_norm",
        "gauge",
        "Global gradient norm before clipping, last training step.",
        "Spikes precede collapse. If it is always above the clip, the clip acts as the learning rate.",
        lambda record: record.report.grad_norm,
    ),
    MetricSpec(
        "updates_skipped_total",
        "counter",
        "Optimizer updates that were not made, by reason.",
        "`non_finite`: a gradient was NaN or infinite. `no_tokens`: every token was over the staleness bound.",
        lambda record: record.report.skipped,
        labels=("reason",),
        values=("non_finite", "no_tokens"),
    ),
    MetricSpec(
        "learning_rate",
        "gauge",
        "Learning rate of the last optimizer step.",
        "Shows when the warm-up ends.",
        lambda record: record.report.lr,
    ),
    MetricSpec(
        "entropy",
        "gauge",
        "Mean entropy of the policy over trained tokens.",
        "Falls to zero when the policy stops exploring.",
        lambda record: record.report.entropy,
        unit="nats",
    ),
)

_SAME_POLICY = (
    MetricSpec(
        "ppo_kl",
        "gauge",
        "Mean of behaviour minus current log-prob over trained tokens, by staleness; unlabelled over all.",
        "Staleness 0 is pure engine-versus-trainer mismatch and should be about 0; the rest is drift.",
        lambda record: _by_staleness(record, "kl"),
        labels=("staleness",),
        whole=True,
        unit="nats",
    ),
    MetricSpec(
        "ppo_kl_k3",
        "gauge",
        "Low-variance, non-negative estimate (k3) of the same divergence.",
        "Its terms cannot cancel, unlike those of the plain mean.",
        lambda record: record.report.ppo_kl_k3,
        unit="nats",
    ),
    MetricSpec(
        "rollout_logprob_abs_diff_mean",
        "gauge",
        "Mean |behaviour - current log-prob| over trained tokens, by staleness; unlabelled over all.",
        "At staleness 0 it measures how closely engine and trainer agree when the routed experts are replayed.",
        lambda record: _by_staleness(record, "abs_mean"),
        labels=("staleness",),
        whole=True,
        unit="nats",
    ),
    MetricSpec(
        "rollout_logprob_abs_diff_max",
        "gauge",
        "Largest |behaviour - current log-prob| of a trained token, by staleness; unlabelled over all.",
        "One wrong row of routed experts shows here long before it moves a mean.",
        lambda record: _by_staleness(record, "abs_max"),
        labels=("staleness",),
        whole=True,
        unit="nats",
    ),
    MetricSpec(
        "ppo_kl_by_resume_position",
        "gauge",
        "Mean of behaviour minus current log-prob over trained tokens, by position relative to a resume point.",
        "Where `before`, `first` or `after` differ from `uninterrupted`, the routing policy causes an error.",
        lambda record: _numbers(record.report.agreement_by_resume_position, "kl"),
        labels=("position",),
        unit="nats",
    ),
    MetricSpec(
        "rollout_logprob_abs_diff_mean_by_resume_position",
        "gauge",
        "Mean |behaviour - current log-prob| over trained tokens, by position relative to a resume point.",
        "With policy `replace`, the tokens `before` the last resume point have newer routed experts than log-probs.",
        lambda record: _numbers(record.report.agreement_by_resume_position, "abs_mean"),
        labels=("position",),
        unit="nats",
    ),
    MetricSpec(
        "rollout_logprob_abs_diff_max_by_resume_position",
        "gauge",
        "Largest |behaviour - current log-prob| of a trained token, by position relative to a resume point.",
        "A resume that went wrong shows at `first` before anywhere else.",
        lambda record: _numbers(record.report.agreement_by_resume_position, "abs_max"),
        labels=("position",),
        unit="nats",
    ),
    MetricSpec(
        "ppo_kl_by_engine",
        "gauge",
        "Mean of behaviour minus current log-prob over trained tokens, by the engine that sampled them.",
        "Where engines differ, with the same staleness, one of them computes otherwise than the trainer.",
        lambda record: _numbers(record.report.agreement_by_engine, "kl"),
        labels=("engine",),
        unit="nats",
    ),
    MetricSpec(
        "rollout_logprob_abs_diff_mean_by_engine",
        "gauge",
        "Mean |behaviour - current log-prob| over trained tokens, by the engine that sampled them.",
        "Its terms cannot cancel; the engine whose line is higher is older, or computes otherwise.",
        lambda record: _numbers(record.report.agreement_by_engine, "abs_mean"),
        labels=("engine",),
        unit="nats",
    ),
    MetricSpec(
        "extreme_token_fraction",
        "gauge",
        "Share of trained tokens with |log importance ratio| > log(tau).",
        "The correction of these tokens is mostly noise; a rise means too much staleness or a mismatch.",
        lambda record: record.report.extreme_token_fraction,
        labels=("tau",),
        label_value="2",
        unit="ratio",
    ),
    MetricSpec(
        "clip_fraction",
        "gauge",
        "Share of trained tokens whose loss was clipped.",
        "Far above 0.2, most of the batch teaches nothing: lower the staleness or the learning rate.",
        lambda record: record.report.clip_fraction,
        unit="ratio",
    ),
    MetricSpec(
        "effective_sample_size_ratio",
        "gauge",
        "Effective sample size of the importance weights over the number of trained tokens.",
        "1 on policy; near 0, a few tokens carry the whole gradient.",
        lambda record: record.report.effective_sample_size_ratio,
        unit="ratio",
    ),
    MetricSpec(
        "router_disagreement_ratio",
        "gauge",
        "Share of the replayed choices of an expert that the trainer's own router would not have made.",
        "A few percent is what replay corrects. As high as for random choices, the rows belong to other tokens.",
        lambda record: record.report.router_disagreement,
        unit="ratio",
    ),
    MetricSpec(
        "rollout_temperature_ratio",
        "gauge",
        "Temperature behind the engine's log-probs over the trainer's, fitted to trained tokens of staleness 0.",
        "Should be 1. Another value with a good fit: engine and trainer compute log-probs of different distributions.",
        lambda record: record.report.temperature and record.report.temperature[0],
        unit="ratio",
    ),
    MetricSpec(
        "rollout_temperature_explained_ratio",
        "gauge",
        "Share of the squared log-prob differences at staleness 0 that the fitted temperature explains.",
        "Near 0 the difference, if there is one, has another cause.",
        lambda record: record.report.temperature and record.report.temperature[1],
        unit="ratio",
    ),
    MetricSpec(
        "router_fallback_rows_total",
        "counter",
        "Rows without recorded experts, which the trainer's own router handled.",
        "More than a handful means that replay does not work.",
        lambda record: record.report.router_fallback_rows,
    ),
    MetricSpec(
        "exact_extra_tokens_total",
        "counter",
        "Positions that the trainer computed again as the prefix of a later segment.",
        "The price of routing policy `exact`.",
        lambda record: record.report.extra_positions,
    ),
    MetricSpec(
        "padding_ratio",
        "gauge",
        "Share of computed positions that belong to no sequence.",
        "The cost of the layout's multiples (tp, cp, trainer.microbatch_multiple).",
        lambda record: record.report.padding_ratio,
        unit="ratio",
    ),
    MetricSpec(
        "rank_cost_ratio",
        "gauge",
        "Work of the costliest data-parallel rank over the mean.",
        "Above 1.1 the other ranks wait: use more groups per step, or fewer data-parallel ranks.",
        lambda record: record.report.rank_cost_ratio,
        unit="ratio",
    ),
)

_STALENESS = (
    MetricSpec(
        "token_staleness",
        "histogram",
        "Policy version that trained a token minus the one that sampled it.",
        "The effect of the staleness settings.",
        lambda record: record.token_staleness,
        unit="versions",
        buckets=_STALENESS_BUCKETS,
    ),
    MetricSpec(
        "tokens_masked_total",
        "counter",
        "Response tokens kept out of the loss, by reason.",
        "A lot of `stale` asks for a lower staleness_threshold; `not_sampled` is text of the environment, "
        "`zero_advantage` what trainer.skip_zero_advantage does not compute, `truncated` what trainer.mask_truncated "
        "leaves out, `not_trainable` what was sampled in rollouts that are not to be trained, `rejected` what "
        "trainer.loss.importance with mode mask or trainer.loss.rejection leaves out; where that is much, engine and "
        "trainer disagree.",
        lambda record: record.report.tokens_masked,
        labels=("reason",),
        values=("stale", "not_sampled", "zero_advantage", "truncated", "not_trainable", "rejected"),
    ),
    MetricSpec(
        "groups_dropped_total",
        "counter",
        "Groups dropped and their prompts issued again, by reason.",
        "Wasted generation, and prompts that are trained later.",
        labels=("reason",),
        values=("stale", "worker_lost", "timeout", "payload_lost"),
    ),
)

_PARTIAL = (
    MetricSpec(
        "trajectories_total",
        "counter",
        "Trajectories trained.",
        "Denominator of the partial share.",
        lambda record: record.trajectories,
    ),
    MetricSpec(
        "partial_rollouts_total",
        "counter",
        "Trajectories trained that had more than one segment.",
        "How often weight syncs cut generations.",
        lambda record: record.partial,
    ),
    MetricSpec(
        "segments_per_trajectory",
        "histogram",
        "Segments of a trained trajectory.",
        "Many segments mean that weight syncs come faster than long responses finish.",
        lambda record: record.segments,
        unit="segments",
        buckets=_SEGMENT_BUCKETS,
    ),
    MetricSpec(
        "response_tokens",
        "histogram",
        "Response length of a trained trajectory.",
        "The longer the tail, the more asynchrony gains.",
        lambda record: record.response_tokens,
        unit="tokens",
        buckets=_LENGTH_BUCKETS,
    ),
    MetricSpec(
        "truncated_responses_total",
        "counter",
        "Trajectories trained that ended at rollout.max_response_tokens.",
        "Over trajectories_total, the share of responses without an end. If it rises, answers are cut off.",
        lambda record: record.truncated,
    ),
    MetricSpec(
        "resumed_prefill_tokens_total",
        "counter",
        "Tokens computed again because a generation was resumed.",
        "The price of mode `resume`.",
    ),
    MetricSpec(
        "context_tokens_total",
        "counter",
        "Tokens sent to the engine in calls for rollouts, by what it did with them, where it says what it had cached.",
        "new: computed for the first time in their rollout. weight_sync, lost: again, because older weights had "
        "computed them, or because the cache had lost them. Much of lost: rollout.max_kv_use down.",
        labels=("how",),
    ),
)

_FLOW = (
    MetricSpec(
        "queue_groups",
        "gauge",
        "Groups in the queue.",
        "Always full: the trainer is the bottleneck. Always empty: rollout is.",
        lambda record: record.queue_groups,
    ),
    MetricSpec(
        "queue_bytes",
        "gauge",
        "Payload bytes in the queue.",
        "Compare with queue_limit_bytes.",
        lambda record: record.queue_bytes,
        unit="bytes",
    ),
    MetricSpec(
        "queue_limit_groups",
        "gauge",
        "Groups that the queue holds at most, queue.max_groups.",
        "At the limit, workers wait to submit their finished groups.",
    ),
    MetricSpec(
        "queue_limit_bytes",
        "gauge",
        "Payload bytes above which the queue holds no more groups than a training step needs, queue.max_bytes.",
        "At the limit, workers wait to submit their finished groups.",
        unit="bytes",
    ),
    MetricSpec(
        "groups_outstanding",
        "gauge",
        "Groups issued and neither trained, returned, failed nor filtered.",
        "At the admission limit, rollout waits for the next version.",
        lambda record: record.groups_outstanding,
    ),
    MetricSpec(
        "groups_issued_total",
        "counter",
        "Groups issued to rollout workers.",
        "Equals trained + outstanding + returned + failed + filtered.",
    ),
    MetricSpec("groups_trained_total", "counter", "Groups consumed by training steps.", "The throughput that counts."),
    MetricSpec(
        "groups_returned_total",
        "counter",
        "Groups whose prompt was returned to the dataset, to be issued again.",
        "Discarded work, dropped groups included.",
    ),
    MetricSpec(
        "groups_cut_total",
        "counter",
        "Groups published without some of their responses: late ones (rollout.group_timeout_s), or failed ones.",
        "Where they are late, the longest responses are the missing ones, so a high share teaches brevity.",
    ),
    MetricSpec(
        "groups_failed_total",
        "counter",
        "Groups given up permanently, by reason.",
        "These prompts teach nothing: check the reward function first.",
        labels=("reason",),
        values=("reward", "environment", "agent", "engine", "timeout", "stale", "row", "trainer"),
    ),
    MetricSpec(
        "groups_filtered_total",
        "counter",
        "Groups that rollout.filter kept from training, by reason.",
        "Over groups_issued_total it is the share of generation that teaches nothing: choose harder or easier prompts.",
        labels=("reason",),
        values=("all_truncated", "zero_variance", "mean_reward", "function"),
    ),
    MetricSpec(
        "reward_retries_total",
        "counter",
        "Calls of the reward that followed one that raised an exception or timed out.",
        "Each waits half a second or longer; a service that fails often slows rollouts down.",
    ),
    MetricSpec(
        "user_calls_killed_total",
        "counter",
        "Calls of a slow function (reward, environment) whose process was killed at the function's timeout_s.",
        "Above zero the function hangs on some input, or is slower than its limit allows.",
        labels=("function",),
    ),
    MetricSpec(
        "agent_tool_calls_read_total",
        "counter",
        "Calls of tools that were read in turns of the policy; read=no counts turns whose call could not be.",
        "A policy that learns to call tools writes fewer and fewer that cannot be read.",
        labels=("agent", "read"),
    ),
    MetricSpec(
        "agent_rollouts_total",
        "counter",
        "Rollouts of agents in training that are over, by agent (agent for rollout.agent, else the name in "
        "rollout.agents) and how they ended.",
        "failed: the agent or its environment raised or was late. no_reward: it returned None. cancelled: the worker "
        "ended, or its group did.",
        labels=("agent", "end"),
    ),
    MetricSpec(
        "agent_rollout_seconds_total",
        "counter",
        "Time that these rollouts took, from their beginning to their end, by agent.",
        "Over agent_rollouts_total it is the time of one; the slowest agent decides how old its tokens become.",
        labels=("agent",),
    ),
    MetricSpec(
        "agent_turns_total",
        "counter",
        "Turns that agents asked for, by how they came to their places in the rollout.",
        "All but first and extended begin a trajectory: an agent that makes many does not send back what was said.",
        labels=("agent", "how"),
    ),
    MetricSpec(
        "agent_requests_refused_total",
        "counter",
        "Requests of agents that the policy refused, by code.",
        "`invalid_request` is the agent's mistake; the others are limits: of tokens in a context, or of the rollout.",
        labels=("agent", "code"),
    ),
    MetricSpec(
        "rollouts_trained_total",
        "counter",
        "Rollouts in trained groups, by how they ended.",
        "`truncated` ended at a limit of tokens, turns or time, `abandoned` is the agent's word.",
        lambda record: record.rollout_ends,
        labels=("end",),
        values=ROLLOUT_ENDS,
    ),
    MetricSpec(
        "turns_per_rollout",
        "histogram",
        "Turns of the policy in a trained rollout.",
        "1 without an environment or agent; growth costs time, and is worth it where the reward grows as well.",
        lambda record: record.rollout_turns,
        unit="turns",
        buckets=_TURN_BUCKETS,
    ),
    MetricSpec(
        "trajectories_per_rollout",
        "histogram",
        "Trajectories of a trained rollout.",
        "1 where an agent sends back what was said as it was said.",
        lambda record: record.rollout_branches,
        unit="trajectories",
        buckets=_TURN_BUCKETS,
    ),
    MetricSpec(
        "prefix_recomputed_share",
        "gauge",
        "Share of the last step's tokens with which an earlier trajectory of the same rollout begins as well.",
        "What branching costs the trainer, which computes them again: near 0 where agents extend.",
        lambda record: record.prefix_recomputed_share,
    ),
    MetricSpec(
        "agent_tool_calls_total",
        "counter",
        "Calls of an environment's tools by the policy, by result.",
        "unknown_tool, bad_arguments: faults of the policy, which sees them. tool_error: what the tool says is wrong.",
        labels=("agent", "result"),
    ),
    MetricSpec(
        "rollouts_in_the_making",
        "gauge",
        "Rollouts of agents that have begun and not ended, those that wait for tools included.",
        "At rollout.max_trajectories while the engine has free places: raise that.",
    ),
    MetricSpec(
        "rollouts_waiting",
        "gauge",
        "Rollouts of agents, of groups that were taken, that may not begin yet.",
        "They wait for a place in the engine, or for room in its KV cache (rollout.max_kv_use).",
    ),
    MetricSpec(
        "rollouts_kv_use",
        "gauge",
        "Share of the engine's KV cache that rollouts in the making have in their contexts, or are expected to.",
        "Above rollout.max_kv_use no rollout begins.",
    ),
    MetricSpec(
        "kv_use_at_admission",
        "histogram",
        "The same share, whenever a rollout begins.",
        "Far below rollout.max_kv_use: the KV cache does not limit the rollouts.",
        buckets=_KV_USE_BUCKETS,
    ),
    MetricSpec(
        "agent_environments",
        "gauge",
        "Environments of agents that are open.",
        "At rollout.agent.concurrent, rollouts wait for a place.",
        labels=("agent",),
    ),
    MetricSpec(
        "agent_environment_seconds_total",
        "counter",
        "Time of rollouts with environments, by what they wait for.",
        "Much of place: rollout.agent.concurrent up. Much of setup or step: the environments are the bottleneck.",
        labels=("agent", "stage"),
    ),
    MetricSpec(
        "agent_environment_late_total",
        "counter",
        "Calls of environments that were given up at rollout.agent.setup_s, step_s, score_s or close_s.",
        "Of close, what the environment had may be left behind.",
        labels=("agent", "stage"),
    ),
    MetricSpec(
        "agent_environment_hosts_lost_total",
        "counter",
        "Processes of environments that another took the place of, by reason.",
        "died: it crashed, or ran out of memory. silent: an async method blocks. abandoned: its environments hang.",
        labels=("agent", "reason"),
    ),
    MetricSpec(
        "agent_recoveries_total",
        "counter",
        "Rollouts of agents that continued after their environment host, worker or run had ended, by how.",
        "state, replay: rollout.agent.recovery. restart: begun again, which costs what was sampled in them.",
        labels=("agent", "kind"),
    ),
    MetricSpec(
        "gateway_requests_total",
        "counter",
        "Requests of agents over HTTP that were answered, by endpoint and status code.",
        "400 is a request that the policy cannot answer or has no room for, 401 one of a rollout that has ended.",
        labels=("endpoint", "code"),
    ),
    MetricSpec(
        "gateway_requests_joined_total",
        "counter",
        "Requests of agents that repeated one and got its answer.",
        "Clients repeat after a time-out of theirs: give them more time than a turn takes.",
    ),
    MetricSpec(
        "gateway_fields_ignored_total",
        "counter",
        "Fields of sampling in requests of agents that had no effect, by field.",
        "How the policy is sampled in training is for the run's settings to say.",
        labels=("field",),
    ),
    MetricSpec(
        "dataset_bad_rows_total",
        "counter",
        "Dataset rows skipped, by dataset (train, eval, eval.NAME of eval.sets).",
        "Above zero, the dataset is smaller than its file.",
        labels=("dataset",),
    ),
    MetricSpec("generated_tokens_total", "counter", "Response tokens sampled.", "Rollout throughput."),
    MetricSpec(
        "trained_tokens_total",
        "counter",
        "Response tokens that contributed a gradient.",
        "Trainer throughput.",
        lambda record: record.report.agreement.tokens,
    ),
)

_WAITING = (
    MetricSpec(
        "rollout_paused_seconds_total",
        "counter",
        "Time that a replica was paused for weight syncs and checkpoints.",
        "The price of weight syncs; with sync.rolling the replicas pay it one after the other.",
        unit="seconds",
    ),
    MetricSpec(
        "rollout_idle_ratio",
        "gauge",
        "Share of the last step's time in which rollout had nothing to run.",
        "High: admission or the queue holds it back; raise staleness_threshold or speed up the trainer.",
        lambda record: record.rollout_idle_ratio,
        unit="ratio",
    ),
    MetricSpec(
        "trainer_idle_ratio",
        "gauge",
        "Share of the last step's time in which the trainer waited.",
        "High: rollout is the bottleneck; add replicas.",
        lambda record: record.trainer_idle_ratio,
        unit="ratio",
    ),
    MetricSpec(
        "overlap_efficiency",
        "gauge",
        "Busy time of the busier side over wall time, since the first step.",
        "1 is perfect overlap; the one number for how well asynchrony works.",
        lambda record: record.overlap_efficiency,
        unit="ratio",
    ),
    MetricSpec(
        "step_seconds",
        "histogram",
        "Wall time of a training step, waiting included.",
        "The pace of the run and its spread.",
        lambda record: record.step_s,
        unit="seconds",
        buckets=_SECONDS_BUCKETS,
    ),
    MetricSpec(
        "training_loop_phase",
        "gauge",
        "1 for the current phase of the training loop: waiting for groups, an update, a sync, a checkpoint, ...",
        "Names the phase in which a run has stalled.",
        labels=("phase",),
    ),
    MetricSpec(
        "process_restarts_total",
        "counter",
        "Processes that died and were restarted, by kind.",
        "One now and then is an accident; a steady rate points to the machine or to the settings.",
        labels=("process",),
        values=("rollout", "trainer", "queue"),
    ),
    MetricSpec(
        "rollout_replicas",
        "gauge",
        "Replicas by what they do: wait for a host, start (until they have weights), work, or are lost (see "
        "rollout_replicas_lost).",
        "waiting is what rollout.replicas.max asks for beyond the hosts that there are.",
        labels=("state",),
    ),
    MetricSpec(
        "rollout_replicas_lost",
        "gauge",
        "Replicas that the run continues without: their recovery.max_restarts are spent, they are tried later.",
        "Above zero: the log says why; look at that machine. At recovery.min_replicas left the run fails.",
    ),
    MetricSpec(
        "checkpoints_total",
        "counter",
        "Checkpoints written.",
        "A restarted trainer rewinds to the last one. Flat although checkpoint.every is set: read the log.",
    ),
    MetricSpec(
        "watchdog_stalled_seconds",
        "gauge",
        "Time without any progress, by what the run waits for.",
        "Above zero for minutes: the run has stalled, and the label names the place.",
        unit="seconds",
        labels=("waiting_for",),
    ),
)

_SYNCS = (
    MetricSpec(
        "sync_seconds",
        "histogram",
        "Duration of each phase of a weight sync.",
        "Generation is paused for this long.",
        unit="seconds",
        labels=("phase",),
        buckets=_SECONDS_BUCKETS,
    ),
    MetricSpec(
        "sync_canary_logprob_abs_diff",
        "gauge",
        "Largest |engine - trainer| log-prob on the canary of the last weight sync.",
        "Proof that the weights arrived; above tolerance the run stops.",
        unit="nats",
    ),
    MetricSpec(
        "sync_canary_unreached_experts",
        "gauge",
        "Experts, of all MoE layers, to which no token of the last weight sync's canary was routed.",
        "The canary does not check their weights. Routers that collapse show here too.",
    ),
    MetricSpec(
        "sync_retries_total",
        "counter",
        "Weight syncs repeated, by reason.",
        "`canary`: weights arrived wrong; `transfer`: they did not arrive. A second failure in a row ends the run.",
        labels=("reason",),
        values=("canary", "transfer"),
    ),
    MetricSpec(
        "sync_published_bytes_total",
        "counter",
        "Bytes of weights that trainer rank 0 has put into the object store, by kind: all weights, or a delta.",
        "What the link of the trainer's host carries, about once. With sync.delta mostly `delta`, and far less.",
        unit="bytes",
        labels=("kind",),
    ),
    MetricSpec(
        "sync_publications_total",
        "counter",
        "How often it has: all weights (`full`), or what has changed (`delta`).",
        "Beside sync.delta.full_every, `full` counts joins, second attempts and deltas that were too large.",
        labels=("kind",),
    ),
    MetricSpec(
        "sync_changed_ratio",
        "gauge",
        "Share of elements whose bits the last weight sync changed, with sync.delta.",
        "Up to a few hundredths is usual in bfloat16. In float32, and at large learning rates, a delta saves little.",
        unit="ratio",
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
        "Weight syncs": _SYNCS,
    }
)
"""Every metric, by the question that it answers."""

METRICS: Mapping[str, MetricSpec] = MappingProxyType({spec.name: spec for specs in SECTIONS.values() for spec in specs})
"""Every metric by its name without prefix."""
