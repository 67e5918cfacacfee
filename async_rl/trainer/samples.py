"""Makes the samples that a trajectory is trained as. Pure: NumPy only; knows settings, ``types`` and ``models``.

A sample of N tokens has N - 1 positions: position t reads token t and predicts token t + 1. The last token is only
ever a label and never enters the forward pass, so that positions and rows of routed experts (P+G-1 of them) match one
to one. How samples lie in memory is decided in ``packing``.

Shapes: N tokens of a sample, P of its prompt, G of its response, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from async_rl.config.schema import RunConfig
from async_rl.errors import ReplayError
from async_rl.metrics.records import RESUME_POSITIONS
from async_rl.models.routing import repeated_expert
from async_rl.types import (
    ExpertIds,
    Float32Array,
    Group,
    Int32Array,
    RoutingSpec,
    Segment,
    Trajectory,
    source_of,
)

BoolArray = npt.NDArray[np.bool_]
Int8Array = npt.NDArray[np.int8]
Scalar = TypeVar("Scalar", bound=np.generic)

# Expert id of a row without routed experts: the router decides it. Real ids are never negative.
NO_ROUTING = -1


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence of N tokens as it is trained. Arrays by position describe the token that is predicted there."""

    name: str
    """Its name in errors."""
    trajectory_id: str
    """The trajectory that it was made from."""
    token_ids: Int32Array
    """int32[N]."""
    loss_mask: BoolArray
    """bool[N-1]: which tokens count. Where it is off, the arrays below have no meaning."""
    logprobs: Float32Array
    """float32[N-1]: behaviour log-probs."""
    versions: Int32Array
    """int32[N-1]: the policy version that each token was sampled with."""
    advantages: Float32Array
    """float32[N-1]."""
    resume_position: Int8Array
    """int8[N-1]: where each token lies relative to the last resume point, as an index into RESUME_POSITIONS."""
    engine: Int8Array
    """int8[N-1]: the engine that sampled each token, as an index into those of the run; their number for others."""
    routed_experts: ExpertIds | Int32Array | None = None
    """[N-1, L, K]: the experts to replay, NO_ROUTING in a row that has none; None if there is nothing to replay."""
    temperature: Float32Array | float = 1.0
    """float32[N-1], or one for all: that of the distribution from which each token was sampled."""
    weight: float = 1.0
    """The weight of each of its tokens in the sum that is the loss."""
    proximal: Float32Array | None = None
    """float32[N-1]: log-probs under the proximal policy, where the loss needs them."""
    reference: Float32Array | None = None
    """float32[N-1]: log-probs under the reference policy, where the loss needs them."""

    @property
    def positions(self) -> int:
        """How many positions the sample has."""
        return len(self.token_ids) - 1

    def with_advantages(self, values: Float32Array | float) -> Sample:
        """Return a copy with these advantages: float32[N-1], or one for all positions."""
        return replace(self, advantages=np.broadcast_to(np.asarray(values, dtype=np.float32), (self.positions,)))

    def with_weight(self, weight: float) -> Sample:
        """Return a copy whose tokens have this weight."""
        return replace(self, weight=weight)

    def with_logprobs(self, *, proximal: Float32Array | None = None, reference: Float32Array | None = None) -> Sample:
        """Return a copy with these log-probs, float32[N-1] each; None keeps those that the sample has."""
        return replace(
            self,
            proximal=self.proximal if proximal is None else proximal,
            reference=self.reference if reference is None else reference,
        )

    def with_routed_experts(self, routed_experts: ExpertIds | Int32Array) -> Sample:
        """Return a copy that replays ``routed_experts`` [N-1, L, K]."""
        return replace(self, routed_experts=routed_experts)


def samples_of(
    trajectory: Trajectory,
    *,
    oldest_version: int,
    per_segment: bool = False,
    advantage: float = 0.0,
    engines: Sequence[str] = (),
    temperature: float = 1.0,
) -> list[Sample]:
    """Return a trajectory's samples, with a loss on its sampled tokens of ``oldest_version`` or later (invariant 4).

    That is one sample, or with ``per_segment`` (routing policy ``exact``) one for each segment: all tokens up to the
    segment's end, the routed experts of the call that sampled it, and a loss on the segment's own tokens only. A sample
    without a token to train is left out. ``engines`` are the names of those of the run, and ``temperature`` is that of
    segments that do not say theirs.
    """
    whole = Segment(0, len(trajectory.response_ids), trajectory.segments[-1].version)
    segments = trajectory.segments if per_segment else (whole,)
    counts = trained_tokens(trajectory, oldest_version)
    return [
        _segment_sample(trajectory, segment, counts, advantage, engines, temperature)
        for segment in segments
        if bool(counts[segment.start : segment.stop].any())
    ]


def group_samples(group: Group, config: RunConfig, *, oldest_version: int) -> list[Sample]:
    """Return the samples of all trajectories of a group that are trained, as the settings say; see ``samples_of``.

    With trainer.mask_truncated those of truncated rollouts are not.
    """
    terms = config.terms(source_of(group.prompt.prompt_id), group.prompt.fields)
    return [
        sample
        for rollout in group.trainable
        if not (config.trainer.mask_truncated and rollout.end == "truncated")
        for trajectory in rollout.trajectories
        for sample in samples_of(
            trajectory,
            oldest_version=oldest_version,
            per_segment=config.async_training.partial_rollout.routing == "exact",
            engines=config.rollout.engine_names,
            temperature=terms.temperature,
        )
    ]


def trained_tokens(trajectory: Trajectory, oldest_version: int) -> BoolArray:
    """Return bool[G]: which response tokens were sampled, and are no older than ``oldest_version``."""
    counts: BoolArray = trajectory.sampled & (trajectory.versions >= oldest_version)
    return counts


def _segment_sample(
    trajectory: Trajectory,
    segment: Segment,
    counts: BoolArray,
    advantage: float,
    engines: Sequence[str],
    temperature: float,
) -> Sample:
    """Return the trajectory up to the end of ``segment``, with a loss on those tokens of the segment that count."""
    prompt, stop = len(trajectory.prompt_ids), segment.stop

    def over_response(values: npt.NDArray[Scalar], before: float = 0) -> npt.NDArray[Scalar]:
        # The first response token is predicted at position P - 1.
        return np.concatenate([np.full(prompt - 1, before, dtype=values.dtype), values[:stop]])

    routed_experts = trajectory.routed_experts if segment.routed_experts is None else segment.routed_experts
    return Sample(
        name=f"trajectory {trajectory.trajectory_id}, response [{segment.start}, {stop})",
        trajectory_id=trajectory.trajectory_id,
        token_ids=np.concatenate([trajectory.prompt_ids, trajectory.response_ids[:stop]]),
        loss_mask=over_response(counts & (np.arange(len(counts)) >= segment.start)),
        logprobs=over_response(trajectory.logprobs),
        versions=over_response(trajectory.versions),
        advantages=over_response(np.full(stop, advantage, dtype=np.float32)),
        resume_position=over_response(resume_positions(trajectory)),
        engine=over_response(engine_indices(trajectory, engines)),
        routed_experts=None if routed_experts is None else routed_experts[: prompt + stop - 1],
        temperature=over_response(temperatures(trajectory, temperature), before=1),
    )


def plain_sample(
    name: str, ids: Int32Array, mask: BoolArray | None = None, *, temperature: Float32Array | float = 1.0
) -> Sample:
    """Return a sample of int32[N] ids that no policy sampled; every token counts unless a mask bool[N-1] is given."""
    positions = max(len(ids) - 1, 0)
    return Sample(
        name=name,
        trajectory_id=name,
        token_ids=ids,
        loss_mask=np.ones(positions, dtype=np.bool_) if mask is None else mask,
        logprobs=np.zeros(positions, dtype=np.float32),
        versions=np.zeros(positions, dtype=np.int32),
        advantages=np.zeros(positions, dtype=np.float32),
        resume_position=np.zeros(positions, dtype=np.int8),
        engine=np.zeros(positions, dtype=np.int8),
        temperature=temperature,
    )


def temperatures(trajectory: Trajectory, otherwise: float) -> Float32Array:
    """Return float32[G]: the temperature at which each response token was sampled, ``otherwise`` where none is said."""
    result = np.full(len(trajectory.response_ids), otherwise, dtype=np.float32)
    for segment in trajectory.segments:
        if segment.temperature is not None:
            result[segment.start : segment.stop] = segment.temperature
    return result


def resume_positions(trajectory: Trajectory) -> Int8Array:
    """Return int8[G]: where each response token lies relative to the last resume point, by RESUME_POSITIONS."""
    points = trajectory.resume_points
    result = np.full(len(trajectory.response_ids), RESUME_POSITIONS.index("uninterrupted"), dtype=np.int8)
    if points:
        result[: points[-1]] = RESUME_POSITIONS.index("before")
        result[points[-1]] = RESUME_POSITIONS.index("first")
        result[points[-1] + 1 :] = RESUME_POSITIONS.index("after")
    return result


def engine_indices(trajectory: Trajectory, engines: Sequence[str]) -> Int8Array:
    """Return int8[G]: which of ``engines`` sampled each response token; their number where none of them did."""
    result = np.full(len(trajectory.response_ids), len(engines), dtype=np.int8)
    for segment in trajectory.segments:
        if segment.engine in engines:
            result[segment.start : segment.stop] = engines.index(segment.engine)
    return result


def check_routed_experts(sample: Sample, spec: RoutingSpec | None) -> None:
    """Raise ReplayError unless a model of ``spec`` (None: without a MoE layer) can execute the sample's routed experts.

    They must be [N-1, L, K], each row either NO_ROUTING or K distinct experts of the model. Megatron checks nothing of
    this.
    """
    name, routed_experts = sample.name, sample.routed_experts
    if routed_experts is None:
        return
    if spec is None:
        raise ReplayError(f"{name}: has routed experts, but the trainer's model has no MoE layer; check model.path")
    expected = (sample.positions, spec.num_moe_layers, spec.top_k)
    if routed_experts.shape != expected:
        raise ReplayError(f"{name}: routed_experts has shape {routed_experts.shape}, the model needs {expected}")
    if routed_experts.size == 0:
        return
    chosen = routed_experts
    if int(routed_experts.min()) < 0 or int(routed_experts.max()) >= spec.num_experts:
        absent = (routed_experts == NO_ROUTING).all(axis=-1)
        outside = ((routed_experts < 0) | (routed_experts >= spec.num_experts)).any(axis=-1) & ~absent
        if outside.any():
            row, layer = (int(i) for i in np.argwhere(outside)[0])
            raise ReplayError(
                f"{name}: row {row}, MoE layer {layer}: experts {routed_experts[row, layer].tolist()}, "
                f"the model has 0 to {spec.num_experts - 1}"
            )
        # Any distinct experts do in place of a row without routing, which would count as a repetition.
        chosen = np.where(absent[..., None], np.arange(spec.top_k, dtype=routed_experts.dtype), routed_experts)
    if (place := repeated_expert(chosen, spec.num_experts)) is not None:
        row, layer = place
        raise ReplayError(
            f"{name}: row {row}, MoE layer {layer}: expert repeated in {routed_experts[row, layer].tolist()}; "
            "padding or a prefix without routed experts was taken for routed experts"
        )
