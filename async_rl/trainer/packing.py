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


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence of N tokens as the trainer needs it; every array besides token_ids is by position, N-1 long.

    token_ids int32[N]; loss_mask bool[N-1], which predicted tokens count; logprobs float32[N-1], versions
    int32[N-1], advantages float32[N-1] and resume_position int8[N-1] (index into RESUME_POSITIONS) of the predicted
    token, of no meaning where the mask is off; routing [N-1, L, K], NO_ROUTING where a row has none, or None if
    there is none to replay.
    """

    name: str
    token_ids: Int32Array
    loss_mask: BoolArray
    logprobs: Float32Array
    versions: Int32Array
    advantages: Float32Array
    resume_position: Int8Array
    routing: ExpertIds | Int32Array | None = None

    @property
    def positions(self) -> int:
        return len(self.token_ids) - 1

    def with_routing(self, routing: ExpertIds | Int32Array) -> Sample:
        return replace(self, routing=routing)


@dataclass(frozen=True, slots=True)
class Microbatch:
    """S sequences back to back, T positions in all; a last one may be padding, which belongs to no sample.

    token_ids, position_ids, labels int64[T]; loss_mask bool[T]; logprobs, advantages float32[T]; versions
    int32[T]; resume_position int8[T]; cu_seqlens int32[S+1], where each sequence starts; longest, its longest
    sequence; samples, their indices in the list that was packed; routing int32[T, L, K] or None.
    """

    token_ids: Int64Array
    position_ids: Int64Array
    labels: Int64Array
    loss_mask: BoolArray
    logprobs: Float32Array
    versions: Int32Array
    advantages: Float32Array
    resume_position: Int8Array
    cu_seqlens: Int32Array
    longest: int
    samples: tuple[int, ...]
    routing: Int32Array | None

    def __len__(self) -> int:
        return len(self.token_ids)


# The fields of Microbatch that the model or the loss reads as tensors.
ARRAYS = (
    "token_ids",
    "position_ids",
    "labels",
    "loss_mask",
    "logprobs",
    "versions",
    "advantages",
    "resume_position",
    "cu_seqlens",
    "routing",
)


def samples_of(
    trajectory: Trajectory, *, advantage: float, oldest_version: int, per_segment: bool = False
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

    routing = trajectory.routed_experts if view.routed_experts is None else view.routed_experts
    return Sample(
        name=f"trajectory {trajectory.trajectory_id}, response [{view.start}, {stop})",
        token_ids=np.concatenate([trajectory.prompt_ids, trajectory.response_ids[:stop]]),
        loss_mask=over_response(counts & (np.arange(len(counts)) >= view.start)),
        logprobs=over_response(trajectory.logprobs),
        versions=over_response(trajectory.versions),
        advantages=over_response(np.full(stop, advantage, dtype=np.float32)),
        resume_position=over_response(resume_positions(trajectory)),
        routing=None if routing is None else routing[: prompt + stop - 1],
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


def plan(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of ``lengths`` by microbatch, each at most ``budget`` positions: first-fit decreasing.

    A sequence longer than the budget gets a microbatch of its own. Deterministic; zero lengths are left out.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length == 0:
            continue
        slot = next((b for b, free in enumerate(room) if free >= length), None)
        if slot is None:
            bins.append([index])
            room.append(budget - length)
        else:
            bins[slot].append(index)
            room[slot] -= length
    return bins


def pack(
    samples: Sequence[Sample], budget: int, routing: RoutingSpec | None = None, multiple: int = 1
) -> list[Microbatch]:
    """Samples to microbatches.

    routing: the layout of rows to carry, samples without any getting rows of NO_ROUTING; None to carry none.
    multiple: each microbatch is padded to a multiple of so many positions, by a sequence that nothing is read from.
    """
    lengths = [sample.positions for sample in samples]
    return [_join(samples, indices, routing, multiple) for indices in plan(lengths, budget)]


def rows_without_routing(batch: Microbatch) -> int:
    """Rows of a microbatch to be replayed that lack the routing of at least one layer."""
    return 0 if batch.routing is None else int((batch.routing[..., 0] == NO_ROUTING).any(axis=1).sum())


def spread_rows(count: int, spec: RoutingSpec) -> Int32Array:
    """Routing int32[count, L, K] for padding: distinct experts in each row, every expert as often as any other.

    Rows of zeros would send all padding to expert 0, and name it K times, which no dispatcher expects.
    """
    first = np.arange(count)[:, None, None] * spec.top_k + np.arange(spec.num_moe_layers)[:, None]
    rows: Int32Array = ((first + np.arange(spec.top_k)) % spec.num_experts).astype(np.int32)
    return rows


def _join(samples: Sequence[Sample], indices: list[int], spec: RoutingSpec | None, multiple: int) -> Microbatch:
    chosen = [samples[i] for i in indices]
    padding = -sum(sample.positions for sample in chosen) % multiple
    lengths = np.array([sample.positions for sample in chosen] + [padding] * bool(padding), dtype=np.int32)

    def join(parts: Sequence[npt.NDArray[Any]], dtype: type[Scalar]) -> npt.NDArray[Scalar]:
        joined: npt.NDArray[Scalar] = np.concatenate([*parts, np.zeros(padding, dtype=dtype)]).astype(dtype, copy=False)
        return joined

    routing = None
    if spec is not None:
        shape = (spec.num_moe_layers, spec.top_k)
        absent = np.int32(NO_ROUTING)
        rows = [np.full((s.positions, *shape), absent) if s.routing is None else s.routing for s in chosen]
        routing = np.concatenate([*rows, spread_rows(padding, spec)]).astype(np.int32, copy=False)
    return Microbatch(
        token_ids=join([sample.token_ids[:-1] for sample in chosen], np.int64),
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        labels=join([sample.token_ids[1:] for sample in chosen], np.int64),
        loss_mask=join([sample.loss_mask for sample in chosen], np.bool_),
        logprobs=join([sample.logprobs for sample in chosen], np.float32),
        versions=join([sample.versions for sample in chosen], np.int32),
        advantages=join([sample.advantages for sample in chosen], np.float32),
        resume_position=join([sample.resume_position for sample in chosen], np.int8),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        longest=int(lengths.max()),
        samples=tuple(indices),
        routing=routing,
    )


def split(values: npt.NDArray[Scalar], batch: Microbatch) -> list[npt.NDArray[Scalar]]:
    """Values [T, ...] of a microbatch by sample, in the order of ``batch.samples``; padding is left out."""
    return np.split(values, batch.cu_seqlens[1 : len(batch.samples) + 1])[:-1]


def unpack(values: Sequence[npt.NDArray[np.float32]], batches: Sequence[Microbatch], count: int) -> list[Float32Array]:
    """Per-position values [T] of each microbatch back to one array per packed sample, in their order."""
    result = [np.zeros(0, dtype=np.float32)] * count
    for array, batch in zip(values, batches, strict=True):
        for index, part in zip(batch.samples, split(array, batch), strict=True):
            result[index] = part
    return result


def split_over_ranks(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices of ``costs`` by data-parallel rank, balanced: the costliest first, each to the least loaded rank.

    Deterministic; indices ascend within a rank; with fewer costs than ranks, some ranks get none.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        shares[rank].append(index)
        load[rank] += costs[index]
    return [sorted(share) for share in shares]
