"""Shows rollouts that were written to be read, lines of samples.jsonl and of ``async-rl rollout``, as text or HTML.

Lines of earlier releases have no ``branches``, but one response. A run folder is not trusted: a line may be anything.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from async_rl.observe.drawing import text
from async_rl.observe.rows import as_number
from async_rl.runtime import runfolder

_SHOWN = 8

ORIGINS = {
    "first": "the first request",
    "root": "a new conversation, nothing of which was said before",
    "tools": "a conversation with other tools",
    "edited": "the agent has edited what was said",
    "parallel": "the agent has asked twice at one time",
    "cut": "the turn before has no stop token",
    "stop_mismatch": "the turn before ended by another token than the template writes",
}
"""Why a trajectory is there, in words."""

STYLE = """
.rollout h4{margin:14px 0 4px;font-weight:600}.rollout p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;
font:12.5px/1.5 ui-monospace,monospace;padding:4px 10px;border-left:3px solid var(--line)}
.rollout .policy{border-color:var(--c1)}.rollout small{display:block;color:var(--soft);margin:6px 0 0}
"""


@dataclass(slots=True)
class _Part:
    """What one side has said."""

    by: Literal["prompt", "policy", "context"]
    note: str
    text: str


@dataclass(slots=True)
class _Branch:
    """One trajectory."""

    heading: str
    parts: list[_Part] = field(default_factory=list)


def as_text(line: Mapping[str, Any]) -> str:
    """Return a rollout as lines for a terminal."""
    lines = [headline(line)]
    for branch in _branches(line):
        lines.append(f"  {branch.heading}")
        for part in branch.parts:
            lines.append(f"    {part.by}{f' ({part.note})' if part.note else ''}")
            lines += (f"    | {_printable(each)}" for each in part.text.split("\n"))
    return "".join(f"{each}\n" for each in lines)


def headline(line: Mapping[str, Any]) -> str:
    """Return one sentence on a rollout: its reward, how it ended, its tokens and time, as far as the line says it."""
    reward, parts, metrics = as_number(line.get("reward")), _named(line, "reward_parts"), _named(line, "metrics")
    branches = line.get("branches")
    tokens, seconds = line.get("tokens"), as_number(line.get("seconds"))
    said = [
        f"step {line['step']}" if "step" in line else "",
        f"row {line['row']}" if "row" in line else "",
        "" if reward is None else f"reward {_number(reward)}" + (f" ({parts})" if parts else ""),
        f"metrics {metrics}" if metrics else "",
        f"failed: {line['failed']}" if "failed" in line else str(line.get("end", line.get("finish_reason", ""))),
        f"{len(branches)} trajectories" if isinstance(branches, list) and len(branches) > 1 else "",
        ", ".join(f"{count} {name} tokens" for name, count in tokens.items()) if isinstance(tokens, Mapping) else "",
        "" if seconds is None else f"{seconds:.2f} s",
    ]
    return _printable(f"rollout {line.get('rollout', line.get('trajectory'))}: {', '.join(filter(None, said))}")


def _named(line: Mapping[str, Any], key: str) -> str:
    found = line.get(key)
    return ", ".join(f"{name} {_number(value)}" for name, value in found.items()) if isinstance(found, Mapping) else ""


def in_html(run: Path) -> str:
    """Return the latest samples of a run folder, each to be opened by the reader."""
    shown = "".join(
        f"<details class=rollout><summary>{text(headline(line))}</summary>{_html(line)}</details>"
        for line in _latest(run)
    )
    return shown or '<p class="missing">There are no samples (metrics.samples_per_step).</p>'


def _html(line: Mapping[str, Any]) -> str:
    made = []
    for branch in _branches(line):
        made.append(f"<h4>{text(branch.heading)}</h4>")
        for part in branch.parts:
            note = f"{part.by}{f' ({part.note})' if part.note else ''}"
            made.append(f"<small>{text(note)}</small><p class={part.by}>{text(part.text)}</p>")
    return "".join(made)


def _latest(run: Path) -> list[dict[str, Any]]:
    """Return the last whole lines of samples.jsonl, and of its newest older part."""
    stem, _, ending = runfolder.SAMPLES.partition(".")
    lines: deque[str] = deque(maxlen=_SHOWN + 1)
    for path in [*sorted(run.glob(f"{stem}-*.{ending}"))[-1:], run / runfolder.SAMPLES]:
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace", newline="\n") as stream:
                lines.extend(stream)
    found = (_object(line) for line in lines)
    return [line for line in found if line is not None][-_SHOWN:]


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None  # it is being written
    return value if isinstance(value, dict) else None


def _branches(line: Mapping[str, Any]) -> Iterator[_Branch]:
    branches = line.get("branches")
    if not isinstance(branches, list):
        if "response" in line:
            yield _Branch("one response", [_Part("prompt", "", str(line.get("prompt"))), *_response(line)])
        return
    for number, branch in enumerate(each for each in branches if isinstance(each, Mapping)):
        made = _Branch(_heading(number, branch), [_Part("prompt", _prompt_note(branch), str(branch.get("prompt")))])
        for turn in _maps(branch, "turns"):
            made.parts += _turn(turn)
        made.parts[-1].note += f", {branch.get('finish_reason')}"
        yield made


def _heading(number: int, branch: Mapping[str, Any]) -> str:
    origin, tools = branch.get("origin"), branch.get("tools")
    why = ORIGINS.get(str(origin), str(origin)) if origin else ""
    fork = f"forks trajectory {branch['forks']}" if "forks" in branch else ""
    named = f"tools {', '.join(map(str, tools))}" if isinstance(tools, list) else ""
    said = "; ".join(filter(None, [": ".join(filter(None, [fork, why])), named]))
    return f"trajectory {number}" + (f": {said}" if said else "")


def _prompt_note(branch: Mapping[str, Any]) -> str:
    shared, tokens = branch.get("shared_tokens"), branch.get("prompt_tokens")
    return f"{tokens} tokens" + (f", of which the first {shared} are those of what it forks" if shared else "")


def _turn(turn: Mapping[str, Any]) -> Iterator[_Part]:
    """Yield the parts of a turn: more than one where a weight sync has cut it."""
    by: Literal["policy", "context"] = "policy" if turn.get("by") == "policy" else "context"
    segments = _maps(turn, "segments")
    before: Any = None
    for number, segment in enumerate(segments):
        version = segment.get("version")
        note = f"{segment.get('tokens')} tokens" + ("" if version is None else f", version {version}")
        if number:
            note += ", resumed after a cut" + ("" if version == before else " by a weight sync")
        yield _Part(by, note, str(segment.get("text")))
        before = version


def _response(line: Mapping[str, Any]) -> Iterator[_Part]:
    """Yield the parts of a line that has one response."""
    whole, segments = str(line["response"]), _maps(line, "segments")
    texts = [str(segment.get("text", "")) for segment in segments]
    if len(segments) > 1 and "".join(texts) == whole:
        marks: Sequence[str] = ["", *itertools.repeat(", resumed after a cut", len(segments) - 1)]
        for segment, said, mark in zip(segments, texts, marks, strict=True):
            yield _Part("policy", f"version {segment.get('version')}{mark}", said)
    else:  # of an earlier release, with an environment's turns between its segments, or shortened
        versions = ", ".join(dict.fromkeys(str(segment.get("version")) for segment in segments))
        yield _Part("policy", f"version {versions}" if versions else "", whole)


def _maps(value: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = value.get(key)
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _printable(line: str) -> str:
    """Return a line of the model's for a terminal, which it must not control."""
    return "".join(each if each.isprintable() or each == "\t" else repr(each)[1:-1] for each in line)
