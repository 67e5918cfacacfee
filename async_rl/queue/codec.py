"""The wire format of a group: ``encode`` to one buffer, ``decode`` to views on it.

Owns the names of a group's table entries and arrays in a ``wire`` message. The table has ids, prompt text and fields,
rewards and routing specs. Knows ``types``, ``wire`` and ``errors``, not the queue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from async_rl.errors import InvalidTrajectory, WireError
from async_rl.queue.wire import (
    MAX_MESSAGE_BYTES,
    Array,
    Buffer,
    Kind,
    Message,
    check_json_like,
    get,
    pack,
    short,
    unpack,
)
from async_rl.types import (
    ExpertIds,
    Float32Array,
    Group,
    Int32Array,
    Prompt,
    RolloutRecord,
    RoutingSpec,
    Segment,
    Trajectory,
)

SCHEMA_VERSION = 2
GROUP = Kind(b"ARLG", SCHEMA_VERSION, "group", earlier=(1,))


def encode(group: Group, max_bytes: int = MAX_MESSAGE_BYTES) -> npt.NDArray[np.uint8]:
    """Return the message, uint8[N], made in one allocation with one copy of each array.

    Raises WireError when the message would exceed ``max_bytes`` or the prompt's fields are not JSON-like.
    """
    return pack(GROUP, f"group {group.group_id}", _table(group), dict(_arrays(group)), max_bytes)


def decode(buffer: Buffer, max_bytes: int = MAX_MESSAGE_BYTES) -> Group:
    """Return the validated group; its arrays are read-only views that keep ``buffer`` alive.

    Raises WireError for anything but a whole, intact message of this schema and at most ``max_bytes``.
    """
    return _build_group(unpack(GROUP, buffer, max_bytes))


def prompt_table(name: str, prompt: Prompt) -> dict[str, Any]:
    """Return the table entries of the prompt of ``name``. Raises WireError unless its fields are JSON-like."""
    try:
        check_json_like(dict(prompt.fields), "fields")
    except (TypeError, RecursionError) as error:
        raise WireError(f"{name}: the prompt of row {prompt.row} cannot be carried: {error}") from None
    return {"prompt_id": prompt.prompt_id, "row": prompt.row, "text": prompt.text, "fields": dict(prompt.fields)}


def build_prompt(table: dict[str, Any], token_ids: Array) -> Prompt:
    """Build the prompt from the entries that ``prompt_table`` returned. Raises WireError when one is invalid."""
    fields = get(table, "fields", dict)
    try:
        check_json_like(fields, "fields")
    except TypeError as error:
        raise WireError(f"the message's fields are not JSON: {error}") from None
    return Prompt(
        prompt_id=get(table, "prompt_id", str),
        row=get(table, "row", int),
        text=get(table, "text", str),
        token_ids=token_ids,
        fields=MappingProxyType(fields),
    )


def segment_entries(response: Response) -> dict[str, Any]:
    """Return the table entries with engine and temperature of each segment; none of what is not known."""
    engines = [segment.engine for segment in response.segments]
    temperatures = [segment.temperature for segment in response.segments]
    known = {"engines": any(engines), "temperatures": any(value is not None for value in temperatures)}
    return {key: values for key, values in (("engines", engines), ("temperatures", temperatures)) if known[key]}


def build_segments(
    t: int, entry: dict[str, Any], take: Callable[[str], Array], views: dict[str, Array]
) -> tuple[Segment, ...]:
    """Build the segments of trajectory ``t``, with the routed experts of those that have their own.

    ``entry`` is the trajectory's in the table, which may lack ``segment_entries``. Raises WireError when one of these
    or the array of segments is invalid.
    """
    rows = take(f"{t}.segments")
    if rows.ndim != 2 or rows.shape[1] != 3 or rows.dtype != np.int32:
        raise WireError(f"array {t}.segments is {rows.dtype}{list(rows.shape)}, expected int32[S, 3]")
    engines, temperatures = (
        _of_segments(t, entry, key, len(rows), absent) for key, absent in (("engines", ""), ("temperatures", None))
    )
    of_each = zip(rows.tolist(), engines, temperatures, strict=True)
    return tuple(
        Segment(start, stop, version, views.pop(f"{t}.segment_routing.{s}", None), engine, temperature)
        for s, ((start, stop, version), engine, temperature) in enumerate(of_each)
    )


def _of_segments(t: int, entry: dict[str, Any], key: str, count: int, absent: str | None) -> list[Any]:
    """Return what the table says of each of ``count`` segments: names, or temperatures where ``absent`` is None."""
    values = entry.get(key, [absent] * count)
    valid = _is_temperature if absent is None else _is_name
    if not isinstance(values, list) or len(values) != count or not all(map(valid, values)):
        what = "a temperature" if absent is None else "a name"
        raise WireError(f"the {key} of trajectory {t} are {short(values)}, not {what} for each of {count} segments")
    return values


def _is_name(value: object) -> bool:
    return type(value) is str


def _is_temperature(value: object) -> bool:
    return value is None or (type(value) is float and 0 < value < math.inf)


class Response(Protocol):
    """The part of a response that the wire carries, for finished trajectories and those in flight alike."""

    @property
    def response_ids(self) -> Int32Array: ...
    @property
    def logprobs(self) -> Float32Array: ...
    @property
    def versions(self) -> Int32Array: ...
    @property
    def segments(self) -> tuple[Segment, ...]: ...
    @property
    def routed_experts(self) -> ExpertIds | None: ...


def response_arrays(t: int, response: Response) -> Iterator[tuple[str, Array]]:
    """Yield (name on the wire, array) for response ``t``; ``build_segments`` reads those of its segments."""
    yield f"{t}.response_ids", response.response_ids
    yield f"{t}.logprobs", response.logprobs
    yield f"{t}.versions", response.versions
    rows = [(segment.start, segment.stop, segment.version) for segment in response.segments]
    yield f"{t}.segments", np.array(rows, dtype=np.int32).reshape(-1, 3)
    for s, segment in enumerate(response.segments):
        if segment.routed_experts is not None:
            yield f"{t}.segment_routing.{s}", segment.routed_experts
    if response.routed_experts is not None:
        yield f"{t}.routed_experts", response.routed_experts


def _arrays(group: Group) -> Iterator[tuple[str, Array]]:
    """Yield (name on the wire, array) for the whole group; ``_build_group`` reads the same names."""
    yield "prompt", group.prompt.token_ids
    for t, trajectory in enumerate(group.trajectories):
        yield f"{t}.prompt_ids", trajectory.prompt_ids
        yield from response_arrays(t, trajectory)


def _table(group: Group) -> dict[str, Any]:
    return {
        "group_id": group.group_id,
        **prompt_table(f"group {group.group_id}", group.prompt),
        "rollouts": [
            {
                "rollout_id": rollout.rollout_id,
                "reward": float(rollout.reward),
                "end": rollout.end,
                "trainable": rollout.trainable,
                # So many of the trajectories, which lie in the order of their rollouts.
                "trajectories": len(rollout.trajectories),
                **({"reward_parts": dict(rollout.reward_parts)} if rollout.reward_parts else {}),
                **({"metrics": dict(rollout.metrics)} if rollout.metrics else {}),
                **({"turns": rollout.turns} if rollout.turns else {}),
                **({"turn_rewards": sorted(rollout.turn_rewards.items())} if rollout.turn_rewards else {}),
            }
            for rollout in group.rollouts
        ],
        "trajectories": [
            {
                "trajectory_id": t.trajectory_id,
                "finish_reason": t.finish_reason,
                "routing": routing_entry(t.routing_spec),
                **segment_entries(t),
                **({"origin": t.origin} if t.origin else {}),
                **({"tools": list(t.tools)} if t.tools else {}),
            }
            for t in group.trajectories
        ],
    }


def _build_group(message: Message) -> Group:
    table, views = message.table, message.arrays

    def take(name: str) -> Array:
        if name not in views:
            raise WireError(f"the message has no array {name}")
        return views.pop(name)

    try:
        prompt = build_prompt(table, take("prompt"))
        entries = _maps(table, "trajectories", "trajectory")
        trajectories = [_build_trajectory(t, entry, take, views) for t, entry in enumerate(entries)]
        if message.schema == 1:  # a trajectory has the reward, and is a rollout of its own
            rollouts = [
                RolloutRecord.of(trajectory, get(entry, "reward", float), _parts(f"trajectory {t}", entry))
                for t, (trajectory, entry) in enumerate(zip(trajectories, entries, strict=True))
            ]
        else:
            rollouts = _build_rollouts(_maps(table, "rollouts", "rollout"), trajectories)
        group = Group(get(table, "group_id", str), prompt, tuple(rollouts))
    except InvalidTrajectory as error:
        raise WireError(f"the message is intact, but its contents are invalid: {str(error)[:500]}") from None
    if views:
        raise WireError(f"unexpected arrays in message: {', '.join(list(views)[:3])[:200]}")
    return group


def _maps(table: dict[str, Any], key: str, one: str) -> list[dict[str, Any]]:
    """Return the maps of a list in the table; ``one`` names one of them in errors."""
    entries = get(table, key, list)
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise WireError(f"the message's {one} {i} is {short(entry)}, not a map")
    return entries


def _build_trajectory(
    t: int, entry: dict[str, Any], take: Callable[[str], Array], views: dict[str, Array]
) -> Trajectory:
    return Trajectory(
        segments=build_segments(t, entry, take, views),
        trajectory_id=get(entry, "trajectory_id", str),
        prompt_ids=take(f"{t}.prompt_ids"),
        response_ids=take(f"{t}.response_ids"),
        logprobs=take(f"{t}.logprobs"),
        versions=take(f"{t}.versions"),
        finish_reason=get(entry, "finish_reason", str),  # type: ignore[arg-type]  # Trajectory checks it
        routed_experts=views.pop(f"{t}.routed_experts", None),
        routing_spec=routing_spec(entry.get("routing")),
        origin=get(entry, "origin", str) if "origin" in entry else "",
        tools=_tools(t, entry.get("tools", [])),
    )


def _tools(t: int, names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or any(type(name) is not str for name in names):
        raise WireError(f"the tools of trajectory {t} are {short(names)}, not names")
    return tuple(names)


def _build_rollouts(entries: list[dict[str, Any]], trajectories: list[Trajectory]) -> list[RolloutRecord]:
    rollouts, left = [], list(trajectories)
    for r, entry in enumerate(entries):
        count = get(entry, "trajectories", int)
        if not 0 <= count <= len(left):
            raise WireError(f"rollout {r} has {count} trajectories, and {len(left)} are left in the message")
        rollouts.append(
            RolloutRecord(
                rollout_id=get(entry, "rollout_id", str),
                reward=get(entry, "reward", float),
                trajectories=tuple(left[:count]),
                end=get(entry, "end", str),  # type: ignore[arg-type]  # RolloutRecord checks it
                reward_parts=_parts(f"rollout {r}", entry),
                trainable=get(entry, "trainable", bool),
                metrics=_numbers(f"rollout {r}: its metrics", entry.get("metrics", {})),
                turns=_turns(r, entry.get("turns", [])),
                turn_rewards=_turn_rewards(r, entry.get("turn_rewards", [])),
            )
        )
        left = left[count:]
    if left:
        raise WireError(f"{len(left)} of the message's {len(trajectories)} trajectories belong to no rollout")
    return rollouts


def _turns(r: int, found: Any) -> tuple[tuple[int, ...], ...]:
    lists = found if isinstance(found, list) else [found]
    if all(isinstance(turns, list) and all(type(turn) is int for turn in turns) for turns in lists):
        return tuple(map(tuple, lists))
    raise WireError(f"rollout {r}: its turns are {short(found)}, not a list of numbers for each trajectory")


def _turn_rewards(r: int, found: Any) -> dict[int, float]:
    pairs = found if isinstance(found, list) else [found]
    if all(isinstance(pair, list) and list(map(type, pair)) == [int, float] for pair in pairs):
        return dict(pairs)  # RolloutRecord checks them
    raise WireError(f"rollout {r}: its turn rewards are {short(found)}, not a list of [turn, reward]")


def _parts(name: str, entry: dict[str, Any]) -> dict[str, float]:
    return check_parts(name, entry.get("reward_parts", {}))


def check_parts(name: str, parts: Any) -> dict[str, float]:
    """Return the parts of a reward that came in a message. Raises WireError when they are not numbers by name."""
    return _numbers(f"{name}: the parts of its reward", parts)


def _numbers(what: str, found: Any) -> dict[str, float]:
    if isinstance(found, dict) and all(
        type(name) is str and type(number) is float and math.isfinite(number) for name, number in found.items()
    ):
        return found
    raise WireError(f"{what} are {short(found)}, not finite numbers by name")


def routing_entry(spec: RoutingSpec | None) -> list[int] | None:
    """Return the table entry of a routing spec, under the key ``routing`` of schema 1."""
    return None if spec is None else [spec.num_moe_layers, spec.top_k, spec.num_experts]


def routing_spec(value: Any) -> RoutingSpec | None:
    """Build a routing spec from the entry that ``routing_entry`` returned. Raises WireError when it is invalid."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 3 or not all(type(n) is int and n > 0 for n in value):
        raise WireError(f"routing is {short(value)}; expected [layers, top_k, experts]")
    return RoutingSpec(*value)
