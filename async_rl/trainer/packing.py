"""Sequences to microbatches under a token budget, padded only where asked. Pure: NumPy only; knows ``types``.

A sequence of N tokens is N - 1 positions: position t reads token t and predicts token t + 1. The last token
is only ever a label and never enters the forward pass, so that positions and rows of routing (P+G-1 of them)
match one to one.

Shapes: T positions of a microbatch, S sequences in it, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from async_rl.types import (
    RESUME_POSITIONS,
    ExpertIds,
    Float32Array,
    Int32Array,
    RoutingSpec,
    Segment,
    Trajectory,
)

BoolArray = npt.NDArray[np.bool_]
Int8Array = npt.NDArray[np.int8]
Int64Array = npt.NDArray[np.int64]
Scalar = TypeVar("Scalar", bound=np.generic)

# Expert id of a row that has no routing: the router decides it. Real ids are never negative.
NO_ROUTING = -1

# Microbatches that may be filled at once: more find a fuller place for each sample, and hand the first out later.
OPEN_MICROBATCHES = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence of N tokens as the trainer needs it; every array besides token_ids is by position, N-1 long.

    token_ids int32[N]; loss_mask bool[N-1], which predicted tokens count; logprobs float32[N-1], versions
    int32[N-1], advantages float32[N-1] and resume_position int8[N-1] (index into RESUME_POSITIONS) of the predicted
    token, of no meaning where the mask is off; routed_experts [N-1, L, K], NO_ROUTING where a row has none, or None if
    there is none to replay. weight: of each of its tokens in the sum that is the loss. proximal, reference
    float32[N-1]: log-probs of the predicted tokens under those policies, where the loss needs them.
    """

    name: str
    trajectory_id: str
    token_ids: Int32Array
    loss_mask: BoolArray
    logprobs: Float32Array
    versions: Int32Array
    advantages: Float32Array
    resume_position: Int8Array
    routed_experts: ExpertIds | Int32Array | None = None
    weight: float = 1.0
    proximal: Float32Array | None = None
    reference: Float32Array | None = None

    @property
    def positions(self) -> int:
        return len(self.token_ids) - 1

    def with_advantages(self, values: Float32Array | float) -> Sample:
        """values: one for each position, or one for all."""
        return replace(self, advantages=np.broadcast_to(np.asarray(values, dtype=np.float32), (self.positions,)))

    def with_weight(self, weight: float) -> Sample:
        return replace(self, weight=weight)

    def with_logprobs(self, *, proximal: Float32Array | None = None, reference: Float32Array | None = None) -> Sample:
        """float32[N-1] each; None leaves what there is."""
        return replace(
            self,
            proximal=self.proximal if proximal is None else proximal,
            reference=self.reference if reference is None else reference,
        )

    def with_routed_experts(self, routed_experts: ExpertIds | Int32Array) -> Sample:
        return replace(self, routed_experts=routed_experts)


@dataclass(frozen=True, slots=True)
class Microbatch:
    """S sequences back to back, T positions in all; padding follows a sequence, or is a last one of no sample.

    token_ids, position_ids, labels int64[T]; loss_mask bool[T]; logprobs, advantages, weights float32[T]; versions
    int32[T]; resume_position int8[T]; sequence int64[T], from 0 to S - 1; cu_seqlens int32[S+1], where each starts;
    longest, its longest sequence; samples, their indices in the list that was packed, and positions, how many each has
    without padding; routed_experts int32[T, L, K] or None; proximal, reference float32[T], or None where no
    sample has them.
    """

    token_ids: Int64Array
    position_ids: Int64Array
    labels: Int64Array
    loss_mask: BoolArray
    logprobs: Float32Array
    versions: Int32Array
    advantages: Float32Array
    weights: Float32Array
    resume_position: Int8Array
    sequence: Int64Array
    cu_seqlens: Int32Array
    longest: int
    samples: tuple[int, ...]
    positions: tuple[int, ...]
    routed_experts: Int32Array | None
    proximal: Float32Array | None = None
    reference: Float32Array | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def of_samples(self) -> BoolArray:
        """bool[T]: the positions that are not padding."""
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
    "weights",
    "resume_position",
    "sequence",
    "proximal",
    "reference",
)


def samples_of(
    trajectory: Trajectory, *, oldest_version: int, per_segment: bool = False, advantage: float = 0.0
) -> list[Sample]:
    """What a trajectory is trained on: a loss on its sampled tokens but those before ``oldest_version`` (invariant 4).

    One sequence; or with ``per_segment`` (routing policy ``exact``) one for each segment: all tokens up to its end, the
    routing of the call that sampled it, a loss on its own tokens only. What has no token to train is left out.
    """
    whole = Segment(0, len(trajectory.response_ids), trajectory.segments[-1].version)
    views = trajectory.segments if per_segment else (whole,)
    counts = trajectory.sampled & (trajectory.versions >= oldest_version)
    return [_view(trajectory, view, counts, advantage) for view in views if bool(counts[view.start : view.stop].any())]


def _view(trajectory: Trajectory, view: Segment, counts: BoolArray, advantage: float) -> Sample:
    """The trajectory up to the end of ``view``, with a loss on those tokens of it that count."""
    prompt, stop = len(trajectory.prompt_ids), view.stop

    def over_response(values: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        # The first response token is predicted at position P - 1.
        return np.concatenate([np.zeros(prompt - 1, dtype=values.dtype), values[:stop]])

    routed_experts = trajectory.routed_experts if view.routed_experts is None else view.routed_experts
    return Sample(
        name=f"trajectory {trajectory.trajectory_id}, response [{view.start}, {stop})",
        trajectory_id=trajectory.trajectory_id,
        token_ids=np.concatenate([trajectory.prompt_ids, trajectory.response_ids[:stop]]),
        loss_mask=over_response(counts & (np.arange(len(counts)) >= view.start)),
        logprobs=over_response(trajectory.logprobs),
        versions=over_response(trajectory.versions),
        advantages=over_response(np.full(stop, advantage, dtype=np.float32)),
        resume_position=over_response(resume_positions(trajectory)),
        routed_experts=None if routed_experts is None else routed_experts[: prompt + stop - 1],
    )


def plain_sample(name: str, ids: Int32Array, mask: npt.NDArray[np.bool_] | None = None) -> Sample:
    """A sequence without behaviour: every token counts unless a mask bool[N-1] says otherwise."""
    positions = max(len(ids) - 1, 0)
    return Sample(
        name=name,
        trajectory_id=name,
        token_ids=ids,
        loss_mask=np.ones(positions, dtype=np.bool_) if mask is None else mask,
        logprobs=np.zeros(positions, dtype=np.float32),
        versions=np.zeros(positions, dtype=np.int32),
        advantages=np.zeros(positions, dtype=np.float32),
        resume_position=np.zeros(positions, dtype=np.int8),
    )


def resume_positions(trajectory: Trajectory) -> Int8Array:
    """int8[G]: where each response token lies relative to the last resume point, as an index into RESUME_POSITIONS."""
    points = trajectory.resume_points
    result = np.full(len(trajectory.response_ids), RESUME_POSITIONS.index("uninterrupted"), dtype=np.int8)
    if points:
        result[: points[-1]] = RESUME_POSITIONS.index("before")
        result[points[-1]] = RESUME_POSITIONS.index("first")
        result[points[-1] + 1 :] = RESUME_POSITIONS.index("after")
    return result


class Packer:
    """Samples to microbatches as they come: one that is full is handed out before the next sample is known.

    What is handed out, and in which order, depends on the order of the samples alone, not on how they were divided
    among calls: so a step whose groups arrive one by one computes exactly what it computes with all of them at hand.

    budget: most positions of a microbatch, its padding included; a longer sample is never cut, it gets a microbatch of
    its own. routing_spec: the layout of rows to carry, samples without any getting rows of NO_ROUTING; None to carry
    none.
    sequence_multiple, multiple: each sequence, each microbatch is padded to a multiple of so many positions.
    """

    def __init__(
        self, budget: int, routing_spec: RoutingSpec | None = None, *, sequence_multiple: int = 1, multiple: int = 1
    ) -> None:
        self._budget = budget
        self._routing_spec = routing_spec
        self._sequence_multiple = sequence_multiple
        self._multiple = multiple
        self._open: list[tuple[int, list[tuple[int, Sample]]]] = []  # (positions, [(index, sample)])
        self._count = 0

    def add(self, samples: Sequence[Sample]) -> list[Microbatch]:
        """The microbatches that these samples fill. A sample goes where it leaves least room."""
        full: list[Microbatch] = []
        for sample in samples:
            index, self._count = self._count, self._count + 1
            length = sample.positions + -sample.positions % self._sequence_multiple
            if length == 0:
                continue
            fitting = [bin for bin in self._open if bin[0] + length <= self._budget]
            chosen = max(fitting, key=lambda bin: bin[0], default=(0, []))
            if fitting:
                self._open.remove(chosen)
            self._open.append((chosen[0] + length, [*chosen[1], (index, sample)]))
            if len(self._open) > OPEN_MICROBATCHES:
                full.append(self._close(max(self._open, key=lambda bin: bin[0])))
        return full

    def flush(self) -> list[Microbatch]:
        """The microbatches that are not full; nothing is left behind."""
        return [self._close(bin) for bin in list(self._open)]

    def filler(self) -> Microbatch:
        """A microbatch of padding alone, as short as can be, for a rank that has fewer than those it computes with."""
        return _join([], self._routing_spec, self._sequence_multiple, self._multiple)

    def _close(self, bin: tuple[int, list[tuple[int, Sample]]]) -> Microbatch:
        self._open.remove(bin)
        return _join(bin[1], self._routing_spec, self._sequence_multiple, self._multiple)


def pack(
    samples: Sequence[Sample],
    budget: int,
    routing_spec: RoutingSpec | None = None,
    *,
    sequence_multiple: int = 1,
    multiple: int = 1,
) -> list[Microbatch]:
    """All of ``samples`` to microbatches; see ``Packer``."""
    packer = Packer(budget, routing_spec, sequence_multiple=sequence_multiple, multiple=multiple)
    return packer.add(samples) + packer.flush()


def rows_without_routing(batch: Microbatch) -> int:
    """Rows of a microbatch to be replayed that lack the routing of at least one layer."""
    return 0 if batch.routed_experts is None else int((batch.routed_experts[..., 0] == NO_ROUTING).any(axis=1).sum())


def spread_rows(count: int, spec: RoutingSpec) -> Int32Array:
    """Routing int32[count, L, K] for padding: distinct experts in each row, every expert as often as any other.

    Rows of zeros would send all padding to expert 0, and name it K times, which no dispatcher expects.
    """
    first = np.arange(count)[:, None, None] * spec.top_k + np.arange(spec.num_moe_layers)[:, None]
    rows: Int32Array = ((first + np.arange(spec.top_k)) % spec.num_experts).astype(np.int32)
    return rows


def _join(
    chosen: Sequence[tuple[int, Sample]], spec: RoutingSpec | None, sequence_multiple: int, multiple: int
) -> Microbatch:
    samples = [sample for _, sample in chosen]
    lengths = [sample.positions + -sample.positions % sequence_multiple for sample in samples]
    tail = -sum(lengths) % multiple if samples else multiple
    spans = np.cumsum([0, *lengths, *([tail] if tail else [])]).astype(np.int32)
    total = int(spans[-1])

    def filled(parts: Sequence[npt.NDArray[Any] | float | None], rest: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """``rest`` [T, ...] with each sample's part written over where it lies."""
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
        # A sample's rows are NO_ROUTING unless it has any; the padding's spread over the experts.
        absent = np.full((1, spec.num_moe_layers, spec.top_k), NO_ROUTING, dtype=np.int32)
        rows: list[Any] = [absent if sample.routed_experts is None else sample.routed_experts for sample in samples]
        routed_experts = filled(rows, spread_rows(total, spec))
    return Microbatch(
        token_ids=filled([sample.token_ids[:-1] for sample in samples], zeros(np.int64)),
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in np.diff(spans)]),
        labels=filled([sample.token_ids[1:] for sample in samples], zeros(np.int64)),
        loss_mask=filled([sample.loss_mask for sample in samples], zeros(np.bool_)),
        logprobs=filled([sample.logprobs for sample in samples], zeros(np.float32)),
        versions=filled([sample.versions for sample in samples], zeros(np.int32)),
        advantages=filled([sample.advantages for sample in samples], zeros(np.float32)),
        weights=filled([sample.weight for sample in samples], zeros(np.float32)),
        resume_position=filled([sample.resume_position for sample in samples], zeros(np.int8)),
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
    """Values [T, ...] of a microbatch by sample, in the order of ``batch.samples``; padding is left out."""
    starts = batch.cu_seqlens.tolist()
    return [values[start : start + length] for start, length in zip(starts, batch.positions, strict=False)]


def unpack(
    values: Sequence[npt.NDArray[Scalar]], batches: Sequence[Microbatch], count: int
) -> list[npt.NDArray[Scalar]]:
    """Per-position values [T, ...] of each microbatch back to one array per packed sample, in their order."""
    nothing: Any = values[0][:0] if values else np.zeros(0, dtype=np.float32)
    result: list[npt.NDArray[Scalar]] = [nothing] * count
    for array, batch in zip(values, batches, strict=True):
        for index, part in zip(batch.samples, split(array, batch), strict=True):
            result[index] = part
    return result


def split_over_ranks(costs: Sequence[float], ranks: int, loads: Sequence[float] = ()) -> list[list[int]]:
    """Indices of ``costs`` by data-parallel rank, balanced: the costliest first, each to the least loaded rank.

    loads: what the ranks have already. Deterministic; indices ascend within a rank; with fewer costs than ranks, some
    ranks get none.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = list(loads) or [0.0] * ranks
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        shares[rank].append(index)
        load[rank] += costs[index]
    return [sorted(share) for share in shares]
