"""The figures of vLLM's own metrics, counted in fewer calls, against those that vLLM counts. vLLM without an engine."""

from __future__ import annotations

import asyncio
import collections
import copy
from unittest import mock

import numpy as np
import pytest
from prometheus_client import REGISTRY

from async_rl.config import loading
from async_rl.models.config import read_model_config
from async_rl.rollout.engine.vllm import process as vllm_process

pytestmark = pytest.mark.engine

REQUESTS = 40
ITERATIONS = 200


@pytest.fixture(scope="module")
def iterations():
    """Of an engine, as it sends them: (when, outputs of at most one per running request), as of requests that begin in
    any iteration, are preempted, get no token in some and several in others, and end in any, the first among them."""
    from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, FinishReason
    from vllm.v1.metrics.stats import PrefillStats

    draw = np.random.default_rng(0)
    waiting, running, sent = [str(i) for i in range(REQUESTS)], [], []
    for step in range(ITERATIONS):
        now = 100.0 + step * draw.uniform(0.9, 1.1)
        outputs = []
        for name in [name for name in running if draw.random() < 0.9]:
            output = EngineCoreOutput(name, [5] * int(draw.integers(1, 4)))
            if draw.random() < 0.05:
                kinds = EngineCoreEventType.PREEMPTED, EngineCoreEventType.SCHEDULED
                output.events = [EngineCoreEvent.new_event(kind, now - 0.1) for kind in kinds]
            outputs.append(output)
        if waiting and draw.random() < 0.5:
            events = [EngineCoreEvent.new_event(kind, now - 0.1 * kind) for kind in (1, 2)]
            prefill = PrefillStats(num_prompt_tokens=9, num_computed_tokens=5, num_cached_tokens=4)
            outputs.append(EngineCoreOutput(waiting[0], [5], events=events, prefill_stats=prefill))
            running.append(waiting.pop(0))
        for output in outputs:
            if draw.random() < 0.1:
                output.finish_reason = FinishReason.STOP if draw.random() < 0.5 else FinishReason.LENGTH
                running.remove(output.request_id)
        sent.append((now, outputs))
    assert not waiting
    return sent


def processor_with_requests():
    """Every fifth is for an adapter."""
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor

    processor = OutputProcessor(None, log_stats=True)
    for i in range(REQUESTS):
        params = SamplingParams(max_tokens=50, detokenize=False)
        adapter = LoRARequest("adapter", 1, "/") if i % 5 == 0 else None
        request = EngineCoreRequest(str(i), [1] * 9, None, params, None, 90.0 + i, adapter, None, None)
        request.external_req_id = f"request/{i}"
        processor.add_request(request, None)
    return processor


def processed(processor, iterations):
    """Each iteration after the processor had it: (when, outputs, its IterationStats)."""
    from vllm.v1.metrics.stats import IterationStats

    for now, outputs in copy.deepcopy(iterations):
        iteration = IterationStats()
        iteration.iteration_timestamp = now + 1000.0
        processor.process_outputs(outputs, now, iteration)
        yield now, outputs, iteration


def figures(processor, iterations, counter=None):
    """Of each iteration all that was counted in it: what vLLM has, or ``counter``; and who runs on the adapter then."""
    each = []
    for _, _, iteration in processed(processor, iterations):
        counted = vars(iteration if counter is None else counter.take())
        each.append(counted | {"running": set(processor.lora_states.requests["adapter"].running)})
    return each


def counting():
    """A processor, and what counts for it."""
    from async_rl.rollout.engine.vllm.stats import IterationCounter

    processor, counter = processor_with_requests(), IterationCounter()
    counter.count_for(processor)
    return processor, counter


def test_every_figure_is_that_of_vllm(iterations):
    plain, (quick, counter) = processor_with_requests(), counting()
    for processor in (plain, quick):
        processor.abort_requests(["7"], internal=True)
    expected = figures(plain, iterations)
    assert figures(quick, iterations, counter) == expected
    # Of what can be, nothing is missing from the comparison.
    assert sum(len(each["finished_requests"]) for each in expected) > REQUESTS / 2
    assert sum(len(each["inter_token_latencies_iter"]) for each in expected) > 5 * REQUESTS
    assert sum(each["num_preempted_reqs"] for each in expected) > 0
    assert any(each["running"] for each in expected)


def test_what_is_not_taken_after_an_iteration_adds_up(iterations):
    (each_taken, one), (all_together, other) = counting(), counting()
    apart = figures(each_taken, iterations, one)
    assert len(list(processed(all_together, iterations))) == ITERATIONS
    assert other.tokens == sum(each["num_generation_tokens"] + each["prompt_token_stats"].computed for each in apart)
    whole = vars(other.take())
    for name in ("inter_token_latencies_iter", "n_params_iter", "max_num_generation_tokens_iter"):
        assert whole[name] == [value for each in apart for value in each[name]]
    assert len(whole["finished_requests"]) == sum(len(each["finished_requests"]) for each in apart)
    assert other.tokens == 0


@pytest.mark.parametrize("nans", [False, True])
def test_only_what_has_an_adapter_takes_the_long_way(iterations, nans):
    """Or each output, where vLLM is to look for NaNs in it."""
    from vllm import envs
    from vllm.v1.metrics.stats import IterationStats

    with mock.patch.object(envs, "VLLM_COMPUTE_NANS_IN_LOGITS", nans):
        quick, _ = counting()
        with mock.patch.object(IterationStats, "update_from_output", autospec=True) as long_way:
            assert len(list(processed(quick, iterations))) == ITERATIONS
    every = [output for _, outputs in iterations for output in outputs]
    assert len(long_way.call_args_list) == sum(nans or int(output.request_id) % 5 == 0 for output in every)


@pytest.fixture
def vllm_config(recipe):
    config = loading.load(recipe)
    model = read_model_config(config.model.path)
    vllm_process.prepare(config, model)
    return vllm_process.engine_args(config, 0, model).create_engine_config()


def record(logger, processor, iterations, ranks=1):
    """As AsyncLLM's output handler does, with the data-parallel ranks in turns."""
    from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats

    for number, (now, outputs, iteration) in enumerate(processed(processor, iterations)):
        cache = PrefixCacheStats(queries=len(outputs), hits=len(outputs) // 2)
        scheduler = SchedulerStats(num_running_reqs=len(outputs), kv_cache_usage=now / 1000, prefix_cache_stats=cache)
        logger.record(scheduler, iteration if outputs else None, engine_idx=number % ranks)


def served():
    """Of vLLM, what a scrape finds; when each metric was made is of no interest."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith("vllm:") and not sample.name.endswith("_created")
    }


async def test_a_scrape_finds_what_vllm_would_serve(iterations, vllm_config):
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    from async_rl.rollout.engine.vllm.stats import RECORDED_AFTER_S, BatchedStatLogger

    record(PrometheusStatLogger(vllm_config), processor_with_requests(), iterations)
    expected = served()
    batched, processor = BatchedStatLogger(vllm_config), processor_with_requests()
    batched.counter.count_for(processor)
    record(batched, processor, iterations)
    await asyncio.sleep(RECORDED_AFTER_S + 0.5)
    assert served() == pytest.approx(expected)
    # Every histogram has observed something, so that none is equal for being empty.
    counts = {name: value for (name, *_), value in expected.items() if name.endswith("_count")}
    assert len(counts) > 15
    assert all(counts.values())


async def test_what_schedulers_say_is_of_their_data_parallel_rank_and_all_else_of_all(iterations, vllm_config):
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    from async_rl.rollout.engine.vllm.stats import RECORDED_AFTER_S, BatchedStatLogger

    record(PrometheusStatLogger(vllm_config, [0, 1]), processor_with_requests(), iterations, ranks=2)
    expected = served()
    batched, processor = BatchedStatLogger(vllm_config, [0, 1]), processor_with_requests()
    batched.counter.count_for(processor)
    record(batched, processor, iterations, ranks=2)
    assert batched.last[0].kv_cache_usage != batched.last[1].kv_cache_usage
    await asyncio.sleep(RECORDED_AFTER_S + 0.5)
    found = served()
    of_schedulers = ("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:prefix_cache_queries_total")
    by_rank = {key: value for key, value in expected.items() if key[0] in of_schedulers}
    assert len(by_rank) == 2 * len(of_schedulers)
    assert {key: found[key] for key in by_rank} == pytest.approx(by_rank)
    assert of_all(found) == pytest.approx(of_all(expected))


def of_all(samples):
    """The sums over ranks."""
    sums = collections.Counter()
    for (name, *labels), value in samples.items():
        sums[name, *(label for label in labels if label[0] != "engine")] += value
    return sums
