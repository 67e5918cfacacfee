"""Routed experts as engines return them: which columns and rows are kept, and which arrays are refused.

Pure. Shapes: n rows, A all decoder layers, L MoE layers, K experts per token; P prompt tokens, G response tokens.

An interrupted generation is resumed under newer weights, and its prefix is computed again. From then on each row of
the prefix exists twice: as it was when its token was sampled, and as it was when the later tokens were sampled. The
three routing policies choose differently which of them the trainer replays: docs/concepts/routing-replay.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from async_rl.config.fields import RoutingPolicy
from async_rl.errors import InvalidTrajectory
from async_rl.models.routing import repeated_expert
from async_rl.types import ExpertIds, RoutingSpec, Segment, check_routing

# From this many rows on, a layer of zeros, and on the probe's unlike tokens one that always picks the same experts in
# the same order, counts as an array that was never filled in: routers settle on one choice for a few tokens, not for
# so many.
CONSTANT_LAYER_ROWS = 256

# One row in so many is checked again when a resumed call returns the rows of its prefix.
_SAMPLED = 16


class MergedRouting(NamedTuple):
    """What a routing policy keeps of all calls so far: segments before the last call, and rows [P+G-1, L, K]."""

    segments: tuple[Segment, ...]
    routed_experts: ExpertIds


Merge = Callable[[tuple[Segment, ...], ExpertIds | None, ExpertIds], MergedRouting]


def replace(segments: tuple[Segment, ...], _earlier: ExpertIds | None, returned: ExpertIds) -> MergedRouting:
    """Keep the last call's rows, which are of the full sequence, in place of all earlier ones.

    Right for what the last call sampled: its tokens attended to a prefix computed under its own weights, with this
    routing. The tokens before the resume point are replayed with experts that newer weights chose for them, while
    their behaviour log-probs are of the older ones. Appending the rows instead would repeat the prefix and shift every
    later row.
    """
    return MergedRouting(segments, returned)


def preserve(segments: tuple[Segment, ...], earlier: ExpertIds | None, returned: ExpertIds) -> MergedRouting:
    """Keep earlier rows, and append the call's rows, which are of the tokens that had none.

    Right for what was sampled before the resume point: each row is that of the call which first computed it. The
    tokens after it attended to a prefix computed again, with rows that are not kept. The rows add up because the call
    returns them from ``first_row`` on; a full array would be refused by its length.
    """
    return MergedRouting(
        segments, returned if earlier is None else cast(ExpertIds, np.concatenate([earlier, returned]))
    )


def exact(segments: tuple[Segment, ...], earlier: ExpertIds | None, returned: ExpertIds) -> MergedRouting:
    """Keep for every segment the rows of its own call, to be trained in the context in which it was sampled.

    Right for all tokens, at the price of computing a prefix once per segment. The rows of the last call become the
    trajectory's own; the rows that were its own until now move to the segments that they belong to.
    """
    if earlier is None:
        return MergedRouting(segments, returned)
    # A row per token but the last: a segment that ends after n tokens, prompt included, needs n - 1 of them.
    beyond = segments[-1].stop
    return MergedRouting(
        tuple(
            segment
            if segment.routed_experts is not None
            else dataclasses.replace(segment, routed_experts=earlier[: len(earlier) - (beyond - segment.stop)])
            for segment in segments
        ),
        returned,
    )


MERGE_POLICIES: dict[RoutingPolicy, Merge] = {"replace": replace, "preserve": preserve, "exact": exact}


def first_row(routing_policy: RoutingPolicy, known_rows: int) -> int:
    """Return the first row that the next call must return, after ``known_rows`` rows: kept rows need not come again."""
    return known_rows if routing_policy == "preserve" else 0


def moe_columns(routed: ExpertIds, *, num_layers: int, moe_layers: Sequence[int]) -> ExpertIds:
    """Select the MoE layers: [n, A, K] to [n, L, K]. Engines return a column for every layer, dense ones included.

    Raises InvalidTrajectory when there is neither one column per layer nor one per MoE layer: which column belongs to
    which layer could only be guessed.
    """
    columns = routed.shape[1]
    if columns == num_layers and len(moe_layers) < num_layers:
        return cast(ExpertIds, np.take(routed, list(moe_layers), axis=1))  # a quarter of the time that indexing takes
    if columns != len(moe_layers):
        raise InvalidTrajectory(
            f"the engine returned routed experts of {columns} layers; the model has {num_layers}, "
            f"of which {len(moe_layers)} are MoE layers"
        )
    return routed


def check(name: str, routed: ExpertIds, *, rows: int, spec: RoutingSpec, known: int = 0) -> None:
    """Raise InvalidTrajectory unless ``routed`` can be what routers chose for ``rows`` tokens.

    The first ``known`` rows are of tokens that an earlier call returned rows for: of these only one in _SAMPLED is
    searched for repeated experts, or a response that is resumed ten times would be searched ten times.

    Refused are a wrong shape, type or range, an expert twice in one row, and a layer of zeros over a long sequence: an
    array that was never filled in has these. Any other constant may be true: a policy that repeats itself, or a router
    that has collapsed, sends all tokens of a response to the same experts.
    """
    check_routing(name, routed, rows=rows, spec=spec)
    for searched in (slice(0, known, _SAMPLED), slice(known, rows, 1)):
        if (place := repeated_expert(routed[searched], spec.num_experts)) is not None:
            row, layer = searched.start + searched.step * place[0], place[1]
            raise InvalidTrajectory(
                f"{name}: routed_experts[{row}, {layer}] names an expert twice: {routed[row, layer].tolist()}"
            )
    if spec.top_k == 1 < spec.num_experts:  # of more, zeros are repeated experts
        _refuse_constant(name, routed, np.logical_not(routed.any(axis=0).any(axis=-1)))


def check_probe(routed: Sequence[ExpertIds], lengths: Sequence[int], spec: RoutingSpec) -> None:
    """Check the routed experts of scored sequences of ``lengths`` tokens, [n - 1, L, K] each, one by one and together.

    Together they are many rows of unlike tokens: a layer that is constant over them all is an error.
    Raises InvalidTrajectory.
    """
    for index, (rows, length) in enumerate(zip(routed, lengths, strict=True)):
        check(f"probe sequence {index}", rows, rows=length - 1, spec=spec)
    whole = cast(ExpertIds, np.concatenate(list(routed)))
    if spec.top_k < spec.num_experts:
        _refuse_constant("the probe", whole, (whole == whole[:1]).all(axis=(0, 2)))


def _refuse_constant(name: str, routed: ExpertIds, constant: npt.NDArray[np.bool_]) -> None:
    """Raise InvalidTrajectory if there are many rows and a layer is constant, as ``constant`` bool[L] says."""
    if len(routed) >= CONSTANT_LAYER_ROWS and constant.any():
        layer = int(np.flatnonzero(constant)[0])
        raise InvalidTrajectory(
            f"{name}: MoE layer {layer} has the same experts {routed[0, layer].tolist()} in all {len(routed)} rows; "
            "the engine did not record its routed experts (is the layer a dense one?)"
        )
