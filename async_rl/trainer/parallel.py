"""Says which part of a model and of a microbatch a rank holds. Pure: NumPy only; knows the sizes in ``config``.

Ranks are numbered as Megatron numbers them (order tp-cp-ep-dp-pp: the tensor-parallel index runs fastest, the pipeline
stage slowest); ``platform.init_distributed`` checks that the two agree. Expert layers lay out the ranks of a stage in
their own way: etp fastest, then ep, then the remaining ranks, on which an expert's parameters are replicated.

Shapes: S sequences, T positions of a microbatch. Each sequence is padded to a multiple of ``sequence_multiple``, and
the microbatch to one of ``microbatch_multiple``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from async_rl.config.training import ParallelSection
from async_rl.types import Int32Array

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's coordinates."""

    sizes: ParallelSection
    """How many ranks there are along each coordinate."""
    rank: int
    """The global rank."""
    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    """Expert-parallel index, within an expert layer."""
    etp: int
    """Index among the ranks that split an expert, within an expert layer."""

    @classmethod
    def of(cls, sizes: ParallelSection, rank: int) -> Place:
        """Return the coordinates of global rank ``rank``."""
        stage_ranks = sizes.tp * sizes.cp * sizes.dp
        within = rank % stage_ranks
        return cls(
            sizes=sizes,
            rank=rank,
            tp=within % sizes.tp,
            cp=within // sizes.tp % sizes.cp,
            dp=within // (sizes.tp * sizes.cp),
            pp=rank // stage_ranks,
            etp=within % sizes.etp,
            ep=within // sizes.etp % sizes.ep,
        )

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the last pipeline stage."""
        return self.pp == self.sizes.pp - 1

    @property
    def reports_loss(self) -> bool:
        """Whether this rank's loss and metrics count.

        The tensor-parallel ranks of the last stage compute the same, of which the first reports.
        """
        return self.is_last_stage and self.tp == 0


def world_size(sizes: ParallelSection) -> int:
    """Return the number of the trainer's ranks. Expert parallelism adds none."""
    return sizes.dp * sizes.tp * sizes.cp * sizes.pp


def owning_rank(sizes: ParallelSection, stage: int, expert_rank: int | None) -> int:
    """Return the lowest rank that holds the first tensor-parallel part of a parameter of pipeline stage ``stage``.

    expert_rank: the expert-parallel rank of the expert that the parameter belongs to; None for a dense layer.
    """
    first = stage * sizes.tp * sizes.cp * sizes.dp
    return first if expert_rank is None else first + expert_rank * sizes.etp


def layers(num_layers: int, sizes: ParallelSection, stage: int, chunk: int) -> range:
    """Return the global numbers of the layers of a stage's virtual chunk: chunk after chunk, each over all stages."""
    counts, number = sizes.stage_layers(num_layers), chunk * sizes.pp + stage
    first = sum(counts[:number])
    return range(first, first + counts[number])


def stage_of(num_layers: int, sizes: ParallelSection, layer: int) -> tuple[int, int, int]:
    """Return (pipeline stage, its virtual chunk, number within the chunk) of a layer: the inverse of ``layers``.

    Raises ValueError for a layer that no stage has.
    """
    left = layer
    for number, count in enumerate(sizes.stage_layers(num_layers)):
        if left < count:
            chunk, stage = divmod(number, sizes.pp)
            return stage, chunk, left
        left -= count
    raise ValueError(f"layer {layer} of {num_layers} is in no stage")


def expert_rank_of(num_experts: int, sizes: ParallelSection, expert: int) -> tuple[int, int]:
    """Return (expert-parallel rank, number on that rank) of an expert."""
    return divmod(expert, num_experts // sizes.ep)


def sequence_multiple(sizes: ParallelSection) -> int:
    """Return the divisor of every sequence's length: context parallelism gives each rank two of 2 x cp equal parts."""
    return 2 * sizes.cp if sizes.cp > 1 else 1


def microbatch_multiple(sizes: ParallelSection, asked: int = 1) -> int:
    """Return the divisor of every microbatch's length.

    Sequence parallelism cuts the rows of a context-parallel rank into tp parts, and kernels want the rows of each rank
    to be a multiple of ``asked``.
    """
    return math.lcm(sequence_multiple(sizes), sizes.cp * math.lcm(sizes.tp, asked))


def context_rows(cu_seqlens: Int32Array, place: Place) -> Int64Array:
    """Return the positions int64[T / cp] of a microbatch that the rank's attention layers see, in their order.

    cu_seqlens int32[S + 1]. Each sequence is cut into 2 x cp parts, of which context-parallel rank r has parts r and
    2 x cp - 1 - r. With an early and a late part, causal attention costs every rank the same (Megatron-core
    ``get_batch_on_this_cp_rank``).
    """
    size = place.sizes.cp
    if size == 1:
        return np.arange(cu_seqlens[-1], dtype=np.int64)
    parts = [np.zeros(0, dtype=np.int64)]
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        length = (stop - start) // (2 * size)
        for part in (place.cp, 2 * size - 1 - place.cp):
            parts.append(np.arange(start + part * length, start + (part + 1) * length, dtype=np.int64))
    return np.concatenate(parts)


def router_rows(
    cu_seqlens: Int32Array, moe_layers: Sequence[int], num_layers: int, place: Place, chunk: int = 0
) -> tuple[Int64Array, list[int]]:
    """Return the rows that a rank's routers see of a microbatch, and the routers that it has.

    The rows are positions int64[T / cp / tp] in the routers' order; the routers are those of the rank's chunk
    ``chunk``, as ascending indices into ``moe_layers``, the global numbers of the model's MoE layers. Data-parallel
    ranks have microbatches of their own. Under sequence parallelism, which is on wherever tp exceeds 1, a router sees
    the tp-th part of the rank's rows.
    """
    rows = context_rows(cu_seqlens, place)
    share = len(rows) // place.sizes.tp
    rows = rows[place.tp * share : (place.tp + 1) * share]
    here = layers(num_layers, place.sizes, place.pp, chunk)
    return rows, [index for index, layer in enumerate(moe_layers) if layer in here]
