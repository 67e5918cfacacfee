"""The types of settings, and the section that every part of the tree is: strict, frozen, without unknown keys."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def whole(value: Any) -> Any:
    """Return the integer that YAML reads as a number with a fraction of zero: 1e6 is one to the user."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


Positive = Annotated[int, BeforeValidator(whole), Field(gt=0, lt=2**63)]
NonNegative = Annotated[int, BeforeValidator(whole), Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


def _possible(path: Path) -> Path:
    try:
        if b"\0" not in os.fsencode(path):
            return path
    except UnicodeEncodeError:
        pass
    raise ValueError("not a valid file path")


PathName = Annotated[Path, Field(strict=False), AfterValidator(_possible)]  # YAML has no paths, so strings are accepted


def _written_as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Refuse what would not be the same in the run folder's copy of the settings: dates, sets, bytes, NaN."""
    try:
        same = json.loads(json.dumps(values, allow_nan=False)) == values
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"values must be those of JSON: {error}") from None
    if not same:
        raise ValueError("values must be those of JSON: keys are text, and lists have no other type")
    return values


Arguments = Annotated[dict[str, Any], AfterValidator(_written_as_json)]
DataFiles = PathName | list[PathName]
RoutingPolicy = Literal["replace", "preserve", "exact"]
Dtype = Literal["float32", "bfloat16"]
FunctionName = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]


def _whole_characters(strings: list[str]) -> list[str]:
    if broken := next((string for string in strings if "\N{REPLACEMENT CHARACTER}" in string), None):
        raise ValueError(f"{broken!r} has U+FFFD, which stands for a part of a character; remove that from the string")
    return strings


StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(max_length=16), AfterValidator(_whole_characters)
]
PartName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,31}$")]


class Section(BaseModel):
    """A node of the tree: frozen, without unknown keys or infinities, and strict: "3" and true are not integers."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
