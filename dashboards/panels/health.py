"""Health: processes, memory, failures."""

from __future__ import annotations

from .panel import Panel, Query, Row, mean, per_second

HEALTH = Row(
    "Health",
    (
        (
            Panel(
                "Stalled",
                "s",
                (
                    Query(
                        "max by (run, waiting_for) (async_rl_watchdog_stalled_seconds{})",
                        "{{run}} waits for {{waiting_for}}",
                    ),
                ),
                "Time without any progress, by what the run waits for. The line is at the default of watchdog.stall_s.",
                "a low sawtooth. Above the line, the log says which process waits for which.",
                "a stall is logged after `watchdog.stall_s` and ends the run after `watchdog.abort_s`. Waits for "
                "admission: "
                "`async_training.staleness_threshold` up; for generation: `rollout.group_timeout_s`.",
                steps=((60, "red"),),
            ),
            Panel(
                "Restarts and checkpoints",
                "none",
                (
                    Query("sum by (run, process) (async_rl_process_restarts_total{})", "{{run}} {{process}}"),
                    Query("async_rl_checkpoints_total{}", "{{run}} checkpoints", dashed=True),
                    Query("async_rl_rollout_replicas_lost{}", "{{run}} replicas lost"),
                    Query('async_rl_rollout_replicas{state!="lost"}', "{{run}} replicas {{state}}"),
                ),
                "Processes that died and were restarted, by kind, checkpoints written, replicas that wait for a host, "
                "start or work, and those that the run continues without.",
                "restarts flat, checkpoints rising if asked for, all replicas at work. One restart now and then is an "
                "accident; a slope points to the machine or to the settings.",
                "`recovery.max_restarts` within `recovery.period_s` end the run, or cost it a replica "
                "(`recovery.min_replicas`); `checkpoint.every` bounds what "
                "is lost when the trainer dies.",
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
                    Query(
                        'max by (run, Component) (ray_component_rss_bytes{Component=~"gcs|raylet|agent"})',
                        "{{run}} Ray: {{Component}}",
                        dashed=True,
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
                "Wasted generation: groups dropped, and their prompts issued again.",
                "flat. A drop after a restart (worker_lost, payload_lost) is normal.",
                "stale: `async_training.max_staleness` up or `async_training.on_stale` mask. timeout: "
                "`rollout.group_timeout_s` up or `rollout.min_group_size` down.",
                width=6,
            ),
            Panel(
                "Groups failed",
                "none",
                (Query("sum by (run, reason) (async_rl_groups_failed_total{})", "{{run}} {{reason}}"),),
                "Groups given up permanently: prompts that teach nothing.",
                "zero. Check the reward function first.",
                "`reward.timeout_s`, `reward.on_error`, `rollout.environment.timeout_s`; timeout: "
                "`rollout.max_attempts` up.",
                width=6,
            ),
            Panel(
                "Groups filtered",
                "none",
                (Query("sum by (run, reason) (async_rl_groups_filtered_total{})", "{{run}} {{reason}}"),),
                "Groups that rollout.filter kept from training, because they would have taught nothing.",
                "a slope well below that of the trained groups. A steeper one: most of the generation is wasted.",
                "`data.train` to prompts that are solved sometimes, `rollout.n` up.",
                width=6,
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
                "Groups submitted after rollout.group_timeout_s without their last responses.",
                "a small share of all groups: the longest responses are the missing ones, so cutting teaches brevity.",
                "`rollout.group_timeout_s` up, `rollout.min_group_size` up.",
                width=6,
            ),
        ),
        (
            Panel(
                "Turns of agents",
                "none",
                (
                    Query("sum by (run, how) (async_rl_agent_turns_total{})", "{{run}} {{how}}"),
                    Query("sum by (run, read) (async_rl_agent_tool_calls_read_total{})", "{{run}} read: {{read}}"),
                ),
                "Turns that agents asked for, by how each came to its place, and calls of tools in them.",
                "first and extended alone. Each other one begins a trajectory of its own. read: no is a misspelt call.",
                "the agent, to send back what was said as it was; `rollout.agent.max_branches` ends one that does not.",
                width=8,
            ),
            Panel(
                "Requests to the gateway",
                "none",
                (
                    Query(
                        "sum by (run, endpoint, code) (async_rl_gateway_requests_total{})",
                        "{{run}} {{endpoint}} {{code}}",
                    ),
                ),
                "Requests of agents over HTTP, by endpoint and status code.",
                "code 200 alone. 400: what cannot be answered, or is beyond a limit; 401: of rollouts that have ended.",
                "`rollout.agent.max_turns` and `rollout.max_response_tokens` up where 400 says that there is no room.",
                width=8,
            ),
            Panel(
                "Requests joined, and fields ignored",
                "none",
                (
                    Query("sum by (run) (async_rl_gateway_requests_joined_total{})", "{{run}} joined"),
                    Query("sum by (run, field) (async_rl_gateway_fields_ignored_total{})", "{{run}} {{field}}"),
                ),
                "Requests of agents that repeated one and got its answer, and fields of sampling without effect.",
                "no joined ones. How the policy is sampled in training is for the run's settings to say.",
                "the agent's time-out up, where requests are repeated; `rollout.temperature` for the request's.",
                width=8,
            ),
        ),
        (
            Panel(
                "Turns and trajectories of a rollout",
                "none",
                (
                    Query(mean("async_rl_turns_per_rollout", "run"), "{{run}} turns", "blue"),
                    Query(mean("async_rl_trajectories_per_rollout", "run"), "{{run}} trajectories", "orange"),
                ),
                "Turns of the policy in a trained rollout, and trajectories that they make, in the mean.",
                "one trajectory. More turns take more time, and should earn more reward.",
                "`rollout.agent.max_turns` where turns grow without reward; the agent, where trajectories do.",
                width=6,
            ),
            Panel(
                "How rollouts end",
                "none",
                (Query(per_second("async_rl_rollouts_trained_total", "run, end"), "{{run}} {{end}}"),),
                "Rollouts trained per second, by how they ended.",
                "done. truncated: at a limit of tokens, turns or time; abandoned: the agent gave it up.",
                "`rollout.max_response_tokens`, `rollout.agent.max_turns` or `rollout.agent.max_sampled_tokens` up "
                "where many are truncated.",
                width=6,
            ),
            Panel(
                "Tokens that trajectories repeat",
                "percentunit",
                (Query("async_rl_prefix_recomputed_share{}"),),
                "Share of a step's tokens with which an earlier trajectory of the same rollout begins as well.",
                "near 0. The trainer computes them again.",
                "the agent, to send back what was said as it was; `rollout.agent.max_branches` ends one that does not.",
                width=6,
                high=1,
            ),
            Panel(
                "Requests refused",
                "none",
                (Query("sum by (run, code) (async_rl_agent_requests_refused_total{})", "{{run}} {{code}}"),),
                "Requests of agents that the policy refused, by code.",
                "few: an agent may end its rollouts by them. invalid_request is a mistake of the agent.",
                "`rollout.agent.max_turns` or `rollout.agent.max_branches` up for rollout_budget_exceeded, "
                "`rollout.max_response_tokens` for context_length_exceeded.",
                width=6,
            ),
        ),
        (
            Panel(
                "Rollouts by agent",
                "none",
                (Query(per_second("async_rl_agent_rollouts_total", "run, agent, end"), "{{run}} {{agent}} {{end}}"),),
                "Rollouts of agents in training that are over per second, by agent and how they ended.",
                "done. failed: the agent or its environment raised or was late; the log says which and why.",
                "the agent that fails; its limits in `rollout.agents`, where it is late or truncated.",
                width=8,
            ),
            Panel(
                "Turns of a rollout by agent",
                "none",
                (
                    Query(
                        per_second("async_rl_agent_turns_total", "run, agent")
                        + " / "
                        + per_second("async_rl_agent_rollouts_total", "run, agent"),
                        "{{run}} {{agent}}",
                    ),
                ),
                "Turns of the policy in a rollout, in the mean, of each agent.",
                "level, or it grows with the reward of the sources that the agent plays.",
                "max_turns in `rollout.agents` where turns grow without reward.",
                width=8,
            ),
            Panel(
                "Time of a rollout by agent",
                "s",
                (
                    Query(
                        per_second("async_rl_agent_rollout_seconds_total", "run, agent")
                        + " / "
                        + per_second("async_rl_agent_rollouts_total", "run, agent"),
                        "{{run}} {{agent}}",
                    ),
                ),
                "Seconds from the beginning of a rollout to its end, in the mean, of each agent.",
                "far below the time in which `async_training.max_staleness` versions pass.",
                "timeout_s or max_turns in `rollout.agents` where rollouts come too old; the source's weight in "
                "`data.sources`.",
                width=8,
            ),
        ),
        (
            Panel(
                "Calls of tools",
                "none",
                (
                    Query(
                        "sum by (run, agent, result) (async_rl_agent_tool_calls_total{})",
                        "{{run}} {{agent}} {{result}}",
                    ),
                ),
                "Calls of the tools of environments that the policy made, by result.",
                "ok by far. unknown_tool and bad_arguments fall as the policy learns how to call.",
                "the docstrings of `rollout.agent.environment`, which are all that the policy knows of its tools.",
                width=6,
            ),
            Panel(
                "Time of environments",
                "s",
                (
                    Query(
                        "sum by (run, agent, stage) (rate(async_rl_agent_environment_seconds_total{}[$window]))",
                        "{{run}} {{agent}} {{stage}}",
                    ),
                ),
                "Seconds that rollouts with environments wait in each second, by what they wait for.",
                "policy alone: the engines are busy. Much of place, setup or step: the environments hold them up.",
                "`rollout.agent.concurrent` up for place, `rollout.agent.hosts` up where its process is at one core.",
                width=6,
            ),
            Panel(
                "Environments open",
                "none",
                (Query("sum by (run, agent) (async_rl_agent_environments{})", "{{run}} {{agent}}"),),
                "Environments of rollouts that have begun and are not closed.",
                "below `rollout.agent.concurrent` times the replicas.",
                "`rollout.agent.concurrent` up where it is reached, `rollout.agent.close_s` where they do not close.",
                width=6,
            ),
            Panel(
                "Environments given up",
                "none",
                (
                    Query(
                        "sum by (run, agent, stage) (async_rl_agent_environment_late_total{})",
                        "{{run}} {{agent}} late {{stage}}",
                    ),
                    Query(
                        "sum by (run, agent, reason) (async_rl_agent_environment_hosts_lost_total{})",
                        "{{run}} {{agent}} host {{reason}}",
                    ),
                    Query(
                        "sum by (run, agent, kind) (async_rl_agent_recoveries_total{})",
                        "{{run}} {{agent}} recovered: {{kind}}",
                    ),
                ),
                "Calls of environments that were ended at their time limits, processes of environments lost, and "
                "rollouts that continued after such a loss, or that of a worker or the run.",
                "none. Each costs a rollout, and each host all that run in it, unless `rollout.agent.recovery` says "
                "otherwise. restart: they were begun again.",
                "`rollout.agent.step_s` and its like up for slow ones; `rollout.agent.hosts` up, so that less is lost; "
                "`rollout.agent.recovery` state or replay.",
                width=6,
            ),
        ),
        (
            Panel(
                "Bad rows of the datasets",
                "none",
                (Query("sum by (run, dataset) (async_rl_dataset_bad_rows_total{})", "{{run}} {{dataset}}"),),
                "Rows of the training and the evaluation file that were skipped.",
                "zero. Above it, the dataset is smaller than its file.",
                "`data.on_bad_row` fail ends the run at the first; `data.max_prompt_tokens` up where rows are too "
                "long.",
                kind="stat",
                width=6,
                steps=((1, "red"),),
            ),
            Panel(
                "Weight syncs repeated",
                "none",
                (Query("sum by (run, reason) (async_rl_sync_retries_total{})", "{{run}} {{reason}}"),),
                "Weight syncs repeated. canary: the weights arrived wrong, and the log names the layer; transfer: "
                "they did not arrive. A second failure ends the run.",
                "zero.",
                "`sync.backend` shm on one host shows whether the transfer is at fault; `sync.canary_tolerance` only "
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
                "below 110 %. Above it, the other ranks wait for one.",
                "`trainer.groups_per_step` up, or `trainer.parallel.dp` down.",
                width=6,
                low=1,
                steps=((1.1, "orange"),),
            ),
        ),
        (
            Panel(
                "Ray's object store",
                "bytes",
                (
                    Query("sum by (run) (ray_object_store_used_memory{})", "{{run}} used"),
                    Query("sum by (run) (ray_object_store_available_memory{})", "{{run}} free", dashed=True),
                    Query('sum by (run) (ray_spill_manager_objects_bytes{State="Spilled"})', "{{run}} spilled", "red"),
                ),
                "Payloads of queued groups, of those in training and in flight. Ray's own metric, which "
                "needs ray[default].",
                "used stays below free, and nothing is spilled to disk.",
                "`queue.max_bytes` down, or `async_training.staleness_threshold` down.",
                width=16,
            ),
            Panel(
                "Calls of user functions",
                "none",
                (
                    Query(
                        'sum by (run, function) (async_rl_user_calls_killed_total{replica=~"$replica"})',
                        "{{run}} {{function}} killed",
                        "red",
                    ),
                    Query(
                        'sum by (run) (async_rl_reward_retries_total{replica=~"$replica"})',
                        "{{run}} reward repeated",
                        "orange",
                    ),
                ),
                "Calls of reward and environment that were killed at their time limit, and rewards that were repeated "
                "after a failure.",
                "flat. Calls are killed: the function hangs on some input, or is slower than its limit allows. Rewards "
                "are repeated: the service that the reward asks fails.",
                "`reward.timeout_s`, `rollout.environment.timeout_s`; `reward.retries`, `reward.rate_limit`.",
            ),
        ),
    ),
)
