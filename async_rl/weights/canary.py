"""The canary: a fixed probe on which engine and trainer must agree after each weight sync (invariant 10). Pure.

Owns the probe's sequences, the comparison and the verdict. Knows ``config`` for the tolerance; does not know how
log-probs are computed.

With ``sync.canary_tolerance: auto`` the tolerance is calibrated. The first comparison of a run is on weights that both
sides have read from the same files, so what it measures is numerics: rounding that grows with the number of layers and
with how unlikely a token is. Every later comparison is allowed a few times as much. What a first comparison may
measure is bounded by ``CEILING``, and above ``FLOOR`` no single layer may stand out, so that a fault is not taken for
the scale. Later a single token that is off by more than that is looked into in the same way (``bounds``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from async_rl.config.schema import RunConfig
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

# Rounding errors cancel out, wrong weights shift every token: the mean over all tokens must stay below this share of a
# tolerance that is one number.
MEAN_SHARE = 0.1

Numerics = Literal["float32", "bfloat16", "fp8"]
"""The coarsest type in which one of the two sides computes."""

# How much more than at the first comparison numerics may explain later: training makes a model sharper. In 40 steps of
# a real model of 30 layers in float32 the largest difference grew by a factor of 1.8; the largest of 24 syncs of the
# demo in bfloat16 was 2.4 times their median.
HEADROOM = 3.0

# From which multiple on the layers are looked into. fp8 makes so much of a difference by itself that a layer with old
# weights adds little to it: the mean of 30 thin layers went from 0.92 to 1.2 by an update of half the weights' size,
# and to 1.7 where one layer missed that update.
LOOK: dict[Numerics, float] = {"float32": HEADROOM, "bfloat16": HEADROOM, "fp8": 1.4}


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far engine and trainer may be apart in log-prob."""

    token: float
    """On any one token."""
    mean: float
    """On average over all tokens."""

    @classmethod
    def of(cls, token: float) -> Tolerance:
        """Return the tolerance that a single number stands for."""
        return cls(token, MEAN_SHARE * token)


# The least that is allowed, which small models need. float32: kernels that add in another order, with the routing
# replayed; about 1e-6 is seen. bfloat16: a logit of 30 is off by 0.06 from its own rounding alone; 0.24 is the largest
# in 24 syncs of the demo. Means of 1e-6 in float32 and 0.014 in bfloat16 were measured, of 0.1 in fp8.
FLOOR: dict[Numerics, Tolerance] = {
    "float32": Tolerance.of(1e-4),
    "bfloat16": Tolerance.of(0.5),
    "fp8": Tolerance.of(1.0),
}

# The most that a first comparison may measure. A real model of 30 layers has 7.7e-5 on a token and 1.2e-5 on average
# in float32, 0.74 and 0.089 in bfloat16, on random tokens; rounding grows about as the number of layers. Names of two
# layers or tensors that were swapped cost whole nats per token. fp8: 4.3 and 0.92 with 30 thin layers on
# random tokens.
CEILING: dict[Numerics, Tolerance] = {
    "float32": Tolerance.of(1e-3),
    "bfloat16": Tolerance.of(2.5),
    "fp8": Tolerance(15.0, 1.5),
}


@dataclass(frozen=True, slots=True)
class Noise:
    """What the first comparison of a run measured, on weights that both sides had read from the same files."""

    dtype: Numerics
    """The noise of another type is no scale for this one."""
    token: float
    mean: float


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


def text_probe(prompts: Iterable[Int32Array], *, max_tokens: int = TOKENS) -> list[Int32Array]:
    """Return the ends of the first prompts, int32[n]: text, which a model finds likelier than random tokens.

    The ends, because the prompts of a chat begin alike. A prompt of one token has nothing to score.
    """
    ends = (ids[-min(TOKENS, max_tokens) :] for ids in itertools.islice(prompts, SEQUENCES))
    return [np.asarray(end, dtype=np.int32) for end in ends if len(end) > 1]


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


def numerics(config: RunConfig) -> Numerics:
    """Return the coarsest type in which one of the two sides computes: it decides how far they may be apart."""
    if config.rollout.quantization is not None or config.rollout.kv_cache_dtype is not None:
        return "fp8"
    return "bfloat16" if "bfloat16" in (config.model.dtype, config.engine_dtype) else "float32"


def tolerance(config: RunConfig, noise: Noise | None) -> Tolerance | None:
    """Return how far the two sides may be apart; None when the comparison at hand is the one that calibrates."""
    configured, dtype = config.sync.canary_tolerance, numerics(config)
    if configured is None:
        return FLOOR[dtype]
    if configured != "auto":
        return Tolerance.of(configured)
    if noise is None or noise.dtype != dtype:
        return None
    return _scaled(dtype, noise, HEADROOM)


def _scaled(dtype: Numerics, noise: Noise, by: float) -> Tolerance:
    return Tolerance(max(FLOOR[dtype].token, by * noise.token), max(FLOOR[dtype].mean, by * noise.mean))


def bounds(config: RunConfig, noise: Noise | None) -> tuple[Tolerance, Tolerance]:
    """Return what agrees without a look into the layers, and what is refused whatever that look shows.

    Between the two a layer must stand out for a refusal. A calibrated tolerance leaves a single token as much room as a
    first comparison has: the largest of some hundred differences grows while training makes the model sharper, and the
    mean, which has no more room, hardly does. A model of 30 layers in float32 had 3.3 times the largest difference of
    its start after 23 steps, and its mean was where it had been.
    """
    dtype, limit = numerics(config), tolerance(config, noise)
    if limit is None:
        return FLOOR[dtype], CEILING[dtype]
    if noise is None or config.sync.canary_tolerance != "auto":
        return limit, limit
    return _scaled(dtype, noise, LOOK[dtype]), Tolerance(max(limit.token, CEILING[dtype].token), limit.mean)


def compare(engine: Sequence[Float32Array], trainer: Sequence[Float32Array]) -> CanaryReport:
    """Compare the log-probs float32[N-1] of each probe sequence; a value that is not finite is infinitely far off.

    Raises WeightSyncMismatch when the two sides scored different numbers of tokens.
    """
    lengths = [[len(a) for a in side] for side in (engine, trainer)]
    if lengths[0] != lengths[1] or not lengths[0]:
        raise WeightSyncMismatch(
            f"canary: the engine scored {lengths[0]} tokens per sequence, the trainer {lengths[1]}"
        )
    # All tokens at once: the driver does this for each of some hundred replicas while they wait.
    diffs = _distance(np.concatenate(engine), np.concatenate(trainer))
    worst = int(np.argmax(diffs))
    ends = np.cumsum(lengths[0])
    sequence = int(np.searchsorted(ends, worst, side="right"))
    begin = int(ends[sequence]) - lengths[0][sequence]
    return CanaryReport(
        max_abs_diff=float(diffs[worst]),
        mean_abs_diff=float(diffs.mean()),
        sequence=sequence,
        position=worst - begin + 1,  # log-prob i is that of token i + 1
    )


def agrees(report: CanaryReport, limit: Tolerance) -> bool:
    """Return whether numerics alone explain it: neither a token nor the mean is off by more than the limit."""
    return report.max_abs_diff <= limit.token and report.mean_abs_diff <= limit.mean


def mismatch(replica: int, report: CanaryReport, limit: Tolerance, where: str) -> WeightSyncMismatch:
    """Return the error for a report that is refused; ``where`` says which layers differ."""
    return WeightSyncMismatch(
        f"canary: replica {replica} and the trainer differ by {report.max_abs_diff:.3g} in log-prob (mean "
        f"{report.mean_abs_diff:.3g}) at token {report.position} of probe sequence {report.sequence}; "
        f"allowed is {limit.token:.3g}, and {limit.mean:.3g} on average. Comparison of the layers: {where}. "
        + (
            "So large a mean shows that the weights are not the ones sent: compare the names and shapes that the "
            "weight source yields with the checkpoint, and check that the engine reloads packed weights correctly"
            if report.mean_abs_diff > limit.mean
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
