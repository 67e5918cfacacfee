"""VllmEngine: the ``RolloutEngine`` on vLLM's AsyncLLM. Knows vLLM 0.30; neither Ray nor the trainer.

    frontend (this process)            engine core (a process of its own; on one CPU the model runs in it too)
    generate ── tokens, salt ───────►  scheduler ── step ── sampler
    collector ◄── final output only ── tokens, log-probs, routed experts

True stamps (invariant 7). Weights change only while the scheduler is paused, and the engine core answers ``pause``
after the outputs of all steps before it, over one ordered channel. So when the answer is here, those outputs are at
worst in the frontend's queue. The engine core loads weights while the frontend accounts for them. ``_drain_outputs``
waits for that before the version changes, and then the number of tokens that each running call has is exactly the
number sampled under the old version.

Prefix cache. Blocks computed under old weights must not serve new calls. Ending or draining all calls lets vLLM clear
the cache; frozen calls ("keep") need their blocks, so the cache key of each call is salted with the version.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog

from async_rl.config.schema import RunConfig
from async_rl.data.tokenizer import load_tokenizer
from async_rl.errors import EngineDied, EngineError
from async_rl.rollout.aside import aside
from async_rl.rollout.engine.base import BuiltInEngine
from async_rl.rollout.engine.interface import CallEnd, EngineLoad, EngineOutput, Part, PauseMode, Sampling, Score
from async_rl.rollout.engine.vllm import process as vllm_process
from async_rl.rollout.engine.vllm.ranks import Ranks
from async_rl.rollout.engine.vllm.stopping import StoppingDetokenizer
from async_rl.rollout.routing_policies import moe_columns
from async_rl.rollout.stats import worker_id
from async_rl.rollout.stop_strings import Decode, StopStrings, decoder
from async_rl.runtime import logs
from async_rl.runtime.process import starting_on
from async_rl.types import ExpertIds, Float32Array, Int32Array

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

log = structlog.get_logger(__name__)

# How long the engine core may take to end by itself before it is killed. It holds nothing that must be saved, and on
# CPU it never makes it: with the model in its process, the garbage collection at its end hangs.
SHUTDOWN_GRACE_S = 0.5

# How vLLM's finish reasons count here. A repetitive pattern was detected: the response was cut, it did not stop.
_CALL_END: dict[str, CallEnd] = {"stop": "stop", "length": "length", "abort": "abort", "repetition": "length"}

# vLLM calls its finish reason "error" retryable: a KV block that could not be loaded, for example.
_MAX_FAILURES = 4
_BACKOFF_S = 0.1

# Sources have a few, but each row may have its own.
_KNOWN_STOPS = 256

# What a token's id and log-prob take in vLLM's lists, references included.
_BYTES_PER_TOKEN = 72

# So many more objects than at the last collection begin the next one. Python's 700 are those of one iteration, which
# end with it: collections took a fifteenth of the frontend's time per token.
_COLLECTED_AFTER = 20_000


@dataclass(slots=True)
class _Call:
    """One call under way. ``boundaries``: (tokens sampled so far, version they were sampled with), one per push."""

    internal_id: str
    boundaries: list[tuple[int, int]] = field(default_factory=list)
    restart: bool = False


class VllmEngine(BuiltInEngine):
    """One vLLM engine. ``cores``: the CPUs of its engine core and workers; None leaves placement to the system.

    ``start`` must be called on the event loop that ``generate`` will run on, and blocks it while the model loads; in a
    thread that lives as long as the engine, for the engine core dies with the thread that started it.
    """

    def __init__(self, config: RunConfig, replica: int, cores: tuple[int, ...] | None = None) -> None:
        super().__init__(config, replica)
        self._cores = cores
        self._decode: Decode | None = None  # set if there may be stop strings
        self._stop_strings = functools.lru_cache(_KNOWN_STOPS)(self._new_stop_strings)
        self._llm: AsyncLLM | None = None
        self._calls: dict[str, _Call] = {}
        self._ended_tokens = 0  # sampled by calls that have ended
        rollout = config.rollout
        self._ranks = Ranks(rollout.data_parallel_size, spread=max(1, rollout.places_per_rank // 2))
        self._part: Part | None = None
        self._lost: str | None = None  # why another part has ended

    @property
    def sampled_tokens(self) -> int:
        if self._llm is None:
            return self._ended_tokens
        return self._ended_tokens + sum(self._sampled(call) or 0 for call in self._calls.values())

    # -- life -----------------------------------------------------------------------------------------------------

    def span(self, part: Part) -> None:
        self._part = part

    def lose_part(self, why: str) -> None:
        # Its ranks would wait for those of the other part, on GPUs for as long as the collective's own limit.
        self._lost = self._lost or why
        vllm_process.kill_engine_processes()

    async def start(self) -> None:
        vllm_process.prepare(self._config, self._model, self._part)
        if self._config.uses_stop_strings:
            self._decode = decoder(load_tokenizer(self._config))
        from vllm.utils.gc_utils import freeze_gc_heap
        from vllm.v1.engine.async_llm import AsyncLLM

        if (ranks := self._config.rollout.data_parallel_size) > 1:
            from async_rl.weights.vllm.children import prepare_children

            prepare_children()
        role = worker_id(self._replica)
        logs.lend_to_children(self._config.run_dir, role)
        before = logs.children_logs(self._config.run_dir, role)
        try:
            with starting_on(self._cores):
                self._llm = AsyncLLM.from_engine_args(
                    vllm_process.engine_args(self._config, self._replica, self._model, self._part),
                    stat_loggers=vllm_process.stat_loggers(self._config),
                )
            if self._config.metrics.engine:
                from async_rl.rollout.engine.vllm.stats import install_counter

                install_counter(self._llm)
            # Cached by AsyncLLM; from now on a call is in the scheduler's channel without a suspension in between.
            await self._llm.get_supported_tasks()
        except Exception as error:
            await self.shutdown()
            why = self._lost or vllm_process.why_not_started(self._config, role, error, before)
            raise EngineError(f"replica {self._replica}: the vLLM engine did not start: {why}") from error
        vllm_process.check_layout(self._llm.model_config.hf_text_config, self._model)
        if ranks > 1:
            await self._engine.collective_rpc("seed_by_rank")
        self._running.set()
        await self._warm_up()
        # What is loaded by now stays. Full collections looked through all of it, on the loop that hands out tokens.
        freeze_gc_heap()
        gc.set_threshold(_COLLECTED_AFTER, *gc.get_threshold()[1:])

    async def _warm_up(self) -> None:
        """Make the first call of each kind: if vLLM compiles its sampler, that call takes seconds."""
        prompt, ranks = np.zeros(2, dtype=np.int32), self._config.rollout.data_parallel_size
        for sampling in (Sampling(1.0, 1.0), Sampling(1.0, 0.9), Sampling(1.0, 1.0, greedy=True)):
            for calls in (1, 3):  # compiled for one row, then for any number
                calls *= ranks
                await asyncio.gather(*(self.generate(f"warm-up/{i}", prompt, sampling, 2) for i in range(calls)))
        await self.score([prompt] * ranks)

    async def shutdown(self) -> None:
        llm, self._llm = self._llm, None
        self._running.set()  # calls that wait for a resume continue, and find the engine gone
        if llm is None:
            return
        # It would warn that it had to kill, which is what is wanted: see SHUTDOWN_GRACE_S.
        logging.getLogger("vllm.v1.utils").setLevel(logging.ERROR)
        llm.shutdown(timeout=SHUTDOWN_GRACE_S)
        # Its tasks hold sockets: let them see their cancellation while there is a loop.
        await asyncio.sleep(0)

    def check_alive(self) -> None:
        if self._engine.errored:
            raise self._death("")

    def _death(self, when: str) -> EngineDied:
        why = "" if self._lost is None else f": {self._lost}"
        return EngineDied(f"replica {self._replica}: {when}the vLLM engine died{why}")

    async def ping(self) -> None:
        await self._engine.is_sleeping()  # the cheapest question that the engine core itself answers

    @property
    def _engine(self) -> AsyncLLM:
        if self._llm is None:
            raise EngineError(f"replica {self._replica}: the engine is not running")
        return self._llm

    # -- generation -----------------------------------------------------------------------------------------------

    async def generate(
        self, request_id: str, token_ids: Int32Array, sampling: Sampling, max_tokens: int, first_row: int = 0
    ) -> EngineOutput:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            temperature=0.0 if sampling.greedy else sampling.temperature,
            top_p=1.0 if sampling.greedy else sampling.top_p,
            top_k=0 if sampling.greedy else sampling.top_k,
            max_tokens=max_tokens,
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            detokenize=False,
            stop_token_ids=[*self._stop_token_ids, *sampling.stop_token_ids],
            routed_experts_prompt_start=first_row,
            # Not DELTA, which loses routed experts when the consumer lags; and nobody reads tokens one by one.
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        failures = 0
        while True:
            await self._running.wait()
            with self._errors(request_id), self._ranks.one_for(request_id) as rank:
                call, output = await self._run(request_id, token_ids, params, sampling, rank)
            completion = output.outputs[0]
            if completion.finish_reason == "error":
                failures += 1
                await self._back_off(request_id, failures)
            elif not (call.restart and not completion.token_ids):
                break
        self._ended_tokens += len(completion.token_ids)
        # Now: the version may change while the rest is done.
        versions = self._stamps(call, len(completion.token_ids))
        nbytes = _BYTES_PER_TOKEN * len(versions) + getattr(completion.routed_experts, "nbytes", 0)
        return await aside(nbytes, lambda: self._output(completion, versions, output.num_cached_tokens))

    def _output(self, completion: Any, versions: Int32Array, cached: int | None) -> EngineOutput:
        """Return what a call has sampled. Of vLLM's lists and columns it makes arrays. Raises EngineError."""
        end = _CALL_END.get(completion.finish_reason)
        if end is None:
            raise EngineError(
                f"replica {self._replica}: a call has ended by {completion.finish_reason!r}, which this package does "
                "not know"
            )
        return EngineOutput(
            token_ids=np.asarray(completion.token_ids, dtype=np.int32),
            logprobs=_logprobs(completion.logprobs),
            versions=versions,
            routed_experts=self._columns(completion.routed_experts) if len(versions) else None,
            finish_reason=end,
            cached_tokens=cached,
        )

    async def load(self) -> EngineLoad:
        """Return what the scheduler last said of itself, with metrics.engine; else the size of its KV cache alone."""
        return vllm_process.load(self._engine)

    async def _back_off(self, request_id: str, failures: int) -> None:
        """Wait before a call is repeated that failed inside the engine. Raises EngineError after _MAX_FAILURES."""
        log.warning("engine_call_failed", request=request_id, failures=failures)
        if failures == _MAX_FAILURES:
            raise EngineError(f"replica {self._replica}: {request_id}: the engine failed the call {failures} times")
        await asyncio.sleep(_BACKOFF_S * 2**failures)

    async def _run(
        self, request_id: str, token_ids: Int32Array, params: Any, sampling: Sampling, rank: int
    ) -> tuple[_Call, Any]:
        """Submit one request and wait for its final output; ``_calls`` has the call meanwhile."""
        call, collector = await self._submit(request_id, token_ids, params, rank)
        if self._decode is not None and sampling.stop:
            # Nothing was suspended since the request was submitted, so that no output can be here yet.
            state = self._engine.output_processor.request_states[call.internal_id]
            stops = self._stop_strings(sampling.stop)
            state.detokenizer = StoppingDetokenizer(state.detokenizer, stops, token_ids[sampling.turn_start :])
        return await self._answer(call, collector)

    def _new_stop_strings(self, strings: tuple[str, ...]) -> StopStrings:
        assert self._decode is not None
        return StopStrings(strings, self._decode)

    async def _submit(self, request_id: str, token_ids: Int32Array, params: Any, rank: int) -> tuple[_Call, Any]:
        """Submit one request to a data-parallel rank.

        Returns its call, which ``_calls`` has from now on, and the collector of its output.
        """
        from vllm.inputs.engine import tokens_input

        # A rendered input is submitted without a suspension (the socket has no limit to block at), so no pause comes
        # between the gate in ``generate`` and the scheduler's channel, nor between that and the record.
        prompt = tokens_input(token_ids.tolist(), cache_salt=f"v{self._version}")
        collector = await self._engine.add_request(request_id, prompt, params, data_parallel_rank=rank)
        call = self._calls[collector.request_id] = _Call(collector.request_id)
        return call, collector

    async def _answer(self, call: _Call, collector: Any) -> tuple[_Call, Any]:
        """Wait for the final output of a submitted request."""
        llm = self._engine
        try:
            return call, await collector.get()
        except asyncio.CancelledError:
            await llm.abort(collector.request_id, internal=True)
            raise
        finally:
            del self._calls[collector.request_id]
            collector.close()

    async def score(self, sequences: list[Int32Array]) -> list[Score]:
        self._check_can_score()
        return await self._scores(sequences)

    async def resume_and_score(self, sequences: list[Int32Array]) -> list[Score]:
        """Resume, then score ``sequences``, which are submitted before, so that one step computes all of them."""
        return await self._scores(sequences, self.resume)

    async def _scores(
        self, sequences: list[Int32Array], begin: Callable[[], Awaitable[None]] | None = None
    ) -> list[Score]:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=0,  # of the prompt's own tokens only; with it vLLM reads nothing from the prefix cache
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        with self._errors("score"):
            # In turns to the data-parallel ranks, each of which has weights of its own.
            ranks = self._config.rollout.data_parallel_size
            submitted = [await self._submit(f"score/{i}", s, params, i % ranks) for i, s in enumerate(sequences)]
            answers = asyncio.gather(*(self._answer(*each) for each in submitted))
            try:
                if begin is not None:
                    await asyncio.sleep(0)  # each is waited for before anything can cancel it
                    await begin()
                outputs = await answers
            finally:
                answers.cancel()
        if any(output.outputs[0].finish_reason == "abort" for _, output in outputs):
            raise EngineError(f"replica {self._replica}: score: a pause interrupted it")
        return [
            Score(
                _logprobs(output.prompt_logprobs),
                # One token was sampled, so the rows are those of the N sent; the last of them scores nothing.
                self._columns(output.outputs[0].routed_experts, rows=len(sequence) - 1),
            )
            for sequence, (_, output) in zip(sequences, outputs, strict=True)
        ]

    async def fingerprints(self, sequences: list[Int32Array]) -> list[Float32Array | None]:
        with self._errors("fingerprints"):
            await self._engine.collective_rpc("begin_fingerprints", args=([s.tolist() for s in sequences],))
            try:
                await self.score(sequences)
            finally:
                seen = await self._end_fingerprints()
        return [None if rows is None else np.asarray(rows, dtype=np.float32)[:, :-1] for rows in seen]

    async def _end_fingerprints(self) -> list[Any]:
        """Return each sequence's fingerprints from the data-parallel rank that scored it; see ``_scores``."""
        core = self._engine.engine_core
        # ``collective_rpc`` would return those of the first rank.
        by_rank = await asyncio.gather(
            *(
                core._call_utility_async("collective_rpc", "end_fingerprints", None, (), None, engine=engine)
                for engine in core.core_engines
            )
        )
        # Of the first tensor-parallel rank each: the stream is the same on all.
        return [by_rank[i % len(by_rank)][0][i] for i in range(len(by_rank[0][0]))]

    def _columns(self, routed: Any, rows: int | None = None) -> ExpertIds | None:
        if self.routing_spec is None:
            return None
        if routed is None:
            raise EngineError(
                f"replica {self._replica}: the engine returned no routed experts; to train without, set "
                "rollout.return_routed_experts to false and trainer.router_replay to R2 or off"
            )
        return moe_columns(routed, num_layers=self._model.num_layers, moe_layers=self._model.moe_layers)[:rows]

    def _stamps(self, call: _Call, count: int) -> Int32Array:
        versions = np.full(count, self._version, dtype=np.int32)
        start = 0
        for stop, version in call.boundaries:
            versions[start:stop] = version
            start = stop
        return versions

    # -- pause and resume -----------------------------------------------------------------------------------------

    async def pause(self, mode: PauseMode) -> None:
        llm = self._engine
        self._running.clear()
        with self._errors("pause"):
            # AsyncLLM.pause_generation is this call and a sleep of 20 ms; the drain below is exact instead.
            await llm.engine_core.pause_scheduler_async(mode=mode, clear_cache=mode != "keep")
            if mode == "keep":
                await self._drain_outputs()
                await self._take_back_unstarted()

    async def resume(self) -> None:
        self._check_can_resume()
        with self._errors("resume"):
            await self._engine.resume_generation()
        self._running.set()

    async def _drain_outputs(self) -> None:
        """Return when every output that the engine core sent before now has been accounted for in the frontend."""
        from vllm.v1.engine import EngineCoreOutputs

        llm = self._engine
        # The handler takes an item only when it is done with all before it, so an empty message taken means drained.
        queue = llm.engine_core.outputs_queue
        queue.put_nowait(EngineCoreOutputs())
        while not queue.empty():
            if llm.errored:
                raise self._death("pause: ")
            await asyncio.sleep(0)

    async def _take_back_unstarted(self) -> None:
        """Withdraw frozen calls without a token: they would start after the push on prefixes cached before it."""
        for call in self._calls.values():
            if self._sampled(call) == 0:
                call.restart = True
        await self._engine.abort([call.internal_id for call in self._calls.values() if call.restart], internal=True)

    def _sampled(self, call: _Call) -> int | None:
        """Tokens that a running call has; None when it has ended and its caller only has not looked yet."""
        state = self._engine.output_processor.request_states.get(call.internal_id)
        return None if state is None else state.detokenizer.num_output_tokens()

    # -- weight transfer, as vLLM's clients call it on an actor ---------------------------------------------------

    async def init_weight_transfer_engine(self, request: Any) -> None:
        await self._transfer(self._engine.init_weight_transfer_engine(request))

    async def start_weight_update(self) -> None:
        self._check_can_begin_update()
        if self._sync_failed is not None:
            # By a trainer that died, for example. The weights that it left half-written are overwritten or never used.
            await self._transfer(self._engine.collective_rpc("abandon_weight_update"))
        self._sync_failed = "it was not finished"
        self._update_begun = False

    async def update_weights(self, request: Any) -> None:
        # vLLM begins an update in a call of its own; here the first call with weights begins it.
        first, self._update_begun = not self._update_begun, True
        arguments = {"update_info": request.update_info, "first": first}
        await self._transfer(self._engine.collective_rpc("receive_weight_update", kwargs=arguments))

    async def finish_weight_update(self) -> None:
        self._check_can_finish_update()
        await self._transfer(self._engine.finish_weight_update())

    async def update_weight_version(self, version: str) -> None:
        self._check_can_change_version()
        with self._errors("update_weight_version"):
            await self._drain_outputs()
        for call in self._calls.values():
            sampled = self._sampled(call)
            call.boundaries.append((np.iinfo(np.int32).max if sampled is None else sampled, self._version))
        # The engine core's own record of the version is for vLLM's server, and another round trip: it has none here.
        self._version = int(version)
        self._sync_failed = None

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            yield
        except EngineDeadError as error:
            raise self._death(f"{what}: ") from error
        except (EngineGenerateError, VLLMClientError, ValueError) as error:
            raise EngineError(f"replica {self._replica}: {what}: {error or type(error).__name__}") from error


def _logprobs(flat: Any) -> Float32Array:
    """Convert vLLM's flat log-probs to float32[n], one per position; the first prompt token has no entry."""
    return np.asarray(flat.logprobs, dtype=np.float32)
