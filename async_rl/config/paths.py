"""The settings that are paths, found by walking the tree: a section that gains one needs nothing here.

A relative path means a file below the folder in which the command was given. Other processes of a run may work in other
folders, so what they get is absolute.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

HUB = "hf:"
"""How the name of a dataset of the Hugging Face Hub begins, which stands where a path may."""


def is_hub_name(path: Path) -> bool:
    """Return whether a setting names a dataset of the Hugging Face Hub instead of files."""
    return str(path).startswith(HUB)


SectionType = TypeVar("SectionType", bound=BaseModel)


def path_settings(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Yield (dotted key, path) for each setting that is a path and is not null."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from path_settings(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            for key, item in value.items():
                if isinstance(item, BaseModel):
                    yield from path_settings(item, f"{prefix}{name}.{key}.")
        else:
            values = value if isinstance(value, list | tuple) else (value,)
            paths = (item for item in values if isinstance(item, Path) and not is_hub_name(item))
            yield from ((f"{prefix}{name}", item) for item in paths)


def absolute(section: SectionType) -> SectionType:
    """Return the settings with every path absolute, relative ones below this process's working folder."""
    values = {name: getattr(section, name) for name in type(section).model_fields}
    changed = {name: new for name, value in values.items() if (new := _absolute(value)) != value}
    return section.model_copy(update=changed) if changed else section


def _absolute(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return absolute(value)
    if isinstance(value, dict):
        return {key: _absolute(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_absolute, value))
    return value.absolute() if isinstance(value, Path) and not is_hub_name(value) else value
