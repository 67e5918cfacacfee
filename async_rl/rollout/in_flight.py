"""Groups in flight, and the message in which they travel to the worker that adopts them.

Encoded for a checkpoint, and after an engine died. Pure: it knows ``partial``, ``types`` and the wire format, but
neither Ray nor an engine. Invariant 3 holds across it: tokens, log-probs and versions do not change. Routed experts,
most of the bytes, travel unless the next call returns all of them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from async_rl.config.fields import RoutingPolicy
from async_rl.config.inputs import Terms
from async_rl.errors import InvalidTrajectory, WireError
from async_rl.queue import codec
from async_rl.queue.codec import (
    build_prompt,
    build_segments,
    check_parts,
    prompt_table,
    response_arrays,
    routing_entry,
    routing_spec,
    segment_entries,
)
from async_rl.queue.records import Ticket
from async_rl.queue.wire import Array, Buffer, Kind, get, pack, short, unpack
from async_rl.rollout.parked import Parked, Rules
from async_rl.rollout.parked import decode as decode_parked
from async_rl.rollout.parked import encode as encode_parked
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.rewards.score import Score
from async_rl.types import Group, Prompt, RolloutRecord

SCHEMA_VERSION = 3
IN_FLIGHT = Kind(b"ARLF", SCHEMA_VERSION, "group in flight", earlier=(1, 2))


@dataclass(slots=True)
class InFlight:
    """One group that is being sampled."""

    ticket: Ticket
    partials: list[PartialRollout | None]
    """The partial rollout of each of its n responses; None before the first engine call."""
    scores: list[Score | None] = field(default_factory=list)
    """The reward of each response with its parts; None until it is scored."""
    made: dict[int, RolloutRecord] = field(default_factory=dict)
    """Rollouts of an agent that have ended, by index."""
    parked: dict[int, Parked] = field(default_factory=dict)
    """Those that have not and can be continued, as they are now; the worker that adopts the group begins the others
    again."""
    adopted: bool = False
    """Whether another worker, or an earlier run, has begun it."""
    left_out: int = 0
    """Responses that failed, and without which the group is published; the worker that adopts the group tries again."""

    @classmethod
    def begin(cls, ticket: Ticket, n: int) -> InFlight:
        """Begin the group of a ticket, with no token yet."""
        return cls(ticket, [None] * n, [None] * n)

    def copy(self) -> InFlight:
        """Return the group as it is now; what it is made of never changes."""
        return InFlight(self.ticket, list(self.partials), list(self.scores), dict(self.made), dict(self.parked))

    @property
    def group_id(self) -> str:
        return self.ticket.group_id

    def trajectory_id(self, index: int) -> str:
        """Return the id of the response at ``index``."""
        return f"{self.ticket.group_id}/{index}"

    def rollout(self, index: int) -> RolloutRecord:
        """Return the response at ``index``, which is complete and has a score, validated. Raises InvalidTrajectory."""
        partial, score = self.partials[index], self.scores[index]
        assert partial is not None
        assert score is not None
        return RolloutRecord.of(partial.to_trajectory(), score.reward, score.parts)

    @property
    def num_tokens(self) -> int:
        """Response tokens so far, over all responses."""
        made = sum(len(t.response_ids) for rollout in self.made.values() for t in rollout.trajectories)
        made += sum(parked.num_tokens for parked in self.parked.values())
        return made + sum(len(partial.response_ids) for partial in self.partials if partial is not None)


def encode(group: InFlight) -> npt.NDArray[np.uint8]:
    """Return the group as one message of the wire format. Raises WireError as ``wire.pack`` does."""
    name = f"group {group.group_id} in flight"
    prompt = group.ticket.prompt
    parts = [{} if score is None else dict(score.parts) for score in group.scores]
    raw = [None if score is None else score.raw for score in group.scores]
    table = {
        "group_id": group.group_id,
        "version": group.ticket.version,
        **prompt_table(name, prompt),
        "partials": [_entry(partial) for partial in group.partials],
        "rewards": [None if score is None else score.reward for score in group.scores],
        **({"reward_parts": parts} if any(parts) else {}),
        **({"raw_rewards": raw} if any(each is not None for each in raw) else {}),
        **({"made": list(group.made)} if group.made else {}),
        **({"parked": list(group.parked)} if group.parked else {}),
    }
    return pack(IN_FLIGHT, name, table, dict(_arrays(group)))


def decode(
    buffer: Buffer,
    *,
    n: int,
    terms: Callable[[Prompt], Terms],
    stop_token_ids: frozenset[int],
    routing_policy: RoutingPolicy,
) -> InFlight:
    """Return the group of a message, to be resumed under these settings. Its arrays are copies.

    terms: returns those of a prompt. stop_token_ids: the tokens that end every response.

    Raises WireError for anything but such a message, and for a group that does not fit the settings: with other than
    ``n`` responses, with one longer than its limit, or kept under another ``routing_policy``.
    """
    _, table, views = unpack(IN_FLIGHT, buffer)

    def take(name: str) -> Array:
        if name not in views:
            raise WireError(f"the message has no array {name}")
        return views.pop(name).copy()

    prompt = build_prompt(table, take("prompt"))
    own = _terms_now(prompt, terms)
    ticket = Ticket(get(table, "group_id", str), prompt, get(table, "version", int))
    entries = get(table, "partials", list)
    scores = _scores(ticket.group_id, get(table, "rewards", list), table.get("reward_parts"), table.get("raw_rewards"))
    if len(entries) != n or len(scores) != n:
        raise WireError(f"group {ticket.group_id}: {len(entries)} responses in flight, and rollout.n is {n}")
    partials: list[PartialRollout | None] = []
    for t, entry in enumerate(entries):
        if entry is None:
            partials.append(None)
            continue
        if not isinstance(entry, dict) or entry.get("policy") != routing_policy:
            raise WireError(
                f"group {ticket.group_id}: response {t} is {short(entry)}, not one kept under {routing_policy}"
            )
        if entry.get("finish_reason") not in (None, "stop", "length"):
            raise WireError(f"group {ticket.group_id}: response {t} ended by {short(entry['finish_reason'])}")
        partial = PartialRollout(
            trajectory_id=get(entry, "trajectory_id", str),
            prompt_ids=prompt.token_ids,
            max_response_tokens=own.max_response_tokens,
            stop_token_ids=stop_token_ids.union(own.stop_token_ids),
            routing_spec=routing_spec(entry.get("routing")),
            routing_policy=routing_policy,
            response_ids=take(f"{t}.response_ids"),
            logprobs=take(f"{t}.logprobs"),
            versions=take(f"{t}.versions"),
            segments=build_segments(t, entry, take, views),
            routed_experts=take(f"{t}.routed_experts") if f"{t}.routed_experts" in views else None,
            finish_reason=entry.get("finish_reason"),
        )
        try:
            partial.check()
        except InvalidTrajectory as error:
            raise WireError(f"group {ticket.group_id}: {error}") from None
        partials.append(partial)
    for score, each in zip(scores, partials, strict=True):
        if score is not None and (each is None or not each.finished):
            raise WireError(f"group {ticket.group_id}: a response that has not ended has a reward")
    made = _made(ticket, table["made"], take("made"), n) if "made" in table else {}
    rules = Rules(own.max_response_tokens, stop_token_ids.union(own.stop_token_ids), routing_policy)
    waiting = _indices(ticket, table.get("parked", []), n, "parked rollouts")
    parked = {
        index: decode_parked(f"{ticket.group_id}/{index}", take(f"parked.{index}"), rules)
        for index in waiting
        if index not in made
    }
    if views:
        raise WireError(f"unexpected arrays in message: {', '.join(list(views)[:3])}")
    return InFlight(ticket, partials, scores, made, parked, adopted=True)


def _made(ticket: Ticket, indices: Any, group: Array, n: int) -> dict[int, RolloutRecord]:
    """Return the rollouts that had ended, by index, from a message of a group of them. Raises WireError."""
    rollouts = codec.decode(group).rollouts
    if len(found := _indices(ticket, indices, n, "rollouts")) != len(rollouts):
        raise WireError(f"group {ticket.group_id}: {len(rollouts)} rollouts are those of {short(indices)}")
    return dict(zip(found, rollouts, strict=True))


def _indices(ticket: Ticket, indices: Any, n: int, what: str) -> list[int]:
    """Return the indices of rollouts that a message has. Raises WireError."""
    if not isinstance(indices, list) or len(indices) != len(set(map(repr, indices))):
        raise WireError(f"group {ticket.group_id}: its {what} are those of {short(indices)}")
    if not all(type(index) is int and 0 <= index < n for index in indices):
        raise WireError(f"group {ticket.group_id}: its {what} are those of {short(indices)}, and rollout.n is {n}")
    return indices


def _terms_now(prompt: Prompt, terms: Callable[[Prompt], Terms]) -> Terms:
    try:
        return terms(prompt)
    except ValueError as error:  # the settings of now read another field of the row
        raise WireError(f"prompt {prompt.prompt_id}: {short(str(error))}") from None


def _scores(group_id: str, rewards: list[Any], parts: Any, raw: Any) -> list[Score | None]:
    """Return the scores of a message; it may lack parts and unshaped rewards. Raises WireError."""
    parts = [{} for _ in rewards] if parts is None else parts
    raw = [None for _ in rewards] if raw is None else raw
    for each in (rewards, raw):
        if not isinstance(each, list) or any(value is not None and type(value) is not float for value in each):
            raise WireError(f"group {group_id}: its rewards are {short(each)}")
    if len(raw) != len(rewards):
        raise WireError(f"group {group_id}: it has {len(rewards)} rewards, and {len(raw)} before their shaping")
    if not isinstance(parts, list) or len(parts) != len(rewards):
        raise WireError(f"group {group_id}: the parts of its rewards are {short(parts)}")
    return [
        None if reward is None else Score(reward, check_parts(f"group {group_id}", each), unshaped)
        for reward, each, unshaped in zip(rewards, parts, raw, strict=True)
    ]


def _entry(partial: PartialRollout | None) -> dict[str, Any] | None:
    if partial is None:
        return None
    return {
        "trajectory_id": partial.trajectory_id,
        "policy": partial.routing_policy,
        "finish_reason": partial.finish_reason,
        "routing": routing_entry(partial.routing_spec),
        **segment_entries(partial),
    }


def _arrays(group: InFlight) -> Iterator[tuple[str, Array]]:
    yield "prompt", group.ticket.prompt.token_ids
    if group.made:
        yield "made", codec.encode(Group(group.group_id, group.ticket.prompt, tuple(group.made.values())))
    for index, parked in group.parked.items():
        yield f"parked.{index}", encode_parked(group.trajectory_id(index), parked)
    for t, partial in enumerate(group.partials):
        if partial is not None:
            yield from response_arrays(t, partial.without_repeated_rows())
