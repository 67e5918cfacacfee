"""Sequences to microbatches under a token budget, without padding. Pure: NumPy only; knows ``types``.

A sequence of N tokens is N - 1 positions: position t reads token t and predicts token t + 1. The last token
is only ever a label and never enters the forward pass, so that positions and rows of routing (P+G-1 of them)
match one to one.

Shapes: T positions of a microbatch, S sequences in it, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from async_rl.types import Float32Array, Int32Array, Trajectory

BoolArray = npt.NDArray[np.bool_]
Int64Array = npt.NDArray[np.int64]
Scalar = TypeVar("Scalar", bound=np.generic)

# Expert id of a row that has no routing: the router decides it. Real ids are never negative.
NO_ROUTING = -1


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence of N tokens as the trainer needs it; every array besides token_ids is by position, N-1 long.

    token_ids int32[N]; loss_mask bool[N-1], which predicted tokens count; logprobs float32[N-1], versions
    int32[N-1] and advantages float32[N-1] of the predicted token, zero where it has none; routing int32[N-1,
    L, K], NO_ROUTING where a row has none, or None if nothing is to be replayed.
    """

    name: str
    token_ids: Int32Array
    loss_mask: BoolArray
    logprobs: Float32Array
    versions: Int32Array
    advantages: Float32Array
    routing: Int32Array | None = None

    @property
    def positions(self) -> int:
        return len(self.token_ids) - 1

    def with_routing(self, routing: Int32Array) -> Sample:
        return replace(self, routing=routing)


@dataclass(frozen=True, slots=True)
class Microbatch:
    """S sequences back to back, T positions in all.

    token_ids, position_ids, labels int64[T]; loss_mask bool[T]; logprobs, advantages float32[T]; versions
    int32[T]; cu_seqlens int32[S+1], where each sequence starts; longest, its longest sequence; samples, their
    indices in the list that was packed; routing int32[T, L, K] or None.
    """

    token_ids: Int64Array
    position_ids: Int64Array
    labels: Int64Array
    loss_mask: BoolArray
    logprobs: Float32Array
    versions: Int32Array
    advantages: Float32Array
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
    "cu_seqlens",
    "routing",
)


def sample_of(trajectory: Trajectory, *, advantage: float, oldest_version: int) -> Sample:
    """The trajectory with a loss on its response tokens, less those sampled before ``oldest_version`` (invariant 4)."""
    prompt, response = len(trajectory.prompt_ids), len(trajectory.response_ids)

    def over_response(values: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        # The first response token is predicted at position P - 1.
        return np.concatenate([np.zeros(prompt - 1, dtype=values.dtype), values])

    fresh = trajectory.versions >= oldest_version
    return Sample(
        name=f"trajectory {trajectory.trajectory_id}",
        token_ids=np.concatenate([trajectory.prompt_ids, trajectory.response_ids]),
        loss_mask=over_response(fresh),
        logprobs=over_response(trajectory.logprobs),
        versions=over_response(trajectory.versions),
        advantages=over_response(np.full(response, advantage, dtype=np.float32)),
    )


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


def pack(samples: Sequence[Sample], budget: int, row_shape: tuple[int, int] | None = None) -> list[Microbatch]:
    """Samples to microbatches.

    row_shape: (L, K) to carry routing, samples without any getting rows of NO_ROUTING; None to carry none.
    """
    return [_join(samples, indices, row_shape) for indices in plan([sample.positions for sample in samples], budget)]


def rows_without_routing(batch: Microbatch) -> int:
    """Rows of a microbatch to be replayed that lack the routing of at least one layer."""
    return 0 if batch.routing is None else int((batch.routing[..., 0] == NO_ROUTING).any(axis=1).sum())


def _join(samples: Sequence[Sample], indices: list[int], row_shape: tuple[int, int] | None) -> Microbatch:
    chosen = [samples[i] for i in indices]
    lengths = np.array([sample.positions for sample in chosen], dtype=np.int32)
    routing = None
    if row_shape is not None:
        routing = np.concatenate(
            [
                sample.routing
                if sample.routing is not None
                else np.full((sample.positions, *row_shape), NO_ROUTING, dtype=np.int32)
                for sample in chosen
            ]
        )
    return Microbatch(
        token_ids=np.concatenate([sample.token_ids[:-1] for sample in chosen]).astype(np.int64),
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        labels=np.concatenate([sample.token_ids[1:] for sample in chosen]).astype(np.int64),
        loss_mask=np.concatenate([sample.loss_mask for sample in chosen]),
        logprobs=np.concatenate([sample.logprobs for sample in chosen]),
        versions=np.concatenate([sample.versions for sample in chosen]),
        advantages=np.concatenate([sample.advantages for sample in chosen]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        longest=int(lengths.max()),
        samples=tuple(indices),
        routing=routing,
    )


def unpack(values: Sequence[npt.NDArray[np.float32]], batches: Sequence[Microbatch], count: int) -> list[Float32Array]:
    """Per-position values [T] of each microbatch back to one array per packed sample, in their order."""
    result = [np.zeros(0, dtype=np.float32)] * count
    for array, batch in zip(values, batches, strict=True):
        for index, part in zip(batch.samples, np.split(array, batch.cu_seqlens[1:-1]), strict=True):
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
