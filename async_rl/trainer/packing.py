"""Lays samples into microbatches under a token budget, padded only where a layout asks for it.

Pure: NumPy only; knows ``samples``, ``parallel`` and the settings that bound a microbatch. A sequence is a sample with
its padding, or padding alone: what attention must not cross.

Shapes: T positions of a microbatch, S sequences in it, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from async_rl.config.training import TrainerSection
from async_rl.trainer import parallel
from async_rl.trainer.parallel import Int64Array
from async_rl.trainer.samples import NO_ROUTING, BoolArray, Int8Array, Sample, Scalar
from async_rl.types import Float32Array, Int32Array, RoutingSpec

Int16Array = npt.NDArray[np.int16]

# Microbatches that may be filled at once: with more, each sample finds a fuller one, and the first is full later.
OPEN_MICROBATCHES = 4


@dataclass(frozen=True, slots=True)
class Microbatch:
    """S sequences back to back, T positions in all.

    A sample's padding follows it within its sequence; a last sequence may be padding alone. Arrays by position describe
    the token that is predicted there.
    """

    token_ids: Int64Array
    """int64[T]: the tokens that are read."""
    position_ids: Int64Array
    """int64[T]: the place of each in its sequence."""
    labels: Int64Array
    """int64[T]: the tokens that are predicted."""
    loss_mask: BoolArray
    """bool[T]: which tokens count."""
    logprobs: Float32Array
    """float32[T]: behaviour log-probs."""
    versions: Int32Array
    """int32[T]: the policy version that each token was sampled with."""
    advantages: Float32Array
    """float32[T]."""
    temperature: Float32Array
    """float32[T]: that of the distribution from which each token was sampled; 1 where there is none."""
    weights: Float32Array
    """float32[T]: the weight of each token in the sum that is the loss."""
    resume_position: Int8Array
    """int8[T]: index into RESUME_POSITIONS."""
    engine: Int8Array
    """int8[T]: index into the engines of the run; their number for others."""
    sequence: Int64Array
    """int64[T], from 0 to S - 1: the sequence of each position."""
    cu_seqlens: Int32Array
    """int32[S+1]: where each sequence starts, and T."""
    longest: int
    """The length of the longest sequence."""
    samples: tuple[int, ...]
    """Indices of the samples in the order in which the packer got them."""
    positions: tuple[int, ...]
    """How many positions each sample has, without padding."""
    routed_experts: Int16Array | Int32Array | None
    """[T, L, K], int16 unless there are too many experts for it, NO_ROUTING where the router decides; None if nothing
    is replayed."""
    proximal: Float32Array | None = None
    """float32[T]: log-probs under the proximal policy; None if no sample has any."""
    reference: Float32Array | None = None
    """float32[T]: log-probs under the reference policy; None if no sample has any."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def of_samples(self) -> BoolArray:
        """Positions that are not padding, bool[T]."""
        result = np.zeros(len(self), dtype=np.bool_)
        for start, length in zip(self.cu_seqlens.tolist(), self.positions, strict=False):
            result[start : start + length] = True
        return result

    @property
    def padding(self) -> int:
        """Positions that belong to no sample."""
        return len(self) - sum(self.positions)


# The fields of Microbatch that are by position, [T, ...], and that the model or the loss reads as tensors.
BY_POSITION = (
    "token_ids",
    "position_ids",
    "labels",
    "loss_mask",
    "logprobs",
    "versions",
    "advantages",
    "temperature",
    "weights",
    "resume_position",
    "engine",
    "sequence",
    "proximal",
    "reference",
)


@dataclass(frozen=True, slots=True, eq=False)
class _OpenBatch:
    """A microbatch that still has room."""

    length: int
    """Positions that are taken, padding included."""
    samples: tuple[tuple[int, Sample], ...]
    """(index, sample) of each."""


class Packer:
    """Packs samples into microbatches as they come: a full one is returned before the next sample is known.

    The microbatches and their order depend on the order of the samples alone, not on how they were divided among
    calls. So a step whose groups arrive one by one computes exactly what it computes with all of them at hand.

    budget: most positions of a microbatch, its padding included. A longer sample is not cut but gets a microbatch of
    its own. routing_spec: the layout of the routed experts to carry, where samples without any get rows of NO_ROUTING;
    None to carry none. sequence_multiple: each sequence is padded to a multiple of it. multiple: so is each microbatch.
    """

    def __init__(
        self, budget: int, routing_spec: RoutingSpec | None = None, *, sequence_multiple: int = 1, multiple: int = 1
    ) -> None:
        self._budget = budget
        self._routing_spec = routing_spec
        self._sequence_multiple = sequence_multiple
        self._multiple = multiple
        self._open: list[_OpenBatch] = []
        self._count = 0

    @classmethod
    def of(cls, settings: TrainerSection, routing_spec: RoutingSpec | None) -> Packer:
        """Make a packer with the budget and the padding of these settings."""
        return cls(
            settings.tokens_per_microbatch,
            routing_spec,
            sequence_multiple=parallel.sequence_multiple(settings.parallel),
            multiple=parallel.microbatch_multiple(settings.parallel, settings.microbatch_multiple),
        )

    def add(self, samples: Sequence[Sample]) -> list[Microbatch]:
        """Return the microbatches that these samples fill. A sample goes where it leaves least room."""
        full: list[Microbatch] = []
        for sample in samples:
            index, self._count = self._count, self._count + 1
            length = sample.positions + -sample.positions % self._sequence_multiple
            if length == 0:
                continue
            fitting = [batch for batch in self._open if batch.length + length <= self._budget]
            chosen = max(fitting, key=lambda batch: batch.length, default=_OpenBatch(0, ()))
            if fitting:
                self._open.remove(chosen)
            self._open.append(_OpenBatch(chosen.length + length, (*chosen.samples, (index, sample))))
            if len(self._open) > OPEN_MICROBATCHES:
                full.append(self._close(max(self._open, key=lambda batch: batch.length)))
        return full

    def flush(self) -> list[Microbatch]:
        """Return the microbatches that are not full, and keep none."""
        return [self._close(batch) for batch in list(self._open)]

    def filler(self) -> Microbatch:
        """Return the shortest microbatch of padding alone, for a rank that has fewer than those it computes with."""
        return _join([], self._routing_spec, self._sequence_multiple, self._multiple)

    def _close(self, batch: _OpenBatch) -> Microbatch:
        self._open.remove(batch)
        return _join(batch.samples, self._routing_spec, self._sequence_multiple, self._multiple)


def pack(
    samples: Sequence[Sample],
    budget: int,
    routing_spec: RoutingSpec | None = None,
    *,
    sequence_multiple: int = 1,
    multiple: int = 1,
) -> list[Microbatch]:
    """Pack all of ``samples`` into microbatches as ``Packer`` does."""
    packer = Packer(budget, routing_spec, sequence_multiple=sequence_multiple, multiple=multiple)
    return packer.add(samples) + packer.flush()


def rows_without_routing(batch: Microbatch) -> int:
    """Count the rows of a microbatch to be replayed that lack the routed experts of at least one layer."""
    return 0 if batch.routed_experts is None else int((batch.routed_experts[..., 0] == NO_ROUTING).any(axis=1).sum())


def spread_rows(count: int, spec: RoutingSpec) -> Int16Array | Int32Array:
    """Return routed experts [count, L, K] for padding: distinct in each row, and each expert equally often.

    Rows of zeros would send all padding to expert 0, and name it K times, which no dispatcher expects.
    """
    first = np.arange(count)[:, None, None] * spec.top_k + np.arange(spec.num_moe_layers)[:, None]
    rows: Int64Array = (first + np.arange(spec.top_k)) % spec.num_experts
    # Signed, for NO_ROUTING.
    return rows.astype(np.int16) if spec.num_experts <= np.iinfo(np.int16).max else rows.astype(np.int32)


def _join(
    chosen: Sequence[tuple[int, Sample]], spec: RoutingSpec | None, sequence_multiple: int, multiple: int
) -> Microbatch:
    samples = [sample for _, sample in chosen]
    lengths = [sample.positions + -sample.positions % sequence_multiple for sample in samples]
    tail = -sum(lengths) % multiple if samples else multiple
    spans = np.cumsum([0, *lengths, *([tail] if tail else [])]).astype(np.int32)
    total = int(spans[-1])

    def filled(parts: Sequence[npt.NDArray[Any] | float | None], rest: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """Return ``rest`` [T, ...] with each sample's part written over it where the sample lies."""
        for part, sample, start in zip(parts, samples, spans, strict=False):
            if part is not None:
                rest[start : start + sample.positions] = part
        return rest

    def zeros(dtype: type[Scalar]) -> npt.NDArray[Scalar]:
        return np.zeros(total, dtype=dtype)

    def optional(parts: Sequence[Float32Array | None]) -> Float32Array | None:
        return None if all(part is None for part in parts) else filled(parts, zeros(np.float32))

    routed_experts = None
    if spec is not None:
        # A sample without routed experts gets NO_ROUTING; the rows of padding are spread over the experts.
        absent = np.full((1, spec.num_moe_layers, spec.top_k), NO_ROUTING, dtype=np.int16)
        rows: list[Any] = [absent if sample.routed_experts is None else sample.routed_experts for sample in samples]
        spread: npt.NDArray[Any] = spread_rows(total, spec)
        routed_experts = filled(rows, spread)
    return Microbatch(
        token_ids=filled([sample.token_ids[:-1] for sample in samples], zeros(np.int64)),
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in np.diff(spans)]),
        labels=filled([sample.token_ids[1:] for sample in samples], zeros(np.int64)),
        loss_mask=filled([sample.loss_mask for sample in samples], zeros(np.bool_)),
        logprobs=filled([sample.logprobs for sample in samples], zeros(np.float32)),
        versions=filled([sample.versions for sample in samples], zeros(np.int32)),
        advantages=filled([sample.advantages for sample in samples], zeros(np.float32)),
        temperature=filled([sample.temperature for sample in samples], np.ones(total, dtype=np.float32)),
        weights=filled([sample.weight for sample in samples], zeros(np.float32)),
        resume_position=filled([sample.resume_position for sample in samples], zeros(np.int8)),
        engine=filled([sample.engine for sample in samples], zeros(np.int8)),
        sequence=np.repeat(np.arange(len(spans) - 1), np.diff(spans)),
        cu_seqlens=spans,
        longest=int(np.diff(spans).max()),
        samples=tuple(index for index, _ in chosen),
        positions=tuple(sample.positions for sample in samples),
        routed_experts=routed_experts,
        proximal=optional([sample.proximal for sample in samples]),
        reference=optional([sample.reference for sample in samples]),
    )


def split(values: npt.NDArray[Scalar], batch: Microbatch) -> list[npt.NDArray[Scalar]]:
    """Split values [T, ...] of a microbatch by sample, in the order of ``batch.samples``; padding is left out."""
    starts = batch.cu_seqlens.tolist()
    return [values[start : start + length] for start, length in zip(starts, batch.positions, strict=False)]


def unpack(
    values: Sequence[npt.NDArray[Scalar]], batches: Sequence[Microbatch], count: int
) -> list[npt.NDArray[Scalar]]:
    """Return an array for each of ``count`` packed samples, in their order, from values [T, ...] of each microbatch."""
    nothing: Any = values[0][:0] if values else np.zeros(0, dtype=np.float32)
    result: list[npt.NDArray[Scalar]] = [nothing] * count
    for array, batch in zip(values, batches, strict=True):
        for index, part in zip(batch.samples, split(array, batch), strict=True):
            result[index] = part
    return result


def split_over_ranks(costs: Sequence[float], ranks: int, loads: Sequence[float] = ()) -> list[list[int]]:
    """Return the indices of ``costs`` by data-parallel rank: the costliest first, each to the least loaded rank.

    loads: the cost that each rank has already. Deterministic. Indices ascend within a rank; with fewer costs than
    ranks, some ranks get none.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = list(loads) or [0.0] * ranks
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        shares[rank].append(index)
        load[rank] += costs[index]
    return [sorted(share) for share in shares]
