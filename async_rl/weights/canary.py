"""The canary: a fixed probe on which engine and trainer must agree after a push (invariant 10). Pure.

Knows ``config`` for the tolerance, and nobody who computes a log-prob.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from async_rl.config.schema import Dtype, RunConfig
from async_rl.errors import WeightSyncMismatch
from async_rl.types import ExpertIds, Float32Array, Int32Array, RoutingSpec

# 8 sequences of 32 tokens: 256 tokens in one small forward pass. More are added until every expert is reached.
SEQUENCES = 8
TOKENS = 32

# Sequences that are tried at once to reach more experts, and how often at the start of a run. Together 8,192 tokens: an
# expert that none of them reaches is picked less than once in a thousand tokens of a layer of 128 with top 8.
CANDIDATES = 32
BATCHES = 8

# Largest difference of a token that numerics alone explain. float32: kernels that add in another order, with the
# routing replayed; about 1e-6 is seen. bfloat16: a logit of 30 is off by 0.06 from its own rounding alone; 0.24 is the
# largest in 24 pushes, routing replayed, on random tokens, which a sharp model finds very unlikely.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}

# Rounding errs this way and that, weights that are wrong err everywhere: the mean over all tokens must stay below this
# share of the tolerance. Seen are 1e-6 in float32 and 0.014 in bfloat16.
MEAN_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """How far two sides were apart, over all scored tokens; the worst is token ``position`` of ``sequence``."""

    max_abs_diff: float
    mean_abs_diff: float
    sequence: int
    position: int


def make_probe(seed: int, vocab_size: int, *, max_tokens: int = TOKENS) -> list[Int32Array]:
    """int32[n] token sequences, the same for the same arguments. ``max_tokens``: what the model's context allows."""
    return _random_sequences([seed, 0xCA11A12], SEQUENCES, vocab_size, max_tokens)


def candidates(seed: int, batch: int, vocab_size: int, *, max_tokens: int = TOKENS) -> list[Int32Array]:
    """Sequences that may reach experts which the probe does not; other ones for another ``batch``."""
    return _random_sequences([seed, 0xCA11A12, batch], CANDIDATES, vocab_size, max_tokens)


def _random_sequences(stream: list[int], count: int, vocab_size: int, max_tokens: int) -> list[Int32Array]:
    rng = np.random.default_rng(stream)  # a stream of its own, apart from whatever else uses the seed
    length = min(TOKENS, max_tokens)
    return list(rng.integers(0, vocab_size, size=(count, length), dtype=np.int32))


def reached(routed: Sequence[ExpertIds], spec: RoutingSpec) -> npt.NDArray[np.bool_]:
    """bool[L, E]: the experts that scored sequences went to, from their routing [N-1, L, K] each."""
    result = np.zeros((spec.num_moe_layers, spec.num_experts), dtype=np.bool_)
    layers = np.arange(spec.num_moe_layers)[:, None]
    for rows in routed:
        result[layers, rows] = True
    return result


def greedy_cover(known: npt.NDArray[np.bool_], routed: Sequence[ExpertIds], spec: RoutingSpec) -> list[int]:
    """Indices of the candidates that reach an expert which is not ``known`` bool[L, E], the most useful one first.

    Greedy cover: each choice is the candidate that adds most to what the ones before it reach.
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
    """The type with fewer bits of the two sides': it decides how far they may be apart."""
    return "bfloat16" if "bfloat16" in (config.model.dtype, config.engine_dtype) else "float32"


def tolerance(config: RunConfig) -> float:
    """sync.canary_tolerance, or what the coarser of the two sides' types allows."""
    configured = config.sync.canary_tolerance
    return TOLERANCE[coarser_dtype(config)] if configured is None else configured


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


def agrees(report: CanaryReport, limit: float) -> bool:
    """Whether numerics alone explain the report: no token is off by more than ``limit``, nor the mean by a tenth."""
    return report.max_abs_diff <= limit and report.mean_abs_diff <= MEAN_SHARE * limit


def mismatch(config: RunConfig, replica: int, report: CanaryReport, where: str) -> WeightSyncMismatch:
    """The error for a report above the tolerance. ``where``: what was found about the layers."""
    limit = tolerance(config)
    return WeightSyncMismatch(
        f"canary: replica {replica} and the trainer differ by {report.max_abs_diff:.3g} in log-prob (mean "
        f"{report.mean_abs_diff:.3g}) at token {report.position} of probe sequence {report.sequence}; "
        f"allowed is {limit:g}, and {MEAN_SHARE * limit:g} on average. Looking into the layers: {where}. "
        + (
            "So large a mean says that the weights are not the ones sent: compare the names and shapes that the "
            "weight source yields with the checkpoint, and see that the engine reloads packed weights correctly"
            if report.mean_abs_diff > MEAN_SHARE * limit
            else "The mean is small, so look for a single layer or expert, or for numerics: another dtype, kernel or "
            "attention implementation. If it is numerics, raise sync.canary_tolerance"
        )
    )


def wrong_numbering(replica: int, report: CanaryReport, where: str) -> WeightSyncMismatch:
    """The error where the two agree on what they compute, but not on what the experts are called."""
    return WeightSyncMismatch(
        f"canary: replica {replica} and the trainer agree while each routes by itself, and differ by "
        f"{report.max_abs_diff:.3g} in log-prob when the trainer replays the engine's routing: the engine returns "
        f"expert ids in another numbering than the trainer's, or its layers in another order; {where}. "
        "See that the engine returns logical expert ids, without a load balancer's renumbering, or set "
        "trainer.router_replay to R2"
    )


def _distance(a: Float32Array, b: Float32Array) -> npt.NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # inf - inf
        diff = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return np.where(np.isfinite(diff), diff, np.inf)
