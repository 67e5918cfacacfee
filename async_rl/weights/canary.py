"""The canary: a fixed probe on which engine and trainer must agree after a push (invariant 10). Pure.

Knows ``config`` for the tolerance, and nobody who computes a log-prob.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from async_rl.config import RunConfig
from async_rl.errors import WeightSyncMismatch
from async_rl.types import Float32Array, Int32Array

# 8 sequences of 32 tokens: 256 tokens in one small forward pass, enough to reach every expert of a layer of 64 with
# top 2 about eight times, so that a single misplaced expert shows.
SEQUENCES = 8
TOKENS = 32

# Largest difference that numerics alone explain. float32: kernels that add in another order, with the routing replayed;
# about 1e-6 is seen. bfloat16: 8 bits of mantissa, through a few dozen layers.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """How far two sides were apart, over all scored tokens; the worst is token ``position`` of ``sequence``."""

    max_abs_diff: float
    mean_abs_diff: float
    sequence: int
    position: int


def make_probe(seed: int, vocab_size: int, *, max_tokens: int = TOKENS) -> list[Int32Array]:
    """int32[n] token sequences, the same for the same arguments. ``max_tokens``: what the model's context allows."""
    rng = np.random.default_rng([seed, 0xCA11A12])  # a stream of its own, apart from whatever else uses the seed
    length = min(TOKENS, max_tokens)
    return list(rng.integers(0, vocab_size, size=(SEQUENCES, length), dtype=np.int32))


def tolerance(config: RunConfig) -> float:
    """sync.canary_tolerance, or what model.dtype allows."""
    configured = config.sync.canary_tolerance
    return TOLERANCE[config.model.dtype] if configured is None else configured


def compare(engine: Sequence[Float32Array], trainer: Sequence[Float32Array]) -> CanaryReport:
    """Log-probs float32[N-1] of each probe sequence from both sides. What is not finite is infinitely far."""
    lengths = [[len(a) for a in side] for side in (engine, trainer)]
    if lengths[0] != lengths[1] or not lengths[0]:
        raise WeightSyncMismatch(
            f"canary: the engine scored {lengths[0]} tokens per sequence, the trainer {lengths[1]}"
        )
    diffs = [_distance(np.asarray(a), np.asarray(b)) for a, b in zip(engine, trainer, strict=True)]
    sequence = int(np.argmax([diff.max() for diff in diffs]))
    worst = int(np.argmax(diffs[sequence]))
    return CanaryReport(
        max_abs_diff=float(diffs[sequence][worst]),
        mean_abs_diff=float(np.concatenate(diffs).mean()),
        sequence=sequence,
        position=worst + 1,  # log-prob i is that of token i + 1
    )


def check_canary(
    config: RunConfig, replica: int, engine: Sequence[Float32Array], trainer: Sequence[Float32Array]
) -> CanaryReport:
    """The report of ``compare``. Raises WeightSyncMismatch when the worst difference is above the tolerance."""
    report = compare(engine, trainer)
    limit = tolerance(config)
    if report.max_abs_diff <= limit:
        return report
    raise WeightSyncMismatch(
        f"canary: replica {replica} and the trainer differ by {report.max_abs_diff:.3g} in log-prob (mean "
        f"{report.mean_abs_diff:.3g}) at token {report.position} of probe sequence {report.sequence}; "
        f"allowed is {limit:g}. "
        + (
            "So large a mean says that the weights are not the ones sent: compare the names and shapes that the "
            "weight source yields with the checkpoint, and see that the engine reloads packed weights correctly"
            if report.mean_abs_diff > limit
            else "The mean is small, so look for a single layer or expert, or for numerics: another dtype, kernel or "
            "attention implementation. If it is numerics, raise sync.canary_tolerance"
        )
    )


def _distance(a: Float32Array, b: Float32Array) -> npt.NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # inf - inf
        diff = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return np.where(np.isfinite(diff), diff, np.inf)
