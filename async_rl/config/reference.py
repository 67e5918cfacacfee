"""docs/reference/settings.md, written from the tree: ``python -m async_rl.config.reference`` prints it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from async_rl.config.loading import default_of, is_section
from async_rl.config.schema import RunConfig

_HEAD = """\
# Settings

Written by `make generate` from `async_rl/config/`. `async-rl train --help` prints the same sentences.

A config file is YAML with one mapping per section. On the command line any setting can be overridden by its dotted key:
`async-rl train CONFIG --async_training.max_staleness 2`. `async-rl train CONFIG --dry-run` prints all settings as the
run would use them.
"""

_NAMES = {int: "integer", float: "number", bool: "`true` or `false`", str: "text", Path: "path", type(None): "`null`"}
_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
_INT64 = 2**63
"""The upper bound of all integers, which says nothing to a reader."""


def page() -> str:
    """Return the whole file: one table per section, with key, values, default and sentence of each setting."""
    return _HEAD + "".join(_section(prefix, section) for prefix, section in _sections("", RunConfig))


def _sections(prefix: str, section: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield (dotted prefix, section) of the tree: each section after the one that contains it."""
    yield prefix, section
    for name, info in section.model_fields.items():
        if is_section(info.annotation):
            yield from _sections(f"{prefix}{name}.", info.annotation)  # type: ignore[arg-type]  # is_section says so


def _section(prefix: str, section: type[BaseModel]) -> str:
    title = f"`{prefix.rstrip('.')}`" if prefix else "The run"
    lines = [
        f"| `{prefix}{name}` | {_cell(_values(info))} | {_default(prefix + name)} | {_cell(info.description or '')} |\n"
        for name, info in section.model_fields.items()
        if not is_section(info.annotation)
    ]
    head = "| setting | values | default | meaning |\n|---|---|---|---|\n" if lines else ""
    return f"\n## {title}\n\n{section.__doc__}\n" + (f"\n{head}{''.join(lines)}" if lines else "")


def _default(key: str) -> str:
    value = default_of(key)
    return value if value == "required" else f"`{value}`"


def _values(info: FieldInfo) -> str:
    return _described(info.annotation, info.metadata)


def _described(annotation: Any, metadata: list[Any]) -> str:
    """Return a type and its bounds in words, for example "integer > 0 or `null`"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _described(arguments[0], list(arguments[1:]))
    if origin in (Union, UnionType):
        return " or ".join(_described(argument, []) for argument in arguments)
    if origin is dict and is_section(arguments[1]):
        return "{name: " + _described(arguments[1], []) + "}"
    if is_section(annotation):
        fields = annotation.model_fields.items()
        return "{" + ", ".join(f"`{name}`: {_described(info.annotation, info.metadata)}" for name, info in fields) + "}"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is dict:
        return "names with values"
    if origin in (list, tuple):
        return f"list of {_described(arguments[0], [])}"
    patterns = _found("pattern", metadata)
    if annotation is str and any("vllm|" in pattern for pattern in patterns):
        return "`vllm`, `sglang` or `module:Class`"
    if annotation is str and any(r":\w" in pattern for pattern in patterns):
        return "`module:function`"
    bounds = [f"{sign} {bound}" for key, sign in _BOUNDS for bound in _found(key, metadata) if bound != _INT64]
    return " ".join([_NAMES[annotation], " and ".join(bounds)]).rstrip()


def _found(key: str, metadata: list[Any]) -> list[Any]:
    """Return the values of a constraint; pydantic keeps some within a field of the metadata, some as they are."""
    inner = [item for entry in metadata for item in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
    return [value for item in inner if (value := getattr(item, key, None)) is not None]


def _cell(text: str) -> str:
    """Return text for a table: on one line, without bars, which would end the cell, and without tags."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.stdout.write(page())
