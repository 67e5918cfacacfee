"""SglangEngine: the ``RolloutEngine`` on SGLang's server. Knows its HTTP interface; neither Ray nor the trainer.

True stamps (invariant 7). The server's scheduler writes down at how many tokens of each call the version changed, and
answers with the versions of all tokens. It does so exactly because it runs without overlapped scheduling: when the
version changes, no step's result is on its way.

Prefix cache. The cache key of each call has the version with which it was begun, so that no call reads what another
version has cached. A frozen call ("keep") that has no token yet would start on what an older version computed of its
prompt: it is withdrawn and begun again.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import itertools
import json
import pickle
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
import torch
from prometheus_client import Metric

from async_rl.config.schema import RunConfig
from async_rl.errors import EngineError, WeightSyncError
from async_rl.models import names
from async_rl.rollout.aside import aside
from async_rl.rollout.engine.base import BuiltInEngine
from async_rl.rollout.engine.interface import EngineLoad, EngineOutput, PauseMode, Sampling, Score
from async_rl.rollout.engine.sglang import answers
from async_rl.rollout.engine.sglang.answers import Answer, Json
from async_rl.rollout.engine.sglang.broadcasts import Broadcasts
from async_rl.rollout.engine.sglang.metrics import fetch
from async_rl.rollout.engine.sglang.server import LOADER, Server
from async_rl.rollout.gate import Outstanding
from async_rl.types import Float32Array, Int32Array
from async_rl.weights.sglang import forget_outcome, outcome
from async_rl.weights.shm_file import TensorMeta, check_against_checkpoint

# How often calls that a pause ends are ended again: one may still have been on its way to the scheduler.
_AGAIN_S = 0.05

# How long requests may take to notice that the server is gone.
_LOST_S = 5.0


@dataclass(slots=True)
class _Call:
    """One call under way."""

    rid: str
    answer: Answer = field(default_factory=Answer)
    aborted: bool = False
    """Whether it was asked to end."""
    restart: bool = False
    """Whether it is begun again if it ends without a token."""


class SglangEngine(BuiltInEngine):
    """One SGLang server. ``cores``: the CPUs of its processes; None leaves placement to the system.

    ``start`` must be called in a thread that lives as long as the engine, for the server dies with the thread that
    started it.
    """

    def __init__(self, config: RunConfig, replica: int, cores: tuple[int, ...] | None = None) -> None:
        super().__init__(config, replica)
        self._server = Server(config, replica, self._model, cores)
        self._calls: dict[str, _Call] = {}
        self._numbers = itertools.count()
        self._ended_tokens = 0  # sampled by calls that have ended
        self._under_way = Outstanding()  # calls
        self._requests = Outstanding()  # of HTTP, calls among them
        self._frozen = False
        self._table: list[TensorMeta] | None = None
        self._table_sent = False
        self._broadcasts = Broadcasts(self._post)

    @property
    def sampled_tokens(self) -> int:
        return self._ended_tokens + sum(len(call.answer.token_ids) for call in self._calls.values())

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        try:
            await self._server.start()
            self._running.set()
            await self.generate("warm-up", np.zeros(2, dtype=np.int32), Sampling(1.0, 1.0), 2)
            await self.score([np.zeros(2, dtype=np.int32)])
        except BaseException:
            await self.shutdown()
            raise

    async def shutdown(self) -> None:
        self._running.set()  # calls that wait for a resume continue, and find the engine gone
        self._server.kill()
        # Each sees that its connection is lost. In a session that is closed before, it would never return.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._requests.wait_none(), _LOST_S)
        await self._server.close()

    def check_alive(self) -> None:
        self._server.check_alive()

    async def ping(self) -> None:
        await self._scheduled()

    async def _scheduled(self) -> None:
        """Return when the scheduler has answered, and so has done what it was asked before."""
        with self._request("ping"):
            async with self._session.get("/server_info") as response:
                await response.read()

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._server.session is None:
            raise EngineError(f"replica {self._replica}: the engine is not running")
        return self._server.session

    # -- generation -----------------------------------------------------------------------------------------------

    async def generate(
        self, request_id: str, token_ids: Int32Array, sampling: Sampling, max_tokens: int, first_row: int = 0
    ) -> EngineOutput:
        row = None if self.routing_spec is None else first_row
        while True:
            await self._running.wait()
            version = self._version
            call = _Call(f"{request_id}#{next(self._numbers)}")  # of its own, also if a call is repeated
            body = answers.generate(
                call.rid,
                token_ids,
                sampling,
                max_tokens,
                stop_token_ids=self._stop_token_ids,
                cache_key=f"v{version}",
                first_row=row,
            )
            await self._run(call, body)
            answer = call.answer
            self._ended_tokens += len(answer.token_ids)
            # A call that had no token at a push began on what the older weights had computed of its prompt.
            mixed = answer.first_version not in (None, str(version))
            if not mixed and (answer.token_ids or not call.restart):
                break
        output = await aside(answer.nbytes, lambda: answer.output(len(token_ids), row, self._model))
        if output.finish_reason == "abort" and not call.aborted:
            assert answer.last is not None
            said = answer.last["finish_reason"].get("message") or "the server gave no reason"
            raise EngineError(f"replica {self._replica}: {request_id}: the server ended the call: {said}")
        return output

    async def _run(self, call: _Call, body: Json) -> None:
        """Make one call and take in its answer; ``_calls`` has it meanwhile."""
        self._calls[call.rid] = call
        self._under_way.begin()
        try:
            with self._request(call.rid):
                async for answered in self._stream(body):
                    call.answer.add(answered)
            if call.answer.last is None:
                raise EngineError(f"replica {self._replica}: {call.rid}: the answer ended before its last part")
        except asyncio.CancelledError:
            # The server notices a closed connection seconds later.
            with contextlib.suppress(EngineError):
                await asyncio.shield(self._post("/abort_request", {"rid": call.rid}))
            raise
        finally:
            del self._calls[call.rid]
            self._under_way.end()

    async def _stream(self, body: Json) -> AsyncIterator[Json]:
        async with self._session.post("/generate", json=body) as response:
            if response.status != 200:
                raise EngineError(f"replica {self._replica}: {body['rid']}: {await _said(response)}")
            async for event in answers.events(response.content.iter_any()):
                answered = await aside(len(event), functools.partial(json.loads, event))
                if "error" in answered:
                    raise EngineError(f"replica {self._replica}: {body['rid']}: {answered['error']}")
                yield answered

    async def score(self, sequences: list[Int32Array]) -> list[Score]:
        self._check_can_score()
        return list(await asyncio.gather(*map(self._score, sequences)))

    async def _score(self, sequence: Int32Array) -> Score:
        routed = self.routing_spec is not None
        rid = f"score#{next(self._numbers)}"
        answered = await self._post("/generate", answers.score(rid, sequence, cache_key=rid, routed=routed))
        return answers.scored(answered, len(sequence), self._model, routed=routed)

    async def load(self) -> EngineLoad:
        with self._request("load"):
            async with self._session.get("/v1/loads", params={"include": "core"}) as response:
                return answers.load(await response.json())

    def metrics(self) -> Iterable[Metric]:
        """Return the server's own metrics, with metrics.engine."""
        url = self._server.url
        return () if url is None or not self._config.metrics.engine else fetch(url)

    async def fingerprints(self, sequences: list[Int32Array]) -> list[Float32Array | None]:
        """Return None for each: the server does not show what its layers compute."""
        return [None] * len(sequences)

    # -- pause and resume -----------------------------------------------------------------------------------------

    async def pause(self, mode: PauseMode) -> None:
        self._running.clear()
        if mode == "keep":
            self._frozen = True
            await self._post("/pause_generation", {"mode": "in_place"})
            await self._scheduled()
            await self._take_back_unstarted()
            return
        while self._calls:
            if mode == "abort":
                for call in self._calls.values():
                    call.aborted = True
                await self._post("/abort_request", {"abort_all": True})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._under_way.wait_none(), _AGAIN_S)
            self.check_alive()

    async def _take_back_unstarted(self) -> None:
        """Withdraw frozen calls of which no token has arrived; one whose token is on its way ends with that."""
        for call in list(self._calls.values()):
            if not call.answer.token_ids:
                call.aborted = call.restart = True
                await self._post("/abort_request", {"rid": call.rid})

    async def resume(self) -> None:
        self._check_can_resume()
        if self._frozen:
            # It would ask CUDA for its memory, which fails where there is none.
            await self._post("/continue_generation", {"torch_empty_cache": False})
            self._frozen = False
        self._running.set()

    # -- weight transfer, as vLLM's clients call it on an actor ---------------------------------------------------

    async def init_weight_transfer_engine(self, request: Any) -> None:
        info = request.init_info
        rows = [*info["table"], *(row for sender in info.get("others", ()) for row in sender["table"])]
        table = [TensorMeta(name, dtype, tuple(shape)) for name, dtype, shape in rows]
        await asyncio.to_thread(
            check_against_checkpoint,
            table,
            self._config.model.path,
            ignored=lambda name: names.ignored(self._model, name),
        )
        self._table, self._table_sent = table, False
        if self._config.sync_backend == "nccl":
            try:
                await self._broadcasts.join(info, table)
            except EngineError as error:
                self.check_alive()
                raise WeightSyncError(str(error)) from error

    async def start_weight_update(self) -> None:
        self._check_can_begin_update()
        if self._update_begun:
            # By a trainer that died, for example. The weights that it left half-written are overwritten or never used.
            with contextlib.suppress(EngineError):
                await self._post("/end_weight_update", {})
        self._sync_failed = "it was not finished"
        self._update_begun = False

    async def update_weights(self, request: Any) -> None:
        if self._table is None:
            raise WeightSyncError("update_weights was called before init_weight_transfer_engine")
        if not self._update_begun:
            self._update_begun = True
            await self._transfer(self._post("/begin_weight_update", {}))
        if self._config.sync_backend == "nccl":
            await self._transfer(self._broadcasts.receive(request.update_info))
            return
        announcement = dict(request.update_info)
        order: Json = {"announcement": announcement}
        if not self._table_sent:
            order["table"] = [[meta.name, meta.dtype, list(meta.shape)] for meta in self._table]
        # The order travels as a tensor, because the server knows no other way to its loader.
        tensor = torch.frombuffer(bytearray(json.dumps(order).encode()), dtype=torch.uint8)
        payload = base64.b64encode(pickle.dumps([("order", tensor)])).decode()
        ranks = self._config.rollout.tensor_parallel_size
        body = {"serialized_named_tensors": [payload] * ranks, "load_format": LOADER, "flush_cache": False}
        forget_outcome(self._server.folder)
        await self._transfer(self._post("/update_weights_from_tensor", body))
        fault = await asyncio.to_thread(outcome, self._server.folder, announcement["round"], ranks)
        if fault is not None:
            self._sync_failed = fault
            raise WeightSyncError(f"replica {self._replica}: {fault}")
        self._table_sent = True

    async def finish_weight_update(self) -> None:
        self._check_can_finish_update()
        await self._transfer(self._post("/end_weight_update", {}))
        self._update_begun = False

    async def update_weight_version(self, version: str) -> None:
        self._check_can_change_version()
        body = {"new_version": str(int(version)), "abort_all_requests": False}
        await self._transfer(self._post("/update_weight_version", body))
        self._version = int(version)
        self._sync_failed = None

    # -- the server -----------------------------------------------------------------------------------------------

    async def _post(self, path: str, body: Json) -> Any:
        """Return what the server answers. Raises EngineError, and EngineDied if it is gone."""
        with self._request(path):
            async with self._session.post(path, json=body) as response:
                if response.status != 200:
                    raise EngineError(f"replica {self._replica}: {path}: {await _said(response)}")
                is_json = response.content_type == "application/json"
                return await response.json() if is_json else await response.read()

    @contextlib.contextmanager
    def _request(self, what: str) -> Iterator[None]:
        """Count a request of HTTP, and name what goes wrong with it. Raises EngineError and EngineDied."""
        self._requests.begin()
        try:
            yield
        except (aiohttp.ClientError, ConnectionError, ValueError) as error:
            self.check_alive()
            raise EngineError(
                f"replica {self._replica}: {what}: {type(error).__name__}: {error or 'the connection ended'}"
            ) from error
        finally:
            self._requests.end()


async def _said(response: aiohttp.ClientResponse) -> str:
    text = (await response.text())[:500]
    with contextlib.suppress(ValueError, KeyError, TypeError):
        answered = json.loads(text)
        text = answered.get("message") or answered["error"]["message"]
    return f"the server answered {response.status}: {text}"
