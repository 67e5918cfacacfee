"""Engines: the metrics that vLLM and SGLang have of their own."""

from __future__ import annotations

from .panel import TOKENS_PER_SECOND, Panel, Query, Row, mean, per_second

_ENGINE_LEGEND = "{{run}} replica {{replica}}"


def _engine(vllm: str, sglang: str, *, rate: bool = False, total: str = "sum") -> str:
    """Return a metric of the engines by replica; an engine with several data-parallel parts counts as one."""
    series = [f'{metric}{{replica=~"$replica"}}' for metric in (f"vllm:{vllm}", f"sglang:{sglang}")]
    either = " or ".join(f"rate({each}[$window])" if rate else each for each in series)
    return f"{total} by (run, replica) ({either})"


ENGINES = Row(
    "Engines",
    (
        (
            Panel(
                "Tokens decoded",
                TOKENS_PER_SECOND,
                (Query(_engine("generation_tokens_total", "generation_tokens_total", rate=True), _ENGINE_LEGEND),),
                "Tokens that engines sampled, those of evaluations and of the canary included.",
                "level, except for the pauses of weight syncs, and the same on all replicas.",
                "`rollout.max_num_seqs` up as long as the KV cache is not full; `rollout.enforce_eager` off.",
            ),
            Panel(
                "Tokens prefilled",
                TOKENS_PER_SECOND,
                (Query(_engine("prompt_tokens_total", "prompt_tokens_total", rate=True), _ENGINE_LEGEND),),
                "Prompt tokens that engines computed, those of resumed responses included.",
                "small against the tokens decoded, with a peak after each weight sync.",
                "`async_training.partial_rollout.mode` in_flight resumes without prefill; "
                "`rollout.max_num_batched_tokens` bounds the peak.",
            ),
            Panel(
                "KV cache in use",
                "percentunit",
                (Query(_engine("kv_cache_usage_perc", "token_usage", total="max"), _ENGINE_LEGEND),),
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
                (Query(_engine("num_requests_running", "num_running_reqs"), _ENGINE_LEGEND),),
                "Sequences that each engine decodes at once.",
                "near `rollout.max_num_seqs`. A long slope down before each weight sync is the tail of long responses.",
                "`async_training.staleness_threshold` up gives the engines more to do; `rollout.max_num_seqs` is "
                "the most.",
            ),
            Panel(
                "Requests waiting",
                "short",
                (Query(_engine("num_requests_waiting", "num_queue_reqs"), _ENGINE_LEGEND),),
                "Sequences that wait for a place in an engine.",
                "near zero. If many wait long, they are stale before they begin.",
                "`rollout.replicas` up, `rollout.max_num_seqs` up, or `async_training.staleness_threshold` down.",
            ),
            Panel(
                "Preemptions",
                "none",
                (Query(_engine("num_preemptions_total", "num_retracted_requests_total"), _ENGINE_LEGEND),),
                "Requests that lost their KV cache to others and are computed again; a total since the engine started.",
                "flat.",
                "`rollout.kv_cache_bytes` or `rollout.gpu_memory_utilization` up, `rollout.max_num_seqs` down.",
            ),
        ),
        (
            Panel(
                "Rollouts of agents in the making",
                "none",
                (
                    Query('async_rl_rollouts_in_the_making{replica=~"$replica"}', f"{_ENGINE_LEGEND} begun"),
                    Query(
                        'async_rl_rollouts_waiting{replica=~"$replica"}',
                        f"{_ENGINE_LEGEND} waiting",
                        "orange",
                        dashed=True,
                    ),
                ),
                "Rollouts of agents that have begun, also if they wait for tools, and those that may not begin yet.",
                "begun below `rollout.max_trajectories` while all places of the engine are taken.",
                "`rollout.max_trajectories` up where it is reached and the engine has free places; "
                "`rollout.max_kv_use` up where rollouts wait and nothing is computed again.",
            ),
            Panel(
                "KV cache of rollouts in the making",
                "percentunit",
                (
                    Query('async_rl_rollouts_kv_use{replica=~"$replica"}', _ENGINE_LEGEND),
                    Query(
                        mean("async_rl_kv_use_at_admission", "run, replica", 'replica=~"$replica"'),
                        f"{_ENGINE_LEGEND} when one begins",
                        dashed=True,
                    ),
                ),
                "Share of the KV cache that the contexts of agents' rollouts take, or are expected to, also of those "
                "that wait for tools.",
                "up to `rollout.max_kv_use`.",
                "`rollout.kv_cache_bytes` or `rollout.gpu_memory_utilization` up where it is at the bound, and the "
                "engine has free places.",
            ),
            Panel(
                "Contexts sent to engines",
                TOKENS_PER_SECOND,
                (
                    Query(
                        per_second("async_rl_context_tokens_total", "run, how", 'replica=~"$replica"'),
                        "{{run}} {{how}}",
                    ),
                ),
                "Tokens that calls for rollouts were given: cached, computed for the first time (new), or computed "
                "again, after a weight sync or because the cache had lost them.",
                "lost near zero, and little of weight_sync.",
                "lost: `rollout.max_kv_use` or `rollout.max_trajectories` down. weight_sync: "
                "`async_training.trigger_parameter_sync_step` up.",
            ),
        ),
    ),
)
