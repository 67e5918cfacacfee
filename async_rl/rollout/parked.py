"""A rollout with an environment between two calls, as a checkpoint or another worker gets it, and its message.

Session and progress are of one moment: each turn that has ended in the session is one of the progress, and a turn that
is being sampled comes after them. Pure: it knows the wire format; neither engine nor environment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from async_rl.config.fields import RoutingPolicy
from async_rl.data.messages import Message, checked_history, checked_tools
from async_rl.errors import InvalidTrajectory, RowFault, WireError
from async_rl.queue.codec import build_segments, response_arrays, routing_entry, routing_spec, segment_entries
from async_rl.queue.wire import Array, Buffer, Kind, check_json_like, get, pack, short, unpack
from async_rl.rollout.branches import How, SavedTurn
from async_rl.rollout.conversation import as_key, canonical
from async_rl.rollout.environments.progress import Exchange, Progress, Said
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.saved_session import SavedBranch, SavedSession
from async_rl.types import FINISH_REASONS, NOT_SAMPLED

PARKED = Kind(b"ARLP", 1, "parked rollout")

_STATES = {bytes: "bytes", str: "json"}


@dataclass(frozen=True, slots=True)
class Parked:
    """What a rollout continues from."""

    environment: str
    """The setting that names the class that it plays with, and the class."""
    session: SavedSession
    progress: Progress

    @property
    def num_tokens(self) -> int:
        """Response tokens so far."""
        return self.session.num_tokens

    def after(self, partial: PartialRollout) -> Parked:
        """Return the rollout after an engine call, which made ``partial`` of the turn under way."""
        return replace(self, session=self.session.with_partial(partial))


class Rules(NamedTuple):
    """What the present settings say of the responses of a prompt."""

    max_response_tokens: int
    stop_token_ids: frozenset[int]
    routing_policy: RoutingPolicy


def encode(rollout_id: str, parked: Parked) -> npt.NDArray[np.uint8]:
    """Return the rollout as one message of the wire format. Raises WireError as ``wire.pack`` does."""
    progress, session, name = parked.progress, parked.session, f"rollout {rollout_id}"
    table = {
        "environment": parked.environment,
        "first": None if progress.first is None else list(progress.first),
        "tools": list(progress.tools),
        "exchanges": [[*_said(each.said), list(each.answer), each.reward] for each in progress.exchanges],
        "said": None if progress.said is None else _said(progress.said),
        "metrics": dict(progress.metrics),
        "done": progress.done,
        "truncated": progress.truncated,
        "state": None if progress.state is None else _STATES[type(progress.state)],
        "session": [session.made, session.calls, session.truncated],
        "branches": [_entry(branch) for branch in session.branches],
    }
    try:
        check_json_like({key: table[key] for key in ("first", "tools", "exchanges", "said")}, "what was said", 128)
    except (TypeError, RecursionError) as error:
        raise WireError(f"{name} cannot be carried: {error}") from None
    return pack(PARKED, name, table, dict(_arrays(parked)))


def decode(rollout_id: str, buffer: Buffer, rules: Rules) -> Parked:
    """Return the rollout of a message, to be continued under these rules. Its arrays are copies.

    Raises WireError for anything but such a message, and for a rollout that does not fit the rules.
    """
    _, table, views = unpack(PARKED, buffer)
    try:
        progress = _build_progress(table, views)
        entries = get(table, "branches", list)
        branches = tuple(_build_branch(b, entry, views, progress, rules) for b, entry in enumerate(entries))
        counts = get(table, "session", list)
        if list(map(type, counts)) != [int, int, bool] or min(counts) < 0:
            raise WireError(f"its session is {short(counts)}")
        session = SavedSession(branches, *counts)
        _check(session, progress)
        if views:
            raise WireError(f"unexpected arrays in message: {', '.join(list(views)[:3])}")
        return Parked(get(table, "environment", str), session, progress)
    except (InvalidTrajectory, WireError, RowFault) as error:
        raise WireError(f"rollout {rollout_id}: {error}") from None


# -- progress --


def _said(said: Said) -> list[Any]:
    return [said.message, said.index, said.finish_reason]


def _build_said(entry: Any) -> Said:
    if not isinstance(entry, list) or len(entry) != 3 or type(entry[1]) is not int or entry[2] not in FINISH_REASONS:
        raise WireError(f"a turn is {short(entry)}")
    (message,) = _messages([entry[0]])
    if message["role"] != "assistant":
        raise WireError(f"a turn of the policy is {short(message)}")
    return Said(message, entry[1], entry[2])


def _messages(found: Any) -> list[Message]:
    if found == []:
        return []
    checked_history(found, "its messages")
    for message in found:
        if not isinstance(message.get("content"), str):
            raise WireError(f"a message is {short(message)}")
    messages: list[Message] = found
    return messages


def _build_progress(table: Mapping[str, Any], views: dict[str, Array]) -> Progress:
    exchanges = []
    for entry in get(table, "exchanges", list):
        if not isinstance(entry, list) or len(entry) != 5 or type(entry[4]) not in (float, type(None)):
            raise WireError(f"an exchange is {short(entry)}")
        exchanges.append(Exchange(_build_said(entry[:3]), tuple(_messages(entry[3])), entry[4]))
    metrics = get(table, "metrics", dict)
    if not all(type(key) is str and type(value) is float for key, value in metrics.items()):
        raise WireError(f"its metrics are {short(metrics)}")
    first, said, kind = table.get("first"), table.get("said"), table.get("state")
    state: bytes | str | None = None
    if kind is not None:
        if kind not in ("bytes", "json") or (found := views.pop("state", None)) is None or found.dtype != np.uint8:
            raise WireError(f"its state is {short(kind)}")
        state = found.tobytes()
        state = state if kind == "bytes" else _text(state)
    tools = get(table, "tools", list)
    checked_tools(tools, "its tools")
    return Progress(
        first=None if first is None else tuple(_messages(first)),
        tools=tuple(tools),
        exchanges=tuple(exchanges),
        metrics=metrics,
        done=get(table, "done", bool),
        truncated=get(table, "truncated", bool),
        state=state,
        said=None if said is None else _build_said(said),
    )


def _text(state: bytes) -> str:
    try:
        return state.decode("ascii")
    except UnicodeDecodeError:
        raise WireError("its state is no JSON") from None


# -- session --


def _entry(branch: SavedBranch) -> dict[str, Any]:
    partial = branch.partial
    return {
        "trajectory_id": partial.trajectory_id,
        "policy": partial.routing_policy,
        "finish_reason": partial.finish_reason,
        "routing": routing_entry(partial.routing_spec),
        **segment_entries(partial),
        "max_response_tokens": partial.max_response_tokens,
        "root_tokens": branch.root_tokens,
        "messages": len(branch.history),
        "turns": [_turn(turn) for turn in branch.turns],
        "open": None if branch.open is None else _turn(branch.open),
    }


def _turn(turn: SavedTurn) -> list[Any]:
    return [turn.how, turn.start, turn.stop, turn.messages, turn.index]


def _arrays(parked: Parked) -> Iterator[tuple[str, Array]]:
    if parked.progress.state is not None:
        state = parked.progress.state
        yield "state", np.frombuffer(state if isinstance(state, bytes) else state.encode("ascii"), np.uint8)
    for b, branch in enumerate(parked.session.branches):
        yield f"{b}.prompt_ids", branch.partial.prompt_ids
        yield from response_arrays(b, branch.partial.without_repeated_rows())


def _build_branch(b: int, entry: Any, views: dict[str, Array], progress: Progress, rules: Rules) -> SavedBranch:
    if not isinstance(entry, dict) or entry.get("policy") != rules.routing_policy:
        raise WireError(f"branch {b} is {short(entry)}, not one kept under {rules.routing_policy}")
    if entry.get("finish_reason") not in (None, *FINISH_REASONS):
        raise WireError(f"branch {b} ended by {short(entry['finish_reason'])}")
    take = _taker(views)
    prompt, root, limit = (
        take(f"{b}.prompt_ids"),
        get(entry, "root_tokens", int),
        get(entry, "max_response_tokens", int),
    )
    if prompt.dtype != np.int32 or prompt.ndim != 1 or not 0 < root <= len(prompt):
        raise WireError(f"branch {b} has {root} tokens of {prompt.dtype}{list(prompt.shape)} from its beginning")
    partial = PartialRollout(
        trajectory_id=get(entry, "trajectory_id", str),
        prompt_ids=prompt,
        max_response_tokens=min(limit, rules.max_response_tokens - (len(prompt) - root)),
        stop_token_ids=rules.stop_token_ids,
        routing_spec=routing_spec(entry.get("routing")),
        routing_policy=rules.routing_policy,
        response_ids=take(f"{b}.response_ids"),
        logprobs=take(f"{b}.logprobs"),
        versions=take(f"{b}.versions"),
        segments=build_segments(b, entry, take, views),
        routed_experts=take(f"{b}.routed_experts") if f"{b}.routed_experts" in views else None,
        finish_reason=entry.get("finish_reason"),
    )
    partial.check()
    said = progress.conversation if progress.first is not None else []
    count = get(entry, "messages", int)
    if not 0 <= count <= len(said):
        raise WireError(f"branch {b} has {count} of {len(said)} messages")
    tools = as_key(list(progress.tools)) if progress.tools else ""
    turns = tuple(_build_turn(turn, count) for turn in get(entry, "turns", list))
    open_turn = None if entry.get("open") is None else _build_turn(entry["open"], count)
    branch = SavedBranch(partial, tools, root, tuple(map(canonical, said[:count])), turns, open_turn)
    _check_branch(branch)
    return branch


def _taker(views: dict[str, Array]) -> Callable[[str], Array]:
    def take(name: str) -> Array:
        if name not in views:
            raise WireError(f"the message has no array {name}")
        return views.pop(name).copy()

    return take


def _build_turn(entry: Any, messages: int) -> SavedTurn:
    if (
        isinstance(entry, list)
        and len(entry) == 5
        and entry[0] in get_args(How)
        and all(type(entry[i]) is int for i in (1, 2, 4))
        and (entry[3] is None or (type(entry[3]) is int and 0 < entry[3] <= messages))
    ):
        return SavedTurn(*entry)
    raise WireError(f"a turn of a branch is {short(entry)}")


def _check_branch(branch: SavedBranch) -> None:
    """Raise WireError unless the sampled tokens of a branch are those of its turns (invariant 12)."""
    partial, before = branch.partial, len(branch.partial.prompt_ids)
    total = before + len(partial.response_ids)
    expected, position = np.zeros(len(partial.response_ids), dtype=np.bool_), before
    for turn in branch.turns:
        if not position <= turn.start < turn.stop <= total:
            raise WireError(f"{partial.trajectory_id}: a turn has the tokens [{turn.start}, {turn.stop}) of {total}")
        expected[turn.start - before : turn.stop - before] = True
        position = turn.stop
    if branch.open is not None:
        if not position <= branch.open.start <= total or branch.open.stop or branch.open.index != -1:
            raise WireError(f"{partial.trajectory_id}: the turn under way is {short(_turn(branch.open))} of {total}")
        expected[branch.open.start - before :] = True
    elif not branch.turns or position != total or not partial.finished:
        raise WireError(f"{partial.trajectory_id}: its turns end at token {position} of {total}")
    if (expected != (partial.versions != NOT_SAMPLED)).any():
        raise WireError(f"{partial.trajectory_id}: the tokens of its turns are not those that were sampled")


def _check(session: SavedSession, progress: Progress) -> None:
    """Raise WireError unless session and progress are of one moment."""
    indices = sorted(turn.index for branch in session.branches for turn in branch.turns)
    said = [each.said.index for each in progress.exchanges] + ([] if progress.said is None else [progress.said.index])
    if not indices == said == list(range(len(indices))):
        raise WireError(f"its session has the turns {short(indices)}, and its environment {short(said)}")
    names = [branch.partial.trajectory_id for branch in session.branches]
    if len(set(names)) < len(names) or session.made < len(names) or len(session.under_way) > (progress.said is None):
        raise WireError(f"its session has the branches {short(names)}")
