"""What is written of a rollout to be read: its trajectories turn by turn, as text with versions.

A turn is a run of response tokens that the policy has sampled, or that came between two such: a tool's answer, a user's
message, an environment's text. Tokens become text here, the special ones too, because text is what the model never saw.
Pure; knows excerpts. ``observe.transcripts`` shows what this makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from async_rl.queue.records import BranchExcerpt, Excerpt
from async_rl.types import Int32Array

LEAST = 80
"""Characters that each piece of a rollout has at least, however many there are of them."""

_DECODED = 16
"""Tokens that become text for each character to be shown. Some tokens are parts of one; nearly all have several."""

Decode = Callable[[Any], str]
"""Token ids to text."""


def sample(excerpt: Excerpt, decode: Decode, most: int) -> dict[str, Any]:
    """Return one line of samples.jsonl, with at most ``most`` characters of prompt and response each.

    Where the rollout has ``branches``, they have together as many once more for prompts, and for what follows.
    """
    segments = excerpt.segments
    texts: list[dict[str, str]] = [{} for _ in segments]
    if not (len(segments) == 1 and segments[0][:2] == (0, len(excerpt.response_ids))):  # else it is the response
        share = most // len(segments)
        texts = [{"text": readable(excerpt.response_ids[start:stop], decode, share)} for start, stop, _ in segments]
    return {
        "trajectory": excerpt.trajectory_id,
        "prompt": shortened(excerpt.prompt, most),
        "response": readable(excerpt.response_ids, decode, most),
        "reward": excerpt.reward,
        **({"reward_parts": dict(excerpt.reward_parts)} if excerpt.reward_parts else {}),
        **({"metrics": dict(excerpt.metrics)} if excerpt.metrics else {}),
        "finish_reason": excerpt.finish_reason,
        "segments": [{"version": version, **text} for (_, _, version), text in zip(segments, texts, strict=True)],
        **(
            {
                "rollout": excerpt.rollout_id,
                "end": excerpt.end,
                "branches": branches(excerpt.branches, decode, most),
            }
            if excerpt.branches
            else {}
        ),
    }


def branches(found: Sequence[BranchExcerpt], decode: Decode, most: int) -> list[dict[str, Any]]:
    """Return the trajectories of a rollout as plain data; ``most`` as in ``sample``."""
    pieces = sum(len(segments) for branch in found for _, segments in _turns(branch))
    of_prompt, of_piece = max(LEAST, most // max(1, len(found))), max(LEAST, most // max(1, pieces))
    return [_branch(each, decode, of_prompt, of_piece) for each in found]


def _branch(branch: BranchExcerpt, decode: Decode, of_prompt: int, of_piece: int) -> dict[str, Any]:
    def said(start: int, stop: int, version: int | None) -> dict[str, Any]:
        text = readable(branch.response_ids[start:stop], decode, of_piece)
        return {**({} if version is None else {"version": version}), "tokens": stop - start, "text": text}

    return {
        "trajectory": branch.trajectory_id,
        **({"origin": branch.origin} if branch.origin else {}),
        **({"forks": branch.forks, "shared_tokens": branch.shared_tokens} if branch.forks is not None else {}),
        **({"tools": list(branch.tools)} if branch.tools else {}),
        "prompt": readable(branch.prompt_ids, decode, of_prompt),
        "prompt_tokens": branch.shared_tokens + len(branch.prompt_ids),
        "turns": [{"by": by, "segments": [said(*each) for each in segments]} for by, segments in _turns(branch)],
        "finish_reason": branch.finish_reason,
    }


def _turns(branch: BranchExcerpt) -> Iterator[tuple[str, list[tuple[int, int, int | None]]]]:
    """Yield whose each turn is, and (start, stop, policy version) of its segments.

    One of the policy has several where a weight sync has cut it.
    """
    at = 0
    said: list[tuple[int, int, int | None]] = []
    for start, stop, version in branch.segments:
        if start > at:
            yield "policy", said
            yield "context", [(at, start, None)]
            said = []
        said.append((start, stop, version))
        at = stop
    yield "policy", said


def readable(token_ids: Int32Array, decode: Decode, most: int) -> str:
    """Return tokens as text of about ``most`` characters, beginning and end of a longer one.

    Of many more tokens than that only those at both ends are decoded, which takes long.
    """
    if len(token_ids) <= _DECODED * most:
        return shortened(decode(token_ids), most)
    ends = [decode(token_ids[: _DECODED * most // 2]), decode(token_ids[-(_DECODED * most // 2) :])]
    return shortened(f" [... of {len(token_ids)} tokens ...] ".join(ends), most)


def shortened(text: str, most: int) -> str:
    """Return ``text``, or of a longer one ``most`` characters of its beginning and end, and how many are left out."""
    if len(text) <= most:
        return text
    head, tail = most - most // 2, most // 2
    return f"{text[:head]} [... {len(text) - most} characters ...] {text[len(text) - tail :]}"


def tokens(found: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many tokens of ``branches`` the policy has sampled, and how many came between its turns."""
    counts = {"sampled": 0, "context": 0}
    for branch in found:
        for turn in branch["turns"]:
            name = "sampled" if turn["by"] == "policy" else "context"
            counts[name] += sum(segment["tokens"] for segment in turn["segments"])
    return counts
