"""``async-rl data``: what a run would read, as a user wants to see it before the first step.

Reads every row once and keeps none. Knows ``reading`` and the settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from async_rl.config.functions import load_function
from async_rl.config.schema import RunConfig
from async_rl.data import reading
from async_rl.data.chat import CheckpointEncoder
from async_rl.data.dataset import BadRow, check_columns, read_row
from async_rl.data.files import Files
from async_rl.data.prompts import Row
from async_rl.errors import ConfigError

SHOWN_ROWS = 3
_BINS = 10
_BAR = 40  # characters of the longest bar
_PIECE = 24  # characters of one token's text


@dataclass(slots=True)
class _Seen:
    """What was found in the rows of one dataset."""

    shown: list[Row] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    reasons: dict[str, list[Any]] = field(default_factory=dict)
    """{reason without its numbers: [count, the first such row]}."""


def preview(config: RunConfig) -> tuple[str, bool]:
    """Return a page on the datasets of a run, and whether the run would take them.

    First runs ``prepare``, as the run does. Raises DatasetError and ModelError for what cannot be read at all.
    """
    if config.prepare is not None:
        load_function("prepare", config.prepare, ("config",), ConfigError)(config)
    encoder = reading.encoder(config)
    pages, usable, rows = [], True, {}
    for key in reading.keys(config):
        if not reading.paths_of(config, key):
            pages.append(f"{key}: none\n")
            continue
        files = reading.files(config, key)
        seen = _look(config, key, files, encoder)
        pages.append("".join(f"{line}\n" for line in _page(key, files, seen, encoder)))
        rows[key] = len(seen.lengths)
        usable = usable and bool(seen.lengths) and not (seen.reasons and config.data.on_bad_row == "fail")
    if config.data.sources:
        pages.insert(0, "".join(f"{line}\n" for line in _shares(config, rows)))
    return "\n".join(pages), usable


def _shares(config: RunConfig, rows: Mapping[str, int]) -> Iterator[str]:
    """Yield each source's share of the prompts, and after how many prompts of the run its rows come again."""
    total = sum(source.weight for source in config.data.sources.values())
    yield "data.sources     share  usable rows   epoch, in prompts of all sources"
    for name, key in reading.train_keys(config).items():
        share = config.data.sources[name].weight / total
        agent = config.terms(name).agent
        played = "" if agent is None else f"   played by {agent}"
        yield f"  {name:<12} {share:>6.1%}  {rows[key]:>11}  {round(rows[key] / share):>9}{played}"


def _look(config: RunConfig, key: str, files: Files, encoder: CheckpointEncoder) -> _Seen:
    seen, reader = _Seen(), reading.row_reader(config, key, encoder)
    check_columns(files, reader)
    for line in range(1, files.count + 1):
        row = read_row(files, line, reader)
        if isinstance(row, BadRow):
            kind = re.sub(r"\d+", "N", row.reason)
            seen.reasons.setdefault(kind, [0, row])[0] += 1
            continue
        seen.lengths.append(len(row.token_ids))
        if len(seen.shown) < SHOWN_ROWS:
            seen.shown.append(row)
    return seen


def _page(key: str, files: Files, seen: _Seen, encoder: CheckpointEncoder) -> Iterator[str]:
    bad = sum(count for count, _ in seen.reasons.values())
    yield f"{key}: {files.name}: {files.count} rows, {len(seen.lengths)} usable, {bad} bad"
    for row in seen.shown:
        yield f"\n{files.place(row.line)}, {len(row.token_ids)} tokens, fields {', '.join(row.fields) or 'none'}"
        yield from (f"  | {line}" for line in row.text.splitlines())
        yield "  " + " ".join(_pieces(encoder, row))
    if seen.lengths:
        yield "\nprompt tokens      rows"
        yield from _histogram(np.array(seen.lengths))
    if seen.reasons:
        yield "\nbad rows by reason"
        for count, first in sorted(seen.reasons.values(), key=lambda found: -found[0]):
            yield f"  {count:>7}  {first}"
    yield from _warnings(encoder)


def _pieces(encoder: CheckpointEncoder, row: Row) -> Iterator[str]:
    """Yield each token as number:text."""
    for token in row.token_ids.tolist():
        text = repr(encoder.tokenizer.decode([token]))
        yield f"{token}:{text if len(text) <= _PIECE else text[: _PIECE - 4] + '...' + text[-1]}"


def _histogram(lengths: np.ndarray[Any, Any]) -> Iterator[str]:
    """Yield one line per range of lengths, with the number of rows and a bar."""
    low, high = int(lengths.min()), int(lengths.max())
    edges = np.unique(np.linspace(low, high + 1, _BINS + 1).round().astype(np.int64))
    counts, _ = np.histogram(lengths, edges)
    for first, behind, count in zip(edges, edges[1:], counts, strict=False):
        # A bar of at least one character for what is there at all.
        bar = "#" * int(np.ceil(_BAR * count / counts.max()))
        span = f"{first}" if behind - first == 1 else f"{first} to {behind - 1}"
        yield f"  {span:>15}  {count:>7}  {bar}".rstrip()
    middle, most = np.percentile(lengths, [50, 95]).round().astype(int)
    yield f"  shortest {low}, median {middle}, 95 % at most {most}, longest {high}"


def _warnings(encoder: CheckpointEncoder) -> Iterator[str]:
    """Yield what the user should know of the chat template, if messages were rendered with it."""
    if encoder.prints_date:
        yield (
            "\nthe chat template writes today's date, so that prompts change overnight; fix it with a variable of the "
            "template, for example data.template_kwargs: {date_string: 26 Jul 2024}"
        )
