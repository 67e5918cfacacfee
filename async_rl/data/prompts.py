"""From a row of a file to a prompt: where the formats of other systems keep what, and what makes a row a bad one.

Pure: it knows ``messages``, ``errors``, ``types`` and what the wire can carry. How text and messages become tokens is
passed in as an ``Encoder``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import ValidationError

from async_rl.config.inputs import RowSampling
from async_rl.data.messages import Message, checked_messages, checked_tools, with_system
from async_rl.errors import RowFault
from async_rl.queue.wire import check_json_like
from async_rl.types import Int32Array, Prompt

Format = Literal["plain", "messages", "verl", "trl"]

TOOLS = "tools"
"""Field of a row with the tools that its messages may use, instead of those of data.tools."""

TEMPLATE_KWARGS = "chat_template_kwargs"
"""Field of a row with variables of the chat template, over those of data.template_kwargs; TRL's name for it."""


class Encoder(Protocol):
    """Turns prompts into tokens."""

    def text(self, text: str) -> list[int]:
        """Return the tokens of a prompt that is text, as it stands."""

    def chat(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, variables: Mapping[str, Any]
    ) -> tuple[str, list[int]]:
        """Return the text and the tokens of messages, up to where the assistant's answer begins.

        Raises RowFault when the template refuses them, DatasetError when there is no template.
        """


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row."""

    line: int
    """Number of the row, from 1, counted over all files of the dataset."""
    text: str
    token_ids: Int32Array
    fields: Mapping[str, Any]
    """What the reward sees: the row without its prompt, unless that is messages."""

    def prompt(self, prompt_id: str) -> Prompt:
        """Return the row as a prompt under this id."""
        return Prompt(prompt_id=prompt_id, row=self.line, text=self.text, token_ids=self.token_ids, fields=self.fields)


@dataclass(frozen=True, slots=True)
class RowReader:
    """Makes prompts of rows, by the settings of ``data``."""

    encoder: Encoder
    prompt_field: str = "prompt"
    max_prompt_tokens: int = 2**31 - 1
    format: Format = "plain"
    system_prompt: str | None = None
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    order_by: str | None = None
    """A field that must be a number."""
    sampling_field: str | None = None
    """A field that, where a row has it, must be as ``RowSampling`` says."""
    max_response_tokens: int = 2**31 - 1
    """The most that it may ask for."""

    def read(self, line: int, row: Mapping[str, Any]) -> Row:
        """Return the row ``line`` as a prompt. Raises RowFault with the reason when it cannot be used."""
        name = self.prompt_field
        if name not in row:
            raise RowFault(f"no field {name!r} (data.prompt_field); it has {_short(row)}")
        if self.order_by is not None and as_number(row.get(self.order_by)) is None:
            raise RowFault(f"field {self.order_by!r} (data.order_by) is not a number")
        if self.sampling_field is not None and row.get(self.sampling_field) is not None:
            self._check_sampling(row[self.sampling_field])
        value = row[name]
        chat = isinstance(value, list) or self.format in ("messages", "verl")
        text, ids = self._chat(row, value) if chat else self._text(value)
        if self.format == "verl":
            _check_verl(row)
        if len(ids) == 0:
            raise RowFault(f"field {name!r} has no tokens")
        if len(ids) > self.max_prompt_tokens:
            raise RowFault(f"prompt of {len(ids)} tokens, more than data.max_prompt_tokens = {self.max_prompt_tokens}")
        fields = {key: item for key, item in row.items() if key != name or chat}
        try:
            check_json_like(fields, "the row")
        except TypeError as error:
            raise RowFault(str(error)) from None
        return Row(line, text, np.asarray(ids, dtype=np.int32), fields)

    def _check_sampling(self, value: Any) -> None:
        where = f"field {self.sampling_field!r} (data.sampling_field)"
        try:
            asked = RowSampling.model_validate(value).max_response_tokens
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise RowFault(f"{where}: {key + ': ' if key else ''}{first['msg']}") from None
        if asked is not None and asked > self.max_response_tokens:
            raise RowFault(
                f"{where} has max_response_tokens {asked}, above the {self.max_response_tokens} of its source"
            )

    def _text(self, value: Any) -> tuple[str, list[int]]:
        """Return the text and tokens of a prompt that is a string, already as the policy is to see it."""
        where = f"field {self.prompt_field!r}"
        text = _checked_text(value, where, "a string or a list of messages")
        for key, ignored in (("data.system_prompt", self.system_prompt), ("data.tools", self.tools)):
            if ignored is not None:
                raise RowFault(
                    f"{where} is text that no template is applied to, so that {key} would be ignored; set data.format "
                    f"to messages, or {key} to null"
                )
        return text, list(self.encoder.text(text))

    def _chat(self, row: Mapping[str, Any], value: Any) -> tuple[str, list[int]]:
        """Return the text and tokens of messages, or of a string that is one message of the user."""
        where = f"field {self.prompt_field!r}"
        if isinstance(value, str):
            value = [{"role": "user", "content": _checked_text(value, where, "messages")}]
        messages = with_system(checked_messages(value, where), self.system_prompt)
        return self.encoder.chat(messages, *template_inputs(row, self.tools, self.template_kwargs))


def template_inputs(
    row: Mapping[str, Any], tools: list[dict[str, Any]] | None, template_kwargs: Mapping[str, Any]
) -> tuple[list[dict[str, Any]] | None, dict[str, Any]]:
    """Return the tools and variables of a row's template; the arguments are those of the settings. Raises RowFault."""
    own = checked_tools(row.get(TOOLS), f"field {TOOLS!r}")
    variables = row.get(TEMPLATE_KWARGS) or {}
    if not isinstance(variables, Mapping):
        raise RowFault(f"field {TEMPLATE_KWARGS!r} is {type(variables).__name__}, not an object")
    given = {key: item for key, item in variables.items() if item is not None}
    return own or tools, {**template_kwargs, **given}


def as_number(value: Any) -> float | None:
    """Return a value of a row that is a number as one of floating point; None for anything else, and for NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value)


def _checked_text(value: Any, where: str, wanted: str) -> str:
    if not isinstance(value, str):
        raise RowFault(f"{where} is {type(value).__name__}, not {wanted}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowFault(f"{where} has half of a surrogate pair, which is not a character") from None
    if not value.strip():
        raise RowFault(f"{where} is empty")
    return value


def _check_verl(row: Mapping[str, Any]) -> None:
    """Raise RowFault unless the row has what verl's reward functions are called with."""
    if not isinstance(row.get("data_source"), str):
        raise RowFault("no text in field 'data_source', which data.format verl needs")
    model = row.get("reward_model")
    if not isinstance(model, Mapping) or model.get("ground_truth") is None:
        raise RowFault("no 'ground_truth' in field 'reward_model', which data.format verl needs")


def _short(fields: Mapping[str, Any]) -> str:
    """Return the names of the fields, as far as they fit into a message."""
    return ascii(list(fields))[1:-1][:100] or "no fields"
