"""Routed experts at the border: columns of MoE layers, what a resumed call does to earlier rows, what is refused.

Pure. Shapes: n rows, A all decoder layers, L MoE layers, K experts per token; P prompt tokens, G response tokens.

An interrupted generation is resumed under newer weights, and its prefix is computed again. From then on the prefix has
two routings: that under which its tokens were sampled, and that under which it was read when the later tokens were
sampled. The three policies are three answers to which of them the trainer replays: docs/concepts/routing-replay.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from async_rl.config.schema import RoutingPolicy
from async_rl.errors import InvalidTrajectory
from async_rl.types import ExpertIds, RoutingSpec, Segment, check_routing

# From this many rows on, a layer of zeros, and on the probe's unlike tokens one that always picks the same experts in
# the same order, is taken for an array that nobody filled in: routers settle on one choice for a few tokens, not for so
# many.
CONSTANT_LAYER_ROWS = 256


class MergedRouting(NamedTuple):
    """What a policy keeps of all calls so far: the segments before the last call, and rows [P+G-1, L, K]."""

    segments: tuple[Segment, ...]
    routed_experts: ExpertIds


Merge = Callable[[tuple[Segment, ...], ExpertIds | None, ExpertIds], MergedRouting]


def replace(segments: tuple[Segment, ...], earlier: ExpertIds | None, returned: ExpertIds) -> MergedRouting:
    """The last call's rows, which are of the full sequence, take the place of all earlier ones.

    Right for what the last call sampled: its tokens attended to a prefix computed under its own weights, with this
    routing. The tokens before the resume point are replayed with experts that newer weights chose for them, while
    their behaviour log-probs are of the older ones. Appending the rows instead would repeat the prefix and shift every
    later row.
    """
    return MergedRouting(segments, returned)


def preserve(segments: tuple[Segment, ...], earlier: ExpertIds | None, returned: ExpertIds) -> MergedRouting:
    """Earlier rows stay, and the call adds those of the tokens that had none: it was asked for no others.

    Right for what was sampled before the resume point: each row is that of the call which first computed it. The
    tokens after it attended to a prefix computed again, with routing that is not kept. The rows add up because the call
    returns them from ``first_row`` on; to append a full array is refused by its length.
    """
    return MergedRouting(
        segments, returned if earlier is None else cast(ExpertIds, np.concatenate([earlier, returned]))
    )


def exact(segments: tuple[Segment, ...], earlier: ExpertIds | None, returned: ExpertIds) -> MergedRouting:
    """Every segment keeps the rows of its own call, to be trained in the context in which it was sampled.

    Right for all tokens, at the price of computing a prefix once per segment. The rows of the last call are the
    trajectory's own; those that were, until now, are handed to the segments that they belong to.
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


def first_row(policy: RoutingPolicy, known_rows: int) -> int:
    """The first row that a call is asked for, when ``known_rows`` are there: what is kept need not be sent again."""
    return known_rows if policy == "preserve" else 0


def moe_columns(routed: ExpertIds, *, num_layers: int, moe_layers: Sequence[int]) -> ExpertIds:
    """[n, A, K] to [n, L, K]: engines return a column for every layer, dense ones included.

    Raises InvalidTrajectory where the columns are neither of all layers nor of the MoE layers: which is which could
    only be guessed.
    """
    columns = routed.shape[1]
    if columns == num_layers and len(moe_layers) < num_layers:
        return cast(ExpertIds, np.ascontiguousarray(routed[:, list(moe_layers)]))
    if columns != len(moe_layers):
        raise InvalidTrajectory(
            f"the engine returned routing for {columns} layers; the model has {num_layers}, "
            f"of which {len(moe_layers)} are MoE layers"
        )
    return routed


def check(name: str, routed: ExpertIds, *, rows: int, spec: RoutingSpec) -> None:
    """Raise InvalidTrajectory unless ``routed`` can be the routing of ``rows`` tokens that a router really chose.

    Besides shape, type and range: an expert twice in one row, and a layer of zeros over a long sequence, which is what
    an array holds that was never filled in. Any other constant may be true: a policy that has come to repeat itself, or
    a router that has collapsed, sends all tokens of a response to the same experts.
    """
    check_routing(name, routed, rows=rows, spec=spec)
    if spec.top_k > 1:
        ordered = np.sort(routed, axis=-1)
        twice = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
        if twice.any():
            row, layer = (int(i) for i in np.argwhere(twice)[0])
            raise InvalidTrajectory(
                f"{name}: routed_experts[{row}, {layer}] names an expert twice: {routed[row, layer].tolist()}"
            )
    if spec.top_k < spec.num_experts:
        _refuse_constant(name, routed, (routed == 0).all(axis=(0, 2)))


def check_probe(routed: Sequence[ExpertIds], lengths: Sequence[int], spec: RoutingSpec) -> None:
    """Judge the routing of scored sequences of ``lengths`` tokens, [n - 1, L, K] each, one by one and as one.

    Together they are many rows of unlike tokens, so that a layer which is constant over short responses shows here.
    """
    for index, (rows, length) in enumerate(zip(routed, lengths, strict=True)):
        check(f"probe sequence {index}", rows, rows=length - 1, spec=spec)
    whole = cast(ExpertIds, np.concatenate(list(routed)))
    if spec.top_k < spec.num_experts:
        _refuse_constant("the probe", whole, (whole == whole[:1]).all(axis=(0, 2)))


def _refuse_constant(name: str, routed: ExpertIds, constant: npt.NDArray[np.bool_]) -> None:
    """``constant`` bool[L]: the layers that are, whichever way that is judged."""
    if len(routed) >= CONSTANT_LAYER_ROWS and constant.any():
        layer = int(np.flatnonzero(constant)[0])
        raise InvalidTrajectory(
            f"{name}: MoE layer {layer} has the same experts {routed[0, layer].tolist()} in all {len(routed)} rows; "
            "the engine did not record its routing (is the layer a dense one?)"
        )
