"""Collects vLLM's own metrics at less cost than vLLM does.

vLLM counts each token and records each iteration of the engine on the event loop that hands out its tokens. This module
knows vLLM's PrometheusStatLogger, what that is given, and the OutputProcessor that fills it in. It imports vLLM, so
only rollout workers import it.
"""

from __future__ import annotations

import asyncio
import collections
import copy
import itertools
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.v1.engine import EngineCoreEventType
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import IterationStats, PrefixCacheStats

from async_rl.metrics.batched import BatchedHistogram

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

# Iterations wait so long at most; a scrape comes every fifteen seconds.
RECORDED_AFTER_S = 2.0
# What the statistics of a scheduler have beside gauges and the prefix cache, if it is set up for it.
_RARE = ("connector_prefix_cache_stats", "spec_decoding_stats", "kv_connector_stats", "perf_stats")
# The histograms of an iteration, with what it has of their observations: one for each token, or for each request.
_OF_ITERATION = {
    "histogram_inter_token_latency": "inter_token_latencies_iter",
    "histogram_time_to_first_token": "time_to_first_tokens_iter",
    "histogram_max_num_generation_tokens_request": "max_num_generation_tokens_iter",
    "histogram_n_request": "n_params_iter",
}
# The histograms of requests that have ended, with what each observes of one.
_OF_FINISHED: dict[str, Callable[[Any], float]] = {
    "histogram_e2e_time_request": attrgetter("e2e_latency"),
    "histogram_queue_time_request": attrgetter("queued_time"),
    "histogram_prefill_time_request": attrgetter("prefill_time"),
    "histogram_inference_time_request": attrgetter("inference_time"),
    "histogram_decode_time_request": attrgetter("decode_time"),
    "histogram_request_num_preemptions": attrgetter("num_preemptions"),
    "histogram_prefill_kv_computed_request": lambda request: (
        request.num_prompt_tokens - max(request.num_cached_tokens, 0)
    ),
    "histogram_num_prompt_tokens_request": attrgetter("num_prompt_tokens"),
    "histogram_num_generation_tokens_request": attrgetter("num_generation_tokens"),
    "histogram_request_time_per_output_token": attrgetter("mean_time_per_output_token"),
}


class IterationCounter:
    """Counts what vLLM counts in each iteration, for all iterations until they are taken, in one call for each output.

    vLLM makes a chain of three, in which it imports a module and reads an environment variable. How often adapters are
    used, and whether there are NaNs, is left to it, and so is what ends a request.
    """

    def __init__(self) -> None:
        self._counted = IterationStats()

    @property
    def tokens(self) -> int:
        """Computed so far, of prompts and responses."""
        return int(self._counted.prompt_token_stats.computed + self._counted.num_generation_tokens)

    def take(self) -> Any:
        """Return the IterationStats of all iterations since the last call."""
        counted, self._counted = self._counted, IterationStats()
        return counted

    def count_for(self, processor: Any) -> None:  # noqa: C901 - one call for each output, see the class
        """From now on the OutputProcessor counts here, and not in the IterationStats that it is given."""
        process, count_by_vllm = processor.process_outputs, processor._update_stats_from_output
        nans = envs.VLLM_COMPUTE_NANS_IN_LOGITS
        queued, scheduled, preempted = (
            EngineCoreEventType.QUEUED,
            EngineCoreEventType.SCHEDULED,
            EngineCoreEventType.PREEMPTED,
        )

        def process_outputs(outputs: Sequence[Any], timestamp: float | None = None, iteration: Any = None) -> Any:
            if iteration is not None:
                self._counted.iteration_timestamp = iteration.iteration_timestamp
                iteration = self._counted
            return process(outputs, timestamp, iteration)

        def count(request: Any, output: Any, timestamp: float, counted: Any) -> None:
            if counted is None:
                return
            if nans or request.lora_name is not None:
                count_by_vllm(request, output, timestamp, counted)
                return
            stats, tokens = request.stats, len(output.new_token_ids)
            stats.num_generation_tokens += tokens
            counted.num_generation_tokens += tokens
            if request.is_prefilling:
                if output.prefill_stats is not None:
                    counted.prompt_token_stats.update_from_output(output.prefill_stats)
                stats.first_token_latency = counted.iteration_timestamp - stats.arrival_time
                counted.time_to_first_tokens_iter.append(stats.first_token_latency)
                stats.first_token_ts = timestamp
            else:
                counted.inter_token_latencies_iter.append(timestamp - stats.last_token_ts)
            stats.last_token_ts = timestamp
            if output.events is not None:
                for event in output.events:
                    if event.type == queued:
                        stats.queued_ts = event.timestamp
                    elif event.type == scheduled:
                        # Again after a preemption, which does not count.
                        stats.scheduled_ts = stats.scheduled_ts or event.timestamp
                    elif event.type == preempted:
                        stats.num_preemptions += 1
                        counted.num_preempted_reqs += 1

        processor.process_outputs = process_outputs
        processor._update_stats_from_output = count


class BatchedStatLogger(PrometheusStatLogger):  # type: ignore[misc]  # vLLM has no types here
    """The same metrics, recorded for the iterations of two seconds together; on the event loop of its engine."""

    _histogram_cls = BatchedHistogram

    def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
        super().__init__(vllm_config, engine_indexes)
        # What is counted of iterations and requests, of all data-parallel ranks together, is shown as the first one's.
        self._engine = self.engine_indexes[0]
        self.counter = IterationCounter()
        self._schedulers: dict[int, list[Any]] = {}  # by rank, of each iteration that waits its statistics
        self.last: dict[int, Any] = {}
        """The SchedulerStats of the last iteration, by data-parallel rank."""
        self._tokens = [0]  # counted by the end of each
        self._timer: asyncio.TimerHandle | None = None
        # Observed here for each iteration: of those that are added up, vLLM would observe the sum.
        self._iteration_tokens: Any = self.histogram_iteration_tokens[self._engine]
        self.histogram_iteration_tokens: dict[int, Any] = dict.fromkeys(self.engine_indexes, _Nowhere())

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            self._schedulers.setdefault(engine_idx, []).append(scheduler_stats)
            self.last[engine_idx] = scheduler_stats
        if iteration_stats is not None:
            self._tokens.append(self.counter.tokens)
        if mm_cache_stats is not None:
            super().record(None, None, mm_cache_stats, engine_idx)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(RECORDED_AFTER_S, self._record_waiting)

    def _record_waiting(self) -> None:
        self._timer = None
        schedulers, self._schedulers = self._schedulers, {}
        tokens, self._tokens = self._tokens, [0]
        self._iteration_tokens.observe_all([after - before for before, after in itertools.pairwise(tokens)])
        usual: dict[int, list[Any]] = {self._engine: []}
        for rank, each in schedulers.items():
            usual[rank] = []
            for stats in each:
                if stats.kv_cache_eviction_events or any(getattr(stats, name) is not None for name in _RARE):
                    super().record(stats, None, engine_idx=rank)
                else:
                    usual[rank].append(stats)
        counted = self.counter.take()
        # vLLM would observe these one by one, and what is left in ``counted`` it does.
        for name, observations in _OF_ITERATION.items():
            getattr(self, name)[self._engine].observe_all(getattr(counted, observations))
            setattr(counted, observations, [])
        self._record_finished(counted.finished_requests)
        counted.finished_requests = []
        for rank, each in usual.items():
            super().record(_latest(each), counted if rank == self._engine else None, engine_idx=rank)

    def _record_finished(self, requests: Sequence[Any]) -> None:
        for name, observed in _OF_FINISHED.items():
            getattr(self, name)[self._engine].observe_all(list(map(observed, requests)))
        limits = [request.max_tokens_param for request in requests if request.max_tokens_param]
        self.histogram_max_tokens_request[self._engine].observe_all(limits)
        for reason, count in collections.Counter(request.finish_reason for request in requests).items():
            self.counter_request_success[reason][self._engine].inc(count)


def install_counter(llm: AsyncLLM) -> None:
    """Have an engine that was given BatchedStatLogger count for it."""
    for logger in llm.logger_manager.stat_loggers:
        if isinstance(logger, BatchedStatLogger):
            logger.counter.count_for(llm.output_processor)


def _latest(schedulers: Sequence[Any]) -> Any:
    """Merge scheduler statistics: the gauges of the last, and the sums of the prefix cache's counters."""
    if not schedulers:
        return None
    whole = copy.copy(schedulers[-1])
    caches = [stats.prefix_cache_stats for stats in schedulers]
    whole.prefix_cache_stats = PrefixCacheStats(
        queries=sum(cache.queries for cache in caches), hits=sum(cache.hits for cache in caches)
    )
    return whole


class _Nowhere:
    """In place of a histogram."""

    def observe(self, value: float) -> None:
        pass
