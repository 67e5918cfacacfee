"""Fingerprints of the residual stream, which name the layer to blame when engine and trainer disagree. Pure.

A fingerprint is the stream after a layer times a fixed random matrix. It has a few numbers per token in place of the
hidden size, so it can travel, and it is linear, so a layer's contribution can be separated from its input.
Fingerprints of one sequence are float32 [L+1, N-1, WIDTH]: entry 0 after the embeddings, entry i + 1 after layer i as
config.json numbers it. The last token of a sequence has none, because it never enters the trainer's forward pass.

They are computed by ``weights.vllm.fingerprint`` in the engine and ``trainer.megatron.fingerprint`` in the trainer.
This module knows neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from async_rl.types import ExpertIds, Float32Array, Int32Array

# Numbers per token and layer. Norms over the tokens of a sequence are estimated from them: 30 tokens of 8 numbers each
# are off by about a tenth, while the differences of interest span orders of magnitude.
WIDTH = 8


@dataclass(frozen=True, slots=True)
class Scale:
    """What is no fault of a layer."""

    noise: float
    """Relative difference of one layer's contribution that numerics alone explain."""
    growth: float
    """A layer whose contribution differs by more times this than its input, and noise, is at fault itself. A correct
    layer passes a difference on at about its size, now and then at several times its size."""


# float32: kernels that add in another order; 1e-6 was measured. bfloat16: 2^-8 per operation, over the handful that a
# layer consists of. fp8: 2^-4. Contributions of 30 thin layers in fp8 differed by up to 0.6, at most 1.4 times as much
# as their input and noise; that of a layer which had missed an update of half its weights' size differed by 0.6 to 0.8,
# 2.2 to 3.5 times as much, and those of two swapped layers by more.
SCALES = {"float32": Scale(1e-5, 10.0), "bfloat16": Scale(3e-2, 10.0), "fp8": Scale(0.1, 2.0)}

# How many layers a message names.
_NAMED = 3


def projection(hidden_size: int) -> Float32Array:
    """Return the matrix float32[H, WIDTH] of +-1/sqrt(H), which is the same on both sides."""
    signs = np.random.default_rng(0xF1A6).integers(0, 2, size=(hidden_size, WIDTH)) * 2 - 1
    matrix: Float32Array = (signs / np.sqrt(hidden_size)).astype(np.float32)
    return matrix


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """How far the two sides are apart at one layer, relative to the trainer's own scale there."""

    name: str
    own: float
    """Difference of the layer's contribution to the stream."""
    given: float
    """Difference of its input; 0 for the embeddings."""

    def growth(self, scale: Scale) -> float:
        """Return how much larger the difference of the contribution is than that of the input."""
        return self.own / (self.given + scale.noise)


def layer_differences(engine: Float32Array, trainer: Float32Array) -> list[LayerDifference]:
    """Compare one sequence's fingerprints [L+1, N-1, WIDTH] of both sides: the embeddings, then layer by layer."""
    a, b = engine.astype(np.float64), trainer.astype(np.float64)
    result = [LayerDifference("embeddings", _relative(a[0], b[0]), 0.0)]
    for layer in range(len(b) - 1):
        own = _relative(a[layer + 1] - a[layer], b[layer + 1] - b[layer])
        result.append(LayerDifference(f"layer {layer}", own, _relative(a[layer], b[layer])))
    return result


def blame(differences: Sequence[LayerDifference], scale: Scale) -> list[LayerDifference]:
    """Return the layers that are at fault themselves, the worst first; none when every layer agrees."""
    guilty = [d for d in differences if d.own > scale.noise and d.growth(scale) > scale.growth]
    return sorted(guilty, key=lambda d: d.growth(scale), reverse=True)


def at_fault(engine: Float32Array, trainer: Float32Array, scale: Scale) -> bool:
    """Return whether one sequence's fingerprints blame any layer, or the embeddings."""
    return bool(blame(layer_differences(engine, trainer), scale))


def describe_layer_drift(engine: Float32Array, trainer: Float32Array, scale: Scale) -> str:
    """Return in words, for an error, which layers one sequence's fingerprints blame."""
    differences = layer_differences(engine, trainer)
    guilty = blame(differences, scale)
    if guilty:
        first = next(d for d in differences if d in guilty)
        listed = ", ".join(f"{d.name} (by {d.own:.2g}; its input by {d.given:.2g})" for d in guilty[:_NAMED])
        return f"what they add to the residual stream differs most in {listed}; the first to differ is {first.name}"
    largest = max(differences, key=lambda d: d.own)
    if largest.own <= scale.noise:
        return "the embeddings and every layer agree, so it is the final norm or the output layer"
    grown = max(differences, key=lambda d: d.growth(scale))
    return (
        f"no layer stands out; the difference grows most in {grown.name} "
        f"(by {grown.own:.2g}; its input by {grown.given:.2g})"
    )


def routing_differences(
    engine: Sequence[ExpertIds], trainer: Sequence[ExpertIds | Int32Array], moe_layers: Sequence[int]
) -> list[tuple[int, float]]:
    """Return (layer as in config.json, share of rows in which the two chose different experts) for each MoE layer.

    Both arguments are the routed experts [N-1, L, K] of the same sequences.
    """
    a, b = np.sort(np.concatenate(list(engine)), axis=-1), np.sort(np.concatenate(list(trainer)), axis=-1)
    shares = (a != b).any(axis=-1).mean(axis=0).tolist()
    return list(zip(moe_layers, shares, strict=True))


def describe_routing_drift(differences: Sequence[tuple[int, float]], *, first: bool) -> str:
    """Return in words which layers route most rows differently; with ``first``, the first layer that routes any so."""
    differing = [(layer, share) for layer, share in differences if share > 0]
    if not differing:
        return "both sides choose the same experts in every layer"
    if first:
        layer, share = differing[0]
        return f"the first layer in which the two choose different experts is layer {layer} ({share:.0%} of rows)"
    worst = sorted(differing, key=lambda pair: pair[1], reverse=True)
    listed = ", ".join(f"layer {layer} ({share:.0%} of rows)" for layer, share in worst[:_NAMED])
    return f"their own choice of experts differs most in {listed}"


def _relative(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Return |a - b| over |b|, or infinity when either is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        distance = float(np.linalg.norm(a - b))
    scale = float(np.linalg.norm(b))
    if not np.isfinite(distance) or not np.isfinite(scale):
        return float("inf")
    return distance / max(scale, float(np.finfo(np.float32).tiny))
