"""Routed experts at the border: columns of MoE layers, what a resumed call does to earlier rows, what is refused.

Pure. Shapes: n rows, A all decoder layers, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from async_rl.errors import InvalidTrajectory
from async_rl.types import ExpertIds, RoutingSpec, check_routing

# From this many rows on, a layer that always picks the same experts in the same order is taken for an array that nobody
# filled in. Real routers settle on one choice for a few tokens, not for this many of them.
CONSTANT_LAYER_ROWS = 256


def moe_columns(routed: ExpertIds, moe_layers: Sequence[int]) -> ExpertIds:
    """[n, A, K] to [n, L, K]: engines return a column for every layer, dense ones included."""
    if routed.shape[1] == len(moe_layers):
        return routed
    return cast(ExpertIds, np.ascontiguousarray(routed[:, list(moe_layers)]))


def replace(name: str, returned: ExpertIds, *, rows: int, spec: RoutingSpec) -> ExpertIds:
    """Routing of a trajectory after a call that sampled something (invariant 2): what the call returned, once checked.

    A call returns rows for the full sequence, the resumed prefix included, so they take the place of all earlier ones.
    Appending them would repeat the prefix and shift every later row.
    """
    check(name, returned, rows=rows, spec=spec)
    return returned


def check(name: str, routed: ExpertIds, *, rows: int, spec: RoutingSpec) -> None:
    """Raise InvalidTrajectory unless ``routed`` can be the routing of ``rows`` tokens that a router really chose.

    Besides shape, type and range: an expert twice in one row, and a layer that is constant over a long sequence, which
    is what an array looks like that was never filled in.
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
    if rows >= CONSTANT_LAYER_ROWS and spec.top_k < spec.num_experts:
        constant = (routed == routed[:1]).all(axis=(0, 2))
        if constant.any():
            layer = int(np.flatnonzero(constant)[0])
            raise InvalidTrajectory(
                f"{name}: MoE layer {layer} has the same experts {routed[0, layer].tolist()} in all {rows} rows; "
                "the engine did not record its routing (is the layer a dense one?)"
            )
