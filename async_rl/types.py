"""The data that travels between processes: Prompt, Segment, Trajectory, RolloutRecord, Group. Validated when built.

Shapes: P prompt tokens, G response tokens, L MoE layers, K experts per token (top-k). The last token of a sequence
never went through a forward pass, so a sequence of P+G tokens has P+G-1 rows of routed experts. Knows only ``errors``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from async_rl.errors import InvalidTrajectory

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
ExpertIds = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

FinishReason = Literal["stop", "length"]
FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length")

# How a rollout ended: by itself, at a limit of tokens, turns or time, or because it was given up.
RolloutEnd = Literal["done", "truncated", "abandoned"]
ROLLOUT_ENDS: tuple[RolloutEnd, ...] = ("done", "truncated", "abandoned")

# Version of a response token that no policy sampled: the text of an environment between two turns.
NOT_SAMPLED = -1


@dataclass(frozen=True, slots=True)
class RoutingSpec:
    """The layout of routed experts, [rows, L, K] ids below E."""

    num_moe_layers: int
    """L."""
    top_k: int
    """K: experts per token."""
    num_experts: int
    """E: experts to choose from."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the ids, as vLLM returns them: uint8 up to 256 experts, uint16 above."""
        return np.dtype(np.uint8 if self.num_experts <= 256 else np.uint16)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One dataset row, tokenized."""

    prompt_id: str
    """The id "<epoch>-<row>", stable over the run and its restarts; conservation is counted by it. That of a source of
    data.sources begins with its name: "<source>/<epoch>-<row>"."""
    row: int
    """Number of the row over all files of the dataset, from 1."""
    text: str
    token_ids: Int32Array
    """int32[P]."""
    fields: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """The row's other fields, for the reward function."""

    def __post_init__(self) -> None:
        _check_array(f"prompt {self.prompt_id}", "token_ids", self.token_ids, np.int32, 1)
        if len(self.token_ids) == 0:
            raise InvalidTrajectory(f"prompt {self.prompt_id} (row {self.row}): no tokens")


def source_of(name: str) -> str:
    """Return the source that the id of a prompt or of a group names; "" for that of data.train."""
    return name.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class Segment:
    """Response tokens [start, stop) of one trajectory, sampled in one engine call under one policy version."""

    start: int
    stop: int
    version: int
    routed_experts: ExpertIds | None = None
    """The call's own rows [P+stop-1, L, K], kept by the routing policy ``exact``; None if they equal the first P+stop-1
    rows of the trajectory's array, as they always do for the last segment."""
    engine: str = ""
    temperature: float | None = None
    """Which of rollout.engines sampled them, and at which temperature; neither is in what an earlier release wrote."""

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One sequence of tokens that was sampled in a rollout.

    Response tokens between two segments were not sampled (an environment's text between two turns). Their version is
    NOT_SAMPLED and their behaviour log-prob NaN, so that any computation with it is noticed.

    Raises InvalidTrajectory, naming the trajectory, when a length, dtype, order or expert id is wrong.
    """

    trajectory_id: str
    prompt_ids: Int32Array
    """int32[P]."""
    response_ids: Int32Array
    """int32[G]."""
    logprobs: Float32Array
    """float32[G]: behaviour log-probs, of the distribution that was sampled from; written once."""
    versions: Int32Array
    """int32[G]: the policy version that sampled each token."""
    segments: tuple[Segment, ...]
    """In ascending order without overlap, the first from token 0, the last to token G."""
    finish_reason: FinishReason
    routed_experts: ExpertIds | None = None
    """uint8 or uint16 [P+G-1, L, K]; None for a dense model or an engine that returned none."""
    routing_spec: RoutingSpec | None = None
    """The layout of routed_experts; given exactly when these are."""
    origin: str = ""
    """Why an agent's rollout has it, one of ``rollout.branches.How``; "" where no agent asked."""
    tools: tuple[str, ...] = ()
    """Names of the tools that the agent named with its requests."""

    def __post_init__(self) -> None:
        name = f"trajectory {self.trajectory_id}"
        _check_array(name, "prompt_ids", self.prompt_ids, np.int32, 1)
        _check_array(name, "response_ids", self.response_ids, np.int32, 1)
        _check_array(name, "logprobs", self.logprobs, np.float32, 1)
        _check_array(name, "versions", self.versions, np.int32, 1)
        prompt, response = len(self.prompt_ids), len(self.response_ids)
        if prompt == 0 or response == 0:
            raise InvalidTrajectory(f"{name}: {prompt} prompt and {response} response tokens; both must be > 0")
        if len(self.logprobs) != response or len(self.versions) != response:
            others = f"{len(self.logprobs)} logprobs, {len(self.versions)} versions"
            raise InvalidTrajectory(f"{name}: {response} response tokens, {others}")
        sampled = self.sampled
        wrong = np.where(sampled, ~np.isfinite(self.logprobs), ~np.isnan(self.logprobs))
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise InvalidTrajectory(
                f"{name}: logprobs[{at}] is {self.logprobs[at]}; sampled tokens need a finite one, others NaN"
            )
        if self.finish_reason not in FINISH_REASONS:
            raise InvalidTrajectory(f"{name}: finish_reason is {self.finish_reason!r}, not one of {FINISH_REASONS}")
        if not self.segments or self.segments[0].start != 0 or self.segments[-1].stop != response:
            covered = [self.segments[0].start, self.segments[-1].stop] if self.segments else []
            raise InvalidTrajectory(f"{name}: segments cover {covered}, the response [0, {response}]")
        check_segments(name, self.segments, self.versions)
        if (self.routed_experts is None) != (self.routing_spec is None):
            raise InvalidTrajectory(f"{name}: routed_experts and routing_spec must be given together")
        if self.routed_experts is not None and self.routing_spec is not None:
            check_routing(name, self.routed_experts, rows=prompt + response - 1, spec=self.routing_spec)
        for segment in self.segments:
            if segment.routed_experts is not None:
                where = f"{name}: segment [{segment.start}, {segment.stop})"
                if self.routing_spec is None:
                    raise InvalidTrajectory(f"{where} has routed_experts, but the trajectory has none")
                check_routing(where, segment.routed_experts, rows=prompt + segment.stop - 1, spec=self.routing_spec)

    @property
    def num_tokens(self) -> int:
        """The number of prompt and response tokens, P + G."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def sampled(self) -> npt.NDArray[np.bool_]:
        """bool[G]: True for the response tokens that the engine sampled."""
        mask: npt.NDArray[np.bool_] = self.versions != NOT_SAMPLED
        return mask

    @property
    def resume_points(self) -> tuple[int, ...]:
        """Response positions at which a cut generation was resumed: where one segment stops and the next starts."""
        return tuple(after.start for before, after in itertools.pairwise(self.segments) if before.stop == after.start)

    @property
    def is_partial(self) -> bool:
        """Whether this is a partial rollout, which was interrupted and resumed."""
        return bool(self.resume_points)

    @property
    def oldest_version(self) -> int:
        """The oldest version that sampled a token of this trajectory."""
        return min(segment.version for segment in self.segments)


@dataclass(frozen=True, slots=True)
class RolloutRecord:
    """One attempt at a prompt: what it was worth, and what was sampled in it."""

    rollout_id: str
    """The id "<group_id>/<index>"."""
    reward: float
    trajectories: tuple[Trajectory, ...]
    """Several where an agent branched, each sampled token in one of them; none where it had not sampled any."""
    end: RolloutEnd = "done"
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    """What the reward was made of or came with, by name."""
    trainable: bool = True
    """Whether it is compared with others and trained: not so a judge's, or that of an opponent that stays as it is."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What else is known of it, by name; no part of the reward."""
    turns: tuple[tuple[int, ...], ...] = ()
    """For each turn in each trajectory, how many turns of the rollout ended before it; empty where no agent asked."""
    turn_rewards: Mapping[int, float] = field(default_factory=dict)
    """Rewards of single turns, by the numbers in ``turns``; 0 for the others."""

    def __post_init__(self) -> None:
        if not np.isfinite(self.reward):
            raise InvalidTrajectory(f"rollout {self.rollout_id}: reward is {self.reward}")
        numbers = [turn for turns in self.turns for turn in turns]
        sound = len(self.turns) in (0, len(self.trajectories)) and len(set(numbers)) == len(numbers)
        if not (sound and self.turn_rewards.keys() <= {*numbers} and np.isfinite([*self.turn_rewards.values()]).all()):
            found = f"turns {self.turns} and rewards of turns {dict(self.turn_rewards)}"
            raise InvalidTrajectory(f"rollout {self.rollout_id}: {found} for {len(self.trajectories)} trajectories")
        if self.end not in ROLLOUT_ENDS:
            raise InvalidTrajectory(f"rollout {self.rollout_id}: end is {self.end!r}, not one of {ROLLOUT_ENDS}")

    @classmethod
    def of(cls, trajectory: Trajectory, reward: float, parts: Mapping[str, float] | None = None) -> RolloutRecord:
        """Return the rollout that is this one trajectory; it has its id."""
        end: RolloutEnd = "truncated" if trajectory.finish_reason == "length" else "done"
        return cls(trajectory.trajectory_id, reward, (trajectory,), end, dict(parts or {}))


@dataclass(frozen=True, slots=True)
class Group:
    """The n finished rollouts of one prompt: the unit of the queue and of group-relative advantages."""

    group_id: str
    """The id "<prompt_id>.<attempt>"; each issue of a prompt has an attempt, and so a group id, of its own."""
    prompt: Prompt
    rollouts: tuple[RolloutRecord, ...]

    def __post_init__(self) -> None:
        if not any(rollout.trajectories for rollout in self.trainable):
            raise InvalidTrajectory(f"group {self.group_id}: no trajectories to train in {len(self.rollouts)} rollouts")
        for ids in [r.rollout_id for r in self.rollouts], [t.trajectory_id for t in self.trajectories]:
            if len(set(ids)) < len(ids):
                raise InvalidTrajectory(f"group {self.group_id}: an id is there twice in {', '.join(ids)}")

    @property
    def trainable(self) -> tuple[RolloutRecord, ...]:
        """The rollouts that are compared and trained."""
        return tuple(rollout for rollout in self.rollouts if rollout.trainable)

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """Those of all rollouts, in their order."""
        return tuple(trajectory for rollout in self.rollouts for trajectory in rollout.trajectories)

    @property
    def num_tokens(self) -> int:
        """The number of prompt and response tokens of all trajectories."""
        return sum(t.num_tokens for t in self.trajectories)

    @property
    def oldest_version(self) -> int:
        """The oldest version that sampled a token to be trained."""
        return min(t.oldest_version for rollout in self.trainable for t in rollout.trajectories)

    @property
    def rewards(self) -> Float32Array:
        """float32[n]: the rewards of the trainable rollouts."""
        return np.array([rollout.reward for rollout in self.trainable], dtype=np.float32)


def check_segments(name: str, segments: Sequence[Segment], versions: Int32Array) -> None:
    """Raise InvalidTrajectory unless the segments ascend and agree with the ``versions`` int32[G] of the tokens."""
    expected = np.full(len(versions), NOT_SAMPLED, dtype=np.int32)
    position = 0
    for segment in segments:
        where = f"{name}: segment [{segment.start}, {segment.stop})"
        if segment.start < position or segment.stop <= segment.start:
            raise InvalidTrajectory(f"{where} does not follow token {position}")
        if segment.stop > len(versions):
            raise InvalidTrajectory(f"{where} exceeds the response's {len(versions)} tokens")
        if segment.version < 0:
            raise InvalidTrajectory(f"{where} has version {segment.version}; versions start at 0")
        expected[segment.start : segment.stop] = segment.version
        position = segment.stop
    wrong = np.flatnonzero(versions != expected)
    if wrong.size:
        at = int(wrong[0])
        raise InvalidTrajectory(
            f"{name}: versions[{at}] is {versions[at]}, but its segment has {expected[at]} ({NOT_SAMPLED}: in none)"
        )


def check_routing(name: str, routed: ExpertIds, *, rows: int, spec: RoutingSpec) -> None:
    """Raise InvalidTrajectory unless ``routed`` is [rows, L, K] of the spec's dtype with every id below E."""
    expected = (rows, spec.num_moe_layers, spec.top_k)
    if routed.shape != expected:
        raise InvalidTrajectory(f"{name}: routed_experts has shape {routed.shape}, expected {expected}")
    if routed.dtype != spec.dtype:
        raise InvalidTrajectory(f"{name}: routed_experts is {routed.dtype}, expected {spec.dtype}")
    if routed.size and int(routed.max()) >= spec.num_experts:
        row, layer, slot = (int(i) for i in np.argwhere(routed >= spec.num_experts)[0])
        raise InvalidTrajectory(
            f"{name}: routed_experts[{row}, {layer}, {slot}] is {routed[row, layer, slot]}, "
            f"the model has {spec.num_experts} experts"
        )


def _check_array(name: str, what: str, array: npt.NDArray[Any], dtype: type, ndim: int) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != ndim:
        got = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise InvalidTrajectory(f"{name}: {what} must be a {ndim}-d {np.dtype(dtype)} array, got {got}")
