"""Engines: the metrics that vLLM and SGLang have of their own."""

from __future__ import annotations

from .panel import TOKENS_PER_SECOND, Panel, Query, Row

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
    ),
)
