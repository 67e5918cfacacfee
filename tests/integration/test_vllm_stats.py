"""The figures of vLLM's own metrics, counted in one pass, against those that vLLM counts. vLLM without an engine."""

from __future__ import annotations

import copy
from unittest import mock

import numpy as np
import pytest

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
                output.events = [EngineCoreEvent.new_event(EngineCoreEventType.PREEMPTED, now)]
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
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor

    processor = OutputProcessor(None, log_stats=True)
    for i in range(REQUESTS):
        params = SamplingParams(max_tokens=50, detokenize=False)
        request = EngineCoreRequest(str(i), [1] * 9, None, params, None, 90.0 + i, None, None, None)
        request.external_req_id = f"request/{i}"
        processor.add_request(request, None)
    return processor


def figures(processor, iterations):
    """Of each iteration all that vLLM has counted in it."""
    from vllm.v1.metrics.stats import IterationStats

    each = []
    for now, outputs in copy.deepcopy(iterations):
        iteration = IterationStats()
        iteration.iteration_timestamp = now + 1000.0
        processor.process_outputs(outputs, now, iteration)
        each.append(vars(iteration))
    return each


def test_in_one_pass_every_figure_is_that_of_vllm(iterations):
    from async_rl.rollout.vllm_stats import count_in_one_pass

    plain, quick = processor_with_requests(), processor_with_requests()
    count_in_one_pass(quick)
    plain.abort_requests(["7"], internal=True)
    quick.abort_requests(["7"], internal=True)
    expected = figures(plain, iterations)
    assert figures(quick, iterations) == expected
    # Of what can be, nothing is missing from the comparison.
    assert sum(len(each["finished_requests"]) for each in expected) > REQUESTS / 2
    assert sum(len(each["inter_token_latencies_iter"]) for each in expected) > 5 * REQUESTS
    assert sum(each["num_preempted_reqs"] for each in expected) > 0


def test_only_what_begins_a_request_or_has_an_event_takes_the_long_way(iterations):
    from vllm.v1.engine.output_processor import OutputProcessor

    from async_rl.rollout.vllm_stats import count_in_one_pass

    quick = processor_with_requests()
    count_in_one_pass(quick)
    long_way = mock.patch.object(OutputProcessor, "_update_stats_from_output", autospec=True)
    with long_way as counted:
        for now, outputs in copy.deepcopy(iterations):
            quick.process_outputs(outputs, now, mock.MagicMock(inter_token_latencies_iter=[], num_generation_tokens=0))
    with_iteration = [call for call in counted.call_args_list if call.args[4] is not None]
    assert len(with_iteration) == sum(output.events is not None for _, outputs in iterations for output in outputs)


def test_what_vllm_looks_for_in_each_token_stays_with_vllm():
    from vllm import envs

    from async_rl.rollout.vllm_stats import count_in_one_pass

    tracing, corrupt = processor_with_requests(), processor_with_requests()
    tracing.tracing_enabled = True
    count_in_one_pass(tracing)
    with mock.patch.object(envs, "VLLM_COMPUTE_NANS_IN_LOGITS", True):
        count_in_one_pass(corrupt)
    for processor in (tracing, corrupt):
        assert "process_outputs" not in vars(processor)
