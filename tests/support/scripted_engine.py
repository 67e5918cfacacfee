"""A RolloutEngine that follows a script instead of computing: for unit tests, and for runs as ``rollout.engine``.

What is scripted: the length of each response, log-probs, delays, faults. What is true: version stamps, routed experts
(a row names the version that computed it), interruption, and ``score``, which a transformers model computes from the
weights that the trainer sent, so that the canary of a run means what it always means.

A run names a class of this module, ``tests.support.scripted_engine:ScriptedEngine`` for example; a scenario of its own
is a subclass with another ``script``.
"""

from __future__ import annotations

import asyncio
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from async_rl.config.schema import RunConfig
from async_rl.data.tokenizer import stop_token_ids
from async_rl.errors import EngineDied, EngineError, WeightSyncError
from async_rl.models.config import read_model_config
from async_rl.rollout.engine.interface import EngineOutput, PauseMode, Sampling, Score
from async_rl.rollout.gate import Outstanding
from async_rl.types import ExpertIds, Float32Array, Int32Array, RoutingSpec, source_of

Length = int | Sequence[int] | Callable[[str], int]

# Calls that end in one turn of the event loop, as with vLLM's front end under ``vllm.process.ENVIRONMENT``.
_ENDS_PER_TURN = 32


def lognormal(mean: float, sigma: float = 0.5) -> Callable[[str], int]:
    """Return lengths of a log-normal distribution with that mean in tokens, drawn by trajectory id."""

    def length(trajectory_id: str) -> int:
        rng = np.random.default_rng(zlib.crc32(trajectory_id.encode()))
        return max(1, round(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma)))

    return length


@dataclass(frozen=True)
class Layout:
    """What an engine knows of its model."""

    routing_spec: RoutingSpec | None
    stop_token_ids: frozenset[int]
    vocab_size: int


@dataclass(frozen=True)
class Fault:
    """What goes wrong once, after the engine has sampled ``after_tokens``."""

    kind: Literal["die", "hang", "raise", "abort", "exit"]
    """die: the engine is dead, and each call says so. hang: no call is answered any more. raise: one call raises
    EngineError. abort: one call ends before its first token. exit: the process ends as by SIGKILL."""
    after_tokens: int = 0
    replica: int = 0


@dataclass(frozen=True)
class Script:
    """How an engine behaves."""

    length: Length = 12
    """Tokens of a response up to its stop token: one number, numbers that trajectory ids pick from, or a function of
    the trajectory id. The same trajectory always has the same length, in whichever engine it is continued."""
    logprob: float | Callable[[int], float] = -3.0
    """Log-prob of each sampled token, or a function of the version that samples it."""
    tokens_per_turn: int = 1
    """Tokens that a call samples at once, after which other calls get their turn."""
    turn_s: float = 0.0
    """Seconds that these tokens take."""
    fault: Fault | None = None
    layout: Layout | None = None
    """None: read from model.path, and score with its weights."""


class ScriptedEngine:
    """One replica of a policy that says 1, 2, 3, ... (ordinary tokens in turn) and then its stop token."""

    script = Script(length=lognormal(40), tokens_per_turn=8, turn_s=0.004)

    def __init__(
        self, config: RunConfig, replica: int = 0, cores: tuple[int, ...] | None = None, script: Script | None = None
    ) -> None:
        del cores  # it computes next to nothing
        self._config = config
        self._replica = replica
        if script is not None:
            self.script = script
        self._layout = self.script.layout or _read_layout(config)
        self._ordinary = np.setdiff1d(np.arange(self._layout.vocab_size), [*self._layout.stop_token_ids])
        self._fault = self.script.fault if self.script.fault and self.script.fault.replica == replica else None
        self._scorer: _Scorer | None = None
        self._table: list[Any] | None = None
        self._running = asyncio.Event()
        self._running.set()
        self._moving = asyncio.Event()  # set while calls under way may move on, be it to their end
        self._moving.set()
        self._aborting = False
        self._calls = Outstanding()
        self._ends = asyncio.Semaphore(_ENDS_PER_TURN)
        self.version = 0
        self.dead = False
        self.hangs = False
        self.sampled = 0  # tokens, of all calls
        self._eval_limits: dict[str, int] = {}  # of responses
        self.requests: list[tuple[str, int, int]] = []  # request id, tokens sent, tokens that may be sampled

    @property
    def routing_spec(self) -> RoutingSpec | None:
        return self._layout.routing_spec if self._config.rollout.return_routed_experts else None

    @property
    def stop_token_ids(self) -> frozenset[int]:
        return self._layout.stop_token_ids

    @property
    def sampled_tokens(self) -> int:
        return self.sampled

    async def start(self) -> None:
        if self.script.layout is None:
            self._scorer = await asyncio.to_thread(_Scorer, self._config.model.path)

    async def generate(
        self, request_id: str, token_ids: Int32Array, sampling: Sampling, max_tokens: int, first_row: int = 0
    ) -> EngineOutput:
        del sampling
        self.requests.append((request_id, len(token_ids), max_tokens))
        await self._running.wait()
        self._calls.begin()
        try:
            return await self._sample(request_id, token_ids, max_tokens, first_row)
        finally:
            self._calls.end()

    async def _sample(self, request_id: str, token_ids: Int32Array, max_tokens: int, first_row: int) -> EngineOutput:
        # The worker asks for what is left of a response, so that says how much of it there is.
        trajectory_id = request_id.rpartition("/")[0]
        done = self._limit(trajectory_id, max_tokens) - max_tokens
        last = self.last_position(trajectory_id, token_ids[len(token_ids) - done :])
        left = min(max_tokens, max(1, last + 1 - done))
        turns: list[tuple[int, int]] = []  # tokens, version
        aborted = await self._fails()
        while left > 0 and not aborted:
            await asyncio.sleep(self.script.turn_s)
            await self._moving.wait()
            if self._aborting or await self._fails():
                aborted = True
                break
            count = min(left, self.script.tokens_per_turn)
            turns.append((count, self.version))
            self.sampled += count
            left -= count
        async with self._ends:
            await asyncio.sleep(0)
            versions = np.repeat(*reversed(np.array(turns, dtype=np.int32).reshape(-1, 2).T)).astype(np.int32)
            stopped = len(versions) > 0 and done + len(versions) > last
            return EngineOutput(
                token_ids=self._tokens(done, len(versions), stopped=stopped),
                logprobs=self._logprobs(versions),
                versions=versions,
                routed_experts=self._rows(len(token_ids), versions, first_row) if len(versions) else None,
                finish_reason="abort" if aborted else "stop" if stopped else "length",
            )

    def _limit(self, trajectory_id: str, max_tokens: int) -> int:
        """Return the most tokens of a response; of an evaluation's, which begin here, those of its first call."""
        if trajectory_id.startswith("eval/"):
            return self._eval_limits.setdefault(trajectory_id, max_tokens)
        return self._config.terms(source_of(trajectory_id.rpartition("/")[0])).max_response_tokens

    def _tokens(self, done: int, count: int, *, stopped: bool) -> Int32Array:
        sampled = self._ordinary[np.arange(done, done + count) % len(self._ordinary)].astype(np.int32)
        if stopped:
            sampled[-1] = min(self.stop_token_ids)
        return sampled

    def last_position(self, trajectory_id: str, response: Int32Array) -> int:
        """Return where the response, of which these tokens are there, has its stop token."""
        del response
        length = self.script.length
        if isinstance(length, Sequence):
            length = length[zlib.crc32(trajectory_id.encode()) % len(length)]
        return (length if isinstance(length, int) else length(trajectory_id)) - 1

    def _logprobs(self, versions: Int32Array) -> Float32Array:
        logprob = self.script.logprob
        if not callable(logprob):
            return np.full(len(versions), logprob, dtype=np.float32)
        return np.array([logprob(version) for version in versions.tolist()], dtype=np.float32)

    def _rows(self, sent: int, versions: Int32Array, first_row: int) -> ExpertIds | None:
        """Return rows [sent+g-1 - first_row, L, K]: expert k of a row is (v + k) % E, v the version that computed it.

        The first token's version has read all that was sent; each other token's version has read the one before it.
        """
        spec = self.routing_spec
        if spec is None:
            return None
        computed = np.concatenate([np.full(sent, versions[0]), versions[1:]])[first_row:]
        experts = ((computed[:, None] + np.arange(spec.top_k)) % spec.num_experts).astype(spec.dtype)
        return np.repeat(experts[:, None, :], spec.num_moe_layers, axis=1)

    async def _fails(self) -> bool:
        """Whether a call ends now as if a pause had ended it; other faults come to pass here."""
        if self.dead:
            raise EngineDied(f"replica {self._replica}: the engine died")
        if self.hangs:
            await asyncio.Event().wait()
        fault = self._fault
        if fault is None or self.sampled < fault.after_tokens:
            return False
        self._fault = None
        if not self._first_time(fault):
            return False
        if fault.kind == "exit":
            os._exit(1)
        if fault.kind == "raise":
            raise EngineError(f"replica {self._replica}: the scripted engine refuses a call")
        self.dead, self.hangs = fault.kind == "die", fault.kind == "hang"
        return fault.kind == "abort" or await self._fails()

    def _first_time(self, fault: Fault) -> bool:
        """Whether this run has not had the fault; the process that replaces this one must not have it again."""
        if not self._config.run_dir.is_dir():
            return True
        try:
            (self._config.run_dir / f"scripted-{fault.kind}-{self._replica}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def check_alive(self) -> None:
        if self.dead:
            raise EngineDied(f"replica {self._replica}: the engine died")

    async def ping(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()

    async def pause(self, mode: PauseMode) -> None:
        if mode == "wait":
            await self._calls.wait_none()
        self._running.clear()
        self._aborting = mode == "abort"
        if self._aborting:
            self._moving.set()
            await self._calls.wait_none()
        else:
            self._moving.clear()

    async def resume(self) -> None:
        self._aborting = False
        self._running.set()
        self._moving.set()

    async def score(self, sequences: list[Int32Array]) -> list[Score]:
        if not self._running.is_set():
            raise EngineError(f"replica {self._replica}: score: the engine is paused")
        if self._scorer is None:
            raise EngineError(f"replica {self._replica}: score: a script with a layout of its own has no weights")
        scores = await asyncio.to_thread(self._scorer.score, sequences, self.routing_spec)
        return list(scores)

    async def fingerprints(self, sequences: list[Int32Array]) -> list[Float32Array | None]:
        return [None for _ in sequences]

    # As vLLM's clients call them; from a memory file of this host only.

    async def init_weight_transfer_engine(self, request: Any) -> None:
        from async_rl.weights.shm_file import TensorMeta

        if "table" not in request.init_info:
            raise WeightSyncError("the scripted engine receives no weights with sync.backend nccl")
        self._table = [TensorMeta(name, dtype, tuple(shape)) for name, dtype, shape in request.init_info["table"]]

    async def start_weight_update(self) -> None:
        if self._running.is_set():
            raise WeightSyncError(f"replica {self._replica}: pause the engine before a weight sync")

    async def update_weights(self, request: Any) -> None:
        from async_rl.weights.shm_file import Announcement, read

        if self._table is None or self._scorer is None:
            raise WeightSyncError("weights came before init_weight_transfer_engine and start")
        tensors = await asyncio.to_thread(read, Announcement(**request.update_info), self._table)
        await asyncio.to_thread(self._scorer.load, dict(tensors))

    async def finish_weight_update(self) -> None: ...

    async def update_weight_version(self, version: str) -> None:
        if self._running.is_set():
            raise WeightSyncError(f"replica {self._replica}: the version changed while the engine was not paused")
        self.version = int(version)

    async def shutdown(self) -> None:
        self._running.set()
        self._moving.set()


class _Scorer:
    """The policy in transformers, in float32: what the scripted engine's weights really say."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def load(self, tensors: dict[str, Any]) -> None:
        """Replace the weights with these tensors, named as in a checkpoint; from_pretrained stacks the experts."""
        copied = {name: tensor.clone() for name, tensor in tensors.items()}  # they are views on the trainer's memory
        model = type(self._model).from_pretrained(
            None, config=self._model.config, state_dict=copied, dtype=self._model.dtype
        )
        self._model = model.eval()

    def score(self, sequences: Sequence[Int32Array], spec: RoutingSpec | None) -> list[Score]:
        import torch

        scores = []
        for sequence in sequences:
            ids = torch.from_numpy(sequence.astype(np.int64))[None]
            with torch.no_grad():
                output = self._model(ids, output_router_logits=True) if spec else self._model(ids)
            logprobs = output.logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            routed = None
            if spec is not None:
                chosen = torch.stack([logits[:-1].topk(spec.top_k).indices for logits in output.router_logits], dim=1)
                routed = chosen.numpy().astype(spec.dtype)
            scores.append(Score(logprobs.numpy(), routed))
        return scores


def _read_layout(config: RunConfig) -> Layout:
    model = read_model_config(config.model.path)
    return Layout(model.routing_spec, frozenset(stop_token_ids(config.model.path)), model.vocab_size)
