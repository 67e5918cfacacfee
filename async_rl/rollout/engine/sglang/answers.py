"""What is sent to SGLang's server for one call, and what its answers mean.

Written for SGLang 0.5.23. An answer is a stream of objects ``{"output_ids": [...], "meta_info": {...}}``, each with the
tokens since the one before and their log-probs; the last has a finish reason, the versions of all tokens and the routed
experts. Knows no server: plain data in, arrays out.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from async_rl.errors import EngineError
from async_rl.models.config import ModelConfig
from async_rl.rollout.engine.interface import CallEnd, EngineLoad, EngineOutput, Sampling, Score
from async_rl.rollout.routing_policies import moe_columns
from async_rl.types import ExpertIds, Float32Array, Int32Array

# Tokens that the server collects before it sends them; the first is sent at once. A message costs both sides about as
# much as a token, and the watchdog, which counts tokens, looks once a second.
STREAM_INTERVAL = 16

_EVENT = b"data: "
_DONE = b"data: [DONE]"

_ENDS: dict[str, CallEnd] = {"stop": "stop", "length": "length", "abort": "abort"}

Json = dict[str, Any]


async def events(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Yield the events of a stream, which are lines of any length, each as soon as it is complete."""
    rest = bytearray()
    async for chunk in chunks:
        *ended, last = chunk.split(b"\n")
        for line in ended:
            rest += line
            if rest.startswith(_EVENT) and not rest.startswith(_DONE):
                yield bytes(rest[len(_EVENT) :])
            rest.clear()
        rest += last


def generate(
    rid: str,
    token_ids: Int32Array,
    sampling: Sampling,
    max_tokens: int,
    *,
    stop_token_ids: Sequence[int],
    cache_key: str,
    first_row: int | None,
) -> Json:
    """Return the body of a call of ``/generate`` that samples; first_row: None for a model without routed experts.

    cache_key: calls share prefixes only with those that have the same one.
    """
    how: Json = {
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "top_p": 1.0 if sampling.greedy else sampling.top_p,
        "top_k": sampling.top_k if sampling.top_k and not sampling.greedy else -1,
        "max_new_tokens": max_tokens,
        "stop_token_ids": [*stop_token_ids, *sampling.stop_token_ids],
        "stream_interval": STREAM_INTERVAL,
    }
    return _call(rid, token_ids, how, cache_key, first_row) | {"stream": True}


def score(rid: str, token_ids: Int32Array, *, cache_key: str, routed: bool) -> Json:
    """Return the body of a call of ``/generate`` that scores a sequence; nothing of it is read from the cache."""
    body = _call(rid, token_ids, {"max_new_tokens": 0, "temperature": 0.0}, cache_key, 0 if routed else None)
    return body | {"logprob_start_len": 0, "stream": False}


def _call(rid: str, token_ids: Int32Array, sampling: Json, cache_key: str, first_row: int | None) -> Json:
    routing: Json = {} if first_row is None else {"return_routed_experts": True, "routed_experts_start_len": first_row}
    return {
        "rid": rid,
        "input_ids": token_ids.tolist(),
        "sampling_params": sampling,
        "return_logprob": True,
        "extra_key": cache_key,
        **routing,
    }


@dataclass(slots=True)
class Answer:
    """What has arrived of one call so far."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    last: Json | None = None
    """The meta_info of the last object, once that has arrived."""

    def add(self, answered: Json) -> None:
        """Take in one object of the stream. Raises EngineError for what is none."""
        try:
            meta = answered["meta_info"]
            tokens, logprobs = answered["output_ids"], meta["output_token_logprobs"]
            self.token_ids += tokens
            self.logprobs += [entry[0] for entry in logprobs]
            ended = meta["finish_reason"]
        except (KeyError, TypeError, IndexError):
            raise EngineError(f"the server answered {str(answered)[:200]}, which is no part of a response") from None
        if len(tokens) != len(logprobs):
            raise EngineError(f"the server answered {len(tokens)} tokens with {len(logprobs)} log-probs")
        if ended is not None:
            self.last = meta

    @property
    def first_version(self) -> str | None:
        """The version that sampled the first token; None if there is none yet."""
        spans = [] if self.last is None or not self.token_ids else self.last.get("weight_versions") or []
        return str(spans[0]["version"]) if spans else None

    @property
    def nbytes(self) -> int:
        """What ``output`` has to look through."""
        routed = "" if self.last is None else self.last.get("routed_experts") or ""
        return 100 * len(self.token_ids) + len(routed)

    def output(self, sent: int, first_row: int | None, model: ModelConfig) -> EngineOutput:
        """Return what the call has sampled, to which ``sent`` tokens were given. Raises EngineError."""
        assert self.last is not None
        reason = self.last["finish_reason"]
        kind = reason.get("type") if isinstance(reason, dict) else reason
        if kind not in _ENDS:
            raise EngineError(f"a call has ended by {kind!r}, which this package does not know")
        count = len(self.token_ids)
        routed = None
        if first_row is not None and count:
            routed = routed_experts(self.last.get("routed_experts"), sent + count - 1 - first_row, model)
        return EngineOutput(
            token_ids=np.asarray(self.token_ids, dtype=np.int32),
            logprobs=np.asarray(self.logprobs, dtype=np.float32),
            versions=stamps(self.last.get("weight_versions") or [], count),
            routed_experts=routed,
            finish_reason=_ENDS[kind],
            cached_tokens=self.last.get("cached_tokens"),
        )


def load(answered: Json) -> EngineLoad:
    """Return what the answer of ``/v1/loads`` says of the server's schedulers. Raises EngineError."""
    try:
        parts = answered["loads"]
        return EngineLoad(
            waiting=sum(int(part["num_waiting_reqs"]) for part in parts),
            kv_use=max((float(part["token_usage"]) for part in parts), default=0.0),
            kv_tokens=sum(int(part["max_total_num_tokens"]) for part in parts),
        )
    except (KeyError, TypeError, ValueError):
        raise EngineError(f"the server answered {str(answered)[:200]}, which is no load") from None


def stamps(spans: Sequence[Mapping[str, Any]], count: int) -> Int32Array:
    """Return the version of each of ``count`` tokens, int32[g]. Raises EngineError where a token has none."""
    versions = np.full(count, -1, dtype=np.int32)
    try:
        for span in spans:
            versions[int(span["start"]) : int(span["end"])] = int(span["version"])
    except (KeyError, TypeError, ValueError):
        raise EngineError(f"the server answered the versions {str(spans)[:200]}; expected numbers") from None
    if (missing := np.flatnonzero(versions < 0)).size:
        raise EngineError(f"the server did not say which version sampled token {missing[0]} of {count}")
    return versions


def scored(answered: Json, length: int, model: ModelConfig, *, routed: bool) -> Score:
    """Return the score of a sequence of ``length`` tokens. Raises EngineError."""
    try:
        meta = answered["meta_info"]
        # The first token has none.
        logprobs: Float32Array = np.asarray([entry[0] for entry in meta["input_token_logprobs"][1:]], dtype=np.float32)
    except (KeyError, TypeError, IndexError, ValueError):
        raise EngineError(f"the server answered {str(answered)[:200]}, which is no score") from None
    if len(logprobs) != length - 1:
        raise EngineError(f"the server scored {len(logprobs)} of {length - 1} tokens")
    experts = routed_experts(meta.get("routed_experts"), length - 1, model) if routed else None
    return Score(logprobs, experts)


def routed_experts(encoded: Any, rows: int, model: ModelConfig) -> ExpertIds:
    """Return the routed experts [rows, L, K] of an answer, which has them for all layers as int32, base64.

    Raises EngineError where there are none or are others than these.
    """
    spec = model.routing_spec
    assert spec is not None
    if not isinstance(encoded, str):
        raise EngineError(
            "the server returned no routed experts; to train without, set rollout.return_routed_experts to false and "
            "trainer.router_replay to R2 or off"
        )
    try:
        flat = np.frombuffer(base64.b64decode(encoded, validate=True), dtype=np.int32)
    except (binascii.Error, ValueError) as error:
        raise EngineError(f"the server returned routed experts that cannot be read: {error}") from None
    expected = (rows, model.num_layers, spec.top_k)
    if flat.size != rows * model.num_layers * spec.top_k:
        raise EngineError(
            f"the server returned {flat.size} routed experts, and {expected} (rows, layers, experts per token) are due"
        )
    if flat.size and not 0 <= int(flat.min()) <= int(flat.max()) < spec.num_experts:
        raise EngineError(
            f"the server returned expert ids from {flat.min()} to {flat.max()}; the model has {spec.num_experts}"
        )
    every_layer = flat.reshape(expected).astype(spec.dtype)
    return moe_columns(every_layer, num_layers=model.num_layers, moe_layers=model.moe_layers)
