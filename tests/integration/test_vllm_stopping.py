"""Stop strings in the frontend of the real vLLM, without an engine: what a call has that ends at one."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from async_rl.rollout.engine.interface import Sampling
from async_rl.rollout.engine.vllm.engine import VllmEngine
from async_rl.rollout.engine.vllm.ranks import Ranks


def letters(tokens):
    return "".join(chr(ord("a") + token) for token in tokens)


class FakeCore:
    """An engine of which only the frontend is there: ``add_request`` registers with vLLM's output processor."""

    errored = False

    def __init__(self):
        from vllm.v1.engine.output_processor import OutputProcessor

        self.output_processor = OutputProcessor(None, log_stats=False)

    async def add_request(self, request_id, prompt, params, data_parallel_rank):
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.output_processor import RequestOutputCollector

        collector = RequestOutputCollector(params.output_kind, request_id)
        request = EngineCoreRequest(
            request_id, list(prompt["prompt_token_ids"]), None, params, None, 0.0, None, None, None,
            external_req_id=request_id,
        )  # fmt: skip
        self.output_processor.add_request(request, None, queue=collector)
        return collector

    def step(self, request_id, tokens):
        from vllm.v1.engine import EngineCoreOutput
        from vllm.v1.outputs import LogprobsLists

        logprobs = LogprobsLists(
            np.array([[token] for token in tokens]), np.full((len(tokens), 1), -1.5, np.float32), np.zeros(len(tokens))
        )
        output = EngineCoreOutput(
            request_id, tokens, new_logprobs=logprobs, routed_experts=np.full((len(tokens), 2, 1), tokens[0], np.uint8)
        )
        return self.output_processor.process_outputs([output]).reqs_to_abort

    async def abort(self, *_, **__):
        """Nothing to abort."""


@pytest.mark.parametrize("searched", [True, False])
async def test_a_call_ends_with_the_token_that_completes_a_stop_string_begun_in_an_earlier_call(searched):
    engine = VllmEngine.__new__(VllmEngine)
    engine._llm, engine._replica, engine._version, engine._ended_tokens = FakeCore(), 0, 3, 0
    engine._calls, engine._stop_token_ids, engine._ranks = {}, [25], Ranks(1, spread=1)
    engine._decode, engine._stop_strings = letters if searched else None, engine._new_stop_strings
    engine._config = SimpleNamespace(rollout=SimpleNamespace(return_routed_experts=False))
    engine._model = SimpleNamespace(routing_spec=None)
    engine._running = asyncio.Event()
    engine._running.set()
    sampling = Sampling(1.0, 1.0, stop=("cde",), turn_start=1)
    sent = np.array([4, 1, 2, 3], np.int32)  # a prompt "e" and a response "bcd"
    call = asyncio.create_task(engine.generate("r", sent, sampling, 8))
    await asyncio.sleep(0)
    core = engine._llm
    assert engine.sampled_tokens == 0
    aborted = core.step("r", [4])
    if not searched:
        assert aborted == []
        call.cancel()
        return
    assert aborted == ["r"]
    output = await call
    assert (output.token_ids.tolist(), output.logprobs.tolist()) == ([4], [-1.5])
    assert (output.versions.tolist(), output.finish_reason) == ([3], "stop")
    assert core.output_processor.request_states == {}
