"""Calls rewards that were written for other trainers, by their conventions. Pure.

verl: ``compute_score(data_source, solution_str, ground_truth, extra_info=None)`` of one response, which returns a
number or a dict with a ``score``; see https://verl.readthedocs.io, "Implement Reward Function for Dataset".

TRL: ``f(prompts, completions, completion_ids, **columns)`` of all responses of a group, which returns a list with a
number or None for each; see https://huggingface.co/docs/trl, "GRPO Trainer", "Using a custom reward function".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from async_rl.errors import RewardError
from async_rl.rollout.rewards.score import FinishedResponse, Score, score_of, shown_columns
from async_rl.types import Prompt

_VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
_TRL = ("prompts", "completions", "completion_ids")


def verl(function: Callable[..., Any], given: Mapping[str, Any]) -> Callable[[Prompt, FinishedResponse], Any]:
    """Return ``function`` as one of a prompt and a response; ``given`` are further arguments by name.

    The row needs ``data_source``, and ``reward_model.ground_truth`` or ``ground_truth``; ``extra_info`` is passed as it
    is, or as {}. Raises TypeError when the function cannot be called so.
    """
    taken, _ = _names(function)
    accepted = [name for name in _VERL if name not in given and (taken is None or name in taken)]
    _check("compute_score", function, (*accepted, *given))

    def call(prompt: Prompt, response: FinishedResponse) -> Any:
        values: dict[str, Callable[[], Any]] = {
            "data_source": lambda: _field(prompt, "data_source"),
            "solution_str": lambda: response.text,
            "ground_truth": lambda: _ground_truth(prompt),
            "extra_info": lambda: dict(prompt.fields.get("extra_info") or {}),
        }
        return function(**{name: values[name]() for name in accepted}, **given)

    return call


def trl(function: Callable[..., Any], given: Mapping[str, Any]) -> Callable[[Prompt, Sequence[FinishedResponse]], Any]:
    """Return ``function`` as one of a prompt and all its responses; ``given`` are further arguments by name.

    Where the row's ``prompt`` is a list of messages, prompts and completions are such lists too. Columns are lists with
    the row's value for each response. Raises TypeError when the function cannot be called so.
    """
    taken, required = _names(function)
    accepted = [name for name in _TRL if name not in given and (taken is None or name in taken)]
    columns = required - {*_TRL, *given}

    def call(prompt: Prompt, responses: Sequence[FinishedResponse]) -> Any:
        if missing := sorted(columns - prompt.fields.keys()):
            raise RewardError(f"the dataset row needs a field {missing[0]!r} for this reward; {shown_columns(prompt)}")
        messages = prompt.fields.get("prompt")
        chat = isinstance(messages, Sequence) and not isinstance(messages, str)
        texts = [response.text for response in responses]
        values: dict[str, list[Any]] = {
            "prompts": [messages if chat else prompt.text for _ in responses],
            "completions": [[{"role": "assistant", "content": text}] for text in texts] if chat else list(texts),
            "completion_ids": [[] if r.completion_ids is None else r.completion_ids.tolist() for r in responses],
        }
        named = {
            name: [value for _ in responses]
            for name, value in prompt.fields.items()
            if name not in (*_TRL, "prompt", "completion", *given) and (taken is None or name in taken)
        }
        return function(**{name: values[name] for name in accepted}, **named, **given)

    _check("f", function, (*accepted, *columns, *given))
    return call


def scores_of(value: Any) -> list[Score | None]:
    """Return what a reward of a whole group returned as one score for each response. Raises ValueError as ``score_of``.

    A list or tuple, or an array of NumPy or torch with one axis.
    """
    items = value.tolist() if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist") else value
    if not isinstance(items, list | tuple):
        raise ValueError(
            f"returned {value!r:.200} of type {type(value).__name__}; expected a list with a number or None for each "
            "response of the group"
        )
    return [score_of(item) for item in items]


def _names(function: Callable[..., Any]) -> tuple[frozenset[str] | None, frozenset[str]]:
    """Return the names that a function takes, or None if it takes any, and those that it needs."""
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    single = [parameter for parameter in parameters if parameter.kind not in kinds]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    taken = None if takes_any else frozenset(parameter.name for parameter in single)
    return taken, frozenset(parameter.name for parameter in single if parameter.default is parameter.empty)


def _check(name: str, function: Callable[..., Any], arguments: Sequence[str]) -> None:
    """Raise TypeError unless the function can be called with these arguments by name."""
    try:
        inspect.signature(function).bind(**dict.fromkeys(arguments))
    except TypeError as error:
        raise TypeError(f"{name}({', '.join(f'{each}=...' for each in arguments)}): {error}") from None


def _field(prompt: Prompt, name: str) -> Any:
    if name not in prompt.fields:
        raise RewardError(f"the dataset row needs a field {name!r} for this reward; {shown_columns(prompt)}")
    return prompt.fields[name]


def _ground_truth(prompt: Prompt) -> Any:
    model = prompt.fields.get("reward_model")
    if isinstance(model, Mapping) and "ground_truth" in model:
        return model["ground_truth"]
    if "ground_truth" in prompt.fields:
        return prompt.fields["ground_truth"]
    raise RewardError(
        f"the dataset row needs reward_model.ground_truth, or ground_truth, for this reward; {shown_columns(prompt)}"
    )
