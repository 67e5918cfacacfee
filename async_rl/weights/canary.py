"""The canary: a fixed probe on which engine and trainer must agree after each weight sync (invariant 10). Pure.

Owns the probe's sequences, the comparison and the verdict. Knows ``config`` for the tolerance; does not know how
log-probs are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from async_rl.config.schema import Dtype, RunConfig
from async_rl.errors import WeightSyncMismatch
from async_rl.types import ExpertIds, Float32Array, Int32Array, RoutingSpec

# 8 sequences of 32 tokens: 256 tokens in one small forward pass. More are added until they reach every expert.
SEQUENCES = 8
TOKENS = 32

# How many sequences are tried at once to reach more experts, and how many times at the start of a run. Together they
# have 8,192 tokens: an expert that none of them reaches is picked less than once in a thousand tokens of a layer of 128
# experts with top 8.
CANDIDATES = 32
BATCHES = 8

# Largest difference of a token that numerics alone explain. float32: kernels that add in another order, with the
# routing replayed; about 1e-6 is seen. bfloat16: a logit of 30 is off by 0.06 from its own rounding alone; 0.24 is the
# largest in 24 syncs, routing replayed, on random tokens, which a sharp model finds very unlikely.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}

# Rounding errors cancel out, wrong weights shift every token: the mean over all tokens must stay below this share of
# the tolerance. Means of 1e-6 in float32 and 0.014 in bfloat16 were measured.
MEAN_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """How far engine and trainer were apart in log-prob, over all scored tokens."""

    max_abs_diff: float
    mean_abs_diff: float
    sequence: int
    """The probe sequence with the worst token."""
    position: int
    """The worst token's index in that sequence."""


def make_probe(seed: int, vocab_size: int, *, max_tokens: int = TOKENS) -> list[Int32Array]:
    """Return sequences int32[n], the same for the same arguments; ``max_tokens`` is what the model's context allows."""
    return _random_sequences([seed, 0xCA11A12], SEQUENCES, vocab_size, max_tokens)


def candidates(seed: int, batch: int, vocab_size: int, *, max_tokens: int = TOKENS) -> list[Int32Array]:
    """Return sequences that may reach experts which the probe does not; each ``batch`` has different ones."""
    return _random_sequences([seed, 0xCA11A12, batch], CANDIDATES, vocab_size, max_tokens)


def _random_sequences(stream: list[int], count: int, vocab_size: int, max_tokens: int) -> list[Int32Array]:
    rng = np.random.default_rng(stream)  # A stream of its own: other users of the seed draw other numbers.
    length = min(TOKENS, max_tokens)
    return list(rng.integers(0, vocab_size, size=(count, length), dtype=np.int32))


def reached(routed: Sequence[ExpertIds], spec: RoutingSpec) -> npt.NDArray[np.bool_]:
    """Return which experts scored sequences went to, bool[L, E], from the routed experts [N-1, L, K] of each."""
    result = np.zeros((spec.num_moe_layers, spec.num_experts), dtype=np.bool_)
    layers = np.arange(spec.num_moe_layers)[:, None]
    for rows in routed:
        result[layers, rows] = True
    return result


def greedy_cover(known: npt.NDArray[np.bool_], routed: Sequence[ExpertIds], spec: RoutingSpec) -> list[int]:
    """Return the indices of candidates that together reach all that any reaches beyond ``known`` bool[L, E].

    Each choice is the candidate that adds most to what the ones before it reach; candidates that add nothing are left
    out.
    """
    each = [reached([rows], spec) for rows in routed]
    covered, chosen = known.copy(), []
    while each:
        gains = [int((candidate & ~covered).sum()) for candidate in each]
        best = int(np.argmax(gains))
        if gains[best] == 0:
            break
        covered |= each[best]
        chosen.append(best)
    return chosen


def coarser_dtype(config: RunConfig) -> Dtype:
    """Return the coarser of the two sides' types, which decides how far they may be apart."""
    return "bfloat16" if "bfloat16" in (config.model.dtype, config.engine_dtype) else "float32"


def tolerance(config: RunConfig) -> float:
    """Return sync.canary_tolerance, or by default what the coarser of the two sides' types allows."""
    configured = config.sync.canary_tolerance
    return TOLERANCE[coarser_dtype(config)] if configured is None else configured


def compare(engine: Sequence[Float32Array], trainer: Sequence[Float32Array]) -> CanaryReport:
    """Compare the log-probs float32[N-1] of each probe sequence; a value that is not finite is infinitely far off.

    Raises WeightSyncMismatch when the two sides scored different numbers of tokens.
    """
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


def agrees(report: CanaryReport, limit: float) -> bool:
    """Return whether numerics alone explain it: no token is off by more than ``limit``, nor the mean by a tenth."""
    return report.max_abs_diff <= limit and report.mean_abs_diff <= MEAN_SHARE * limit


def mismatch(config: RunConfig, replica: int, report: CanaryReport, where: str) -> WeightSyncMismatch:
    """Return the error for a report above the tolerance; ``where`` says which layers differ."""
    limit = tolerance(config)
    return WeightSyncMismatch(
        f"canary: replica {replica} and the trainer differ by {report.max_abs_diff:.3g} in log-prob (mean "
        f"{report.mean_abs_diff:.3g}) at token {report.position} of probe sequence {report.sequence}; "
        f"allowed is {limit:g}, and {MEAN_SHARE * limit:g} on average. Comparison of the layers: {where}. "
        + (
            "So large a mean shows that the weights are not the ones sent: compare the names and shapes that the "
            "weight source yields with the checkpoint, and check that the engine reloads packed weights correctly"
            if report.mean_abs_diff > MEAN_SHARE * limit
            else "The mean is small, so look for a single layer or expert, or for numerics: another dtype, kernel or "
            "attention implementation. If it is numerics, raise sync.canary_tolerance"
        )
    )


def wrong_numbering(replica: int, report: CanaryReport, where: str) -> WeightSyncMismatch:
    """Return the error for two sides that compute the same, but number the experts or MoE layers differently."""
    return WeightSyncMismatch(
        f"canary: replica {replica} and the trainer agree while each routes by itself, but differ by "
        f"{report.max_abs_diff:.3g} in log-prob when the trainer replays the engine's routed experts: engine and "
        f"trainer number experts (or MoE layers) differently; {where}. Make the engine return logical expert ids, "
        "without a load balancer's renumbering, or set trainer.router_replay to R2"
    )


def _distance(a: Float32Array, b: Float32Array) -> npt.NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # inf - inf
        diff = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return np.where(np.isfinite(diff), diff, np.inf)
