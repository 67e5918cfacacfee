"""vLLM's own metrics at less cost: it counts each token and records each iteration of the engine on the event loop
that hands out its tokens.

Knows vLLM's PrometheusStatLogger, what it is given, and the OutputProcessor that fills it in; imports vLLM, so it is
imported in rollout workers only.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeVar

from vllm import envs
from vllm.v1.metrics.loggers import PrometheusStatLogger

from async_rl.metrics.batched import BatchedHistogram

# Iterations wait so long at most; a scrape comes every fifteen seconds.
_RECORDED_AFTER_S = 0.5
# What the statistics of a scheduler have beside gauges and the prefix cache, if it is set up for it.
_RARE = ("connector_prefix_cache_stats", "spec_decoding_stats", "kv_connector_stats", "perf_stats")

Stats = TypeVar("Stats")


class BatchedStatLogger(PrometheusStatLogger):  # type: ignore[misc]  # vLLM has no types here
    """The same metrics, recorded for the iterations of half a second together; on the event loop of its engine."""

    _histogram_cls = BatchedHistogram

    def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
        super().__init__(vllm_config, engine_indexes)
        self._waiting: dict[int, list[tuple[Any, Any, Any]]] = defaultdict(list)
        self._timer: asyncio.TimerHandle | None = None
        # Observed here for each iteration: of those that are added up, vLLM would observe the sum.
        self._iteration_tokens: dict[int, Any] = self.histogram_iteration_tokens
        self.histogram_iteration_tokens: dict[int, Any] = dict.fromkeys(self._iteration_tokens, _Nowhere())

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        self._waiting[engine_idx].append((scheduler_stats, iteration_stats, mm_cache_stats))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_RECORDED_AFTER_S, self._record_waiting)

    def _record_waiting(self) -> None:
        self._timer = None
        each, self._waiting = self._waiting, defaultdict(list)
        for engine, waiting in each.items():
            of_schedulers, of_iterations, of_caches = zip(*waiting, strict=True)
            self._iteration_tokens[engine].observe_all(
                [
                    stats.prompt_token_stats.computed + stats.num_generation_tokens
                    for stats in of_iterations
                    if stats is not None
                ]
            )
            usual = []
            for stats in of_schedulers:
                if stats is None:
                    continue
                if stats.kv_cache_eviction_events or any(getattr(stats, name) is not None for name in _RARE):
                    super().record(stats, None, engine_idx=engine)
                else:
                    usual.append(stats)
            iterations = summed(of_iterations)
            if iterations is not None:  # one for each token: vLLM would observe them one by one
                self.histogram_inter_token_latency[engine].observe_all(iterations.inter_token_latencies_iter)
                iterations.inter_token_latencies_iter = []
            super().record(_latest(usual), iterations, summed(of_caches), engine)


def count_in_one_pass(processor: Any) -> None:
    """Have an OutputProcessor count the tokens of an iteration in a loop of their own; the figures stay the same.

    vLLM makes two calls for each token, amid the work on it. What begins or ends a request is left to them.
    """
    process = processor.process_outputs
    if processor.tracing_enabled or envs.VLLM_COMPUTE_NANS_IN_LOGITS:
        return  # both look at each token's statistics

    def process_outputs(outputs: Sequence[Any], timestamp: float | None = None, iteration: Any = None) -> Any:
        if iteration is None:
            return process(outputs, timestamp, None)
        ended = []
        for output in outputs:
            request = processor.request_states.get(output.request_id)
            if request is None:  # aborted
                continue
            if request.is_prefilling or output.events is not None:
                processor._update_stats_from_output(request, output, timestamp, iteration)
            else:
                stats, tokens = request.stats, len(output.new_token_ids)
                stats.num_generation_tokens += tokens
                iteration.num_generation_tokens += tokens
                iteration.inter_token_latencies_iter.append(timestamp - stats.last_token_ts)
                stats.last_token_ts = timestamp
            if output.finish_reason is not None:
                ended.append((request, output.finish_reason))
        processed = process(outputs, timestamp, None)
        for request, reason in ended:
            processor._update_stats_from_finished(request, reason, iteration)
        return processed

    processor.process_outputs = process_outputs


def summed(each: Sequence[Stats | None]) -> Stats | None:
    """Statistics that count all that ``each`` count: numbers added up, lists joined, nested statistics likewise, and
    anything else as the last one has it. None if all are None."""
    known = [stats for stats in each if stats is not None]
    if not known:
        return None
    whole = copy.copy(known[-1])
    for name, value in vars(whole).items():
        values = [getattr(stats, name) for stats in known]
        if isinstance(value, int):
            setattr(whole, name, sum(values))
        elif isinstance(value, list):
            setattr(whole, name, [item for part in values for item in part])
        elif dataclasses.is_dataclass(value):
            setattr(whole, name, summed(values))
    return whole


def _latest(of_schedulers: Sequence[Any]) -> Any:
    """The gauges of the last, and what all counted in the prefix cache."""
    if not of_schedulers:
        return None
    whole = copy.copy(of_schedulers[-1])
    whole.prefix_cache_stats = summed([stats.prefix_cache_stats for stats in of_schedulers])
    return whole


class _Nowhere:
    """In place of a histogram."""

    def observe(self, value: float) -> None:
        pass
