"""Calls a reward with what its signature names: parts of the response, the prompt, and columns of the row. Pure.

A function that takes two positional arguments is called f(prompt, response), whatever it names them, unless their
names say that the response comes first or that another part of it is meant. All others are called by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from async_rl.errors import RewardError
from async_rl.rollout.rewards.score import FinishedResponse, shown_columns
from async_rl.types import Prompt

OF_THE_RESPONSE = ("response", "turns", "finish_reason", "completion_ids")
"""Names of which a reward needs one: without it, it would not see the response."""

NAMES = ("prompt", *OF_THE_RESPONSE, "fields")
"""What a reward may name. Any other name is a column of the row."""

_SHOWN = f"f(prompt, response), nor by name with columns and some of {', '.join(NAMES)}, the response among them"


@dataclass(frozen=True, slots=True)
class Signature:
    """How a reward is called."""

    by_name: bool
    """False for f(prompt, response)."""
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    """Names with a default value; they get a column, if the row has it."""
    first: str = "prompt"
    """What a reward that is not called by name calls its first argument."""

    @property
    def named(self) -> frozenset[str]:
        return frozenset((*self.required, *self.optional))

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Signature:
        """Return how ``function`` is called. Raises TypeError, saying how rewards are called, if it cannot be."""
        try:
            signature = inspect.signature(function)
        except ValueError:
            return cls(by_name=False)  # A builtin without a signature: the first call shows whether it fits.
        listed = list(signature.parameters.values())
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        single = [parameter for parameter in listed if parameter.kind not in kinds]
        required = tuple(p.name for p in single if p.default is p.empty)
        optional = tuple(p.name for p in single if p.default is not p.empty)
        if _takes_prompt_and_response(signature):
            pair, rest = single[:2], single[2:]
            extra = tuple(p.name for p in rest if p.kind is not p.POSITIONAL_ONLY)
            return cls(by_name=False, optional=extra, first=pair[0].name if pair else "prompt")
        if any(p.kind is p.POSITIONAL_ONLY for p in single) or not set(OF_THE_RESPONSE) & {p.name for p in single}:
            raise TypeError(f"{_SHOWN}; its signature is f{signature}")
        return cls(by_name=True, required=required, optional=optional)

    def arguments(
        self, prompt: Prompt, response: FinishedResponse, given: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and the named arguments of a call; ``given`` stand in place of what they name.

        Raises RewardError, naming the column and those of the row, when the row lacks a column.
        """
        named: dict[str, Any] = {}
        for name in (*self.required, *self.optional):
            if name in given:
                named[name] = given[name]
            elif name in NAMES:
                named[name] = _value(name, prompt, response)
            elif name in prompt.fields:
                named[name] = prompt.fields[name]
            elif name in self.required:
                raise RewardError(
                    f"its argument {name!r} is none of {', '.join(NAMES)}, so that the dataset row needs a field of "
                    f"this name, or reward.arguments a value; {shown_columns(prompt)}"
                )
        if self.by_name:
            return (), named
        if self.first != "prompt" and self.first in prompt.fields:
            raise RewardError(
                f"its first argument {self.first!r} is called as a field of dataset row {prompt.row}, but would get "
                "the Prompt; call it prompt, or write f(*, ...) to have all arguments by their names"
            )
        return (prompt, response.text), named


def _takes_prompt_and_response(signature: inspect.Signature) -> bool:
    """Return whether a function is called f(prompt, response): its own names say nothing else."""
    try:
        bound = signature.bind("prompt", "response").arguments
    except TypeError:
        return False
    first, second = (*bound, "", "")[:2]
    return first not in (*OF_THE_RESPONSE, "fields") and second not in ("prompt", *OF_THE_RESPONSE[1:], "fields")


def _value(name: str, prompt: Prompt, response: FinishedResponse) -> Any:
    if name == "prompt":
        return prompt
    if name == "fields":
        return prompt.fields
    if name == "response":
        return response.text
    return getattr(response, name)
