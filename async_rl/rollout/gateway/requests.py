"""What a client asks of the gateway in the dialect of OpenAI, read from the JSON of its request. Pure.

How tokens are drawn belongs to the run: the trainer can only learn from a distribution that it can compute again. So
fields that would change it a little are ignored, and those that would change it unseen are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from async_rl.data.messages import Message, checked_history, checked_tools
from async_rl.errors import RowFault

IGNORED = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed"),
    "length_penalty",
)
"""Fields of sampling that have no effect, and are counted."""

MOST_STOPS = 16
"""Stop strings of one request; OpenAI takes 4."""


class BadRequest(ValueError):
    """A request asks for what the gateway does not do."""

    def __init__(self, field: str | None, why: str) -> None:
        super().__init__(why)
        self.field = field


@dataclass(frozen=True, slots=True)
class Form:
    """How an answer is to be given, and what limits it."""

    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    with_usage: bool
    """Whether a stream ends with the numbers of tokens."""
    logprobs: bool
    token_ids: bool
    """Whether the answer names the tokens that were sampled, as vLLM does with return_token_ids."""
    ignored: tuple[str, ...]
    """Fields of IGNORED that the request has."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request to /v1/chat/completions."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    form: Form


@dataclass(frozen=True, slots=True)
class TextRequest:
    """A request to /v1/completions."""

    prompt: str | list[int]
    special_tokens: bool
    """Whether the tokenizer adds those with which it begins a text."""
    form: Form


# Fields that change what is sampled, or ask for what is not recorded, each with the values that do neither.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    **dict.fromkeys(("bad_words", "allowed_token_ids", "stop_token_ids", "logits_processors", "prompt_embeds"), ([],)),
    **dict.fromkeys(
        ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structural_tag"), ()
    ),
}


def chat_request(body: Mapping[str, Any]) -> ChatRequest:
    """Read a request for a turn. Raises BadRequest."""
    form = _form(body, ("max_completion_tokens", "max_tokens"), logprobs=_boolean(body, "logprobs"))
    tools = _checked("tools", body.get("tools"), checked_tools)
    return ChatRequest(
        _checked("messages", body.get("messages"), checked_history),
        None if body.get("tool_choice") == "none" else tools,
        form,
    )


def text_request(body: Mapping[str, Any]) -> TextRequest:
    """Read a request to continue a text or tokens. Raises BadRequest."""
    logprobs = body.get("logprobs")
    if logprobs is not None and not (_is_count(logprobs) and logprobs <= 1):
        raise BadRequest(
            "logprobs",
            f"logprobs is {_shown(logprobs)}; only those of sampled tokens are recorded, so it may be 0 or 1",
        )
    form = _form(body, ("max_tokens",), logprobs=logprobs is not None)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    return TextRequest(text_or_tokens(prompt, "prompt"), _boolean(body, "add_special_tokens", default=True), form)


def text_or_tokens(value: Any, field: str) -> str | list[int]:
    """Return a text, or a list of token ids, that is not empty. Raises BadRequest."""
    if isinstance(value, str) and value:
        return value
    return tokens(value, field, "a text, or a list of token ids")


def tokens(value: Any, field: str, wanted: str = "a list of token ids") -> list[int]:
    """Return a list of token ids that is not empty. Raises BadRequest."""
    # Looked through three times, each of them fast: there may be a million.
    if isinstance(value, list) and set(map(type, value)) == {int} and min(value) >= 0 and max(value) < 2**31:
        return value
    raise BadRequest(field, f"{field} is {_shown(value)}; it must be {wanted}, and only one")


def json_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object of a request's body. Raises BadRequest."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRequest(None, f"the body is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise BadRequest(None, f"the body is {type(found).__name__}, not a JSON object")
    return found


def _form(body: Mapping[str, Any], limits: tuple[str, ...], *, logprobs: bool) -> Form:
    for field, harmless in _REFUSED.items():
        value = body.get(field)
        if value is not None and not any(value == each and type(value) is type(each) for each in harmless):
            raise BadRequest(field, f"{field} is {_shown(value)}, which the policy is not sampled with while it trains")
    options = body.get("stream_options") or {}
    if not isinstance(options, Mapping):
        raise BadRequest("stream_options", f"stream_options is {_shown(options)}, not an object")
    return Form(
        max_tokens=_limit(body, limits),
        stop=_stop(body.get("stop")),
        stream=_boolean(body, "stream"),
        with_usage=_boolean(options, "include_usage"),
        logprobs=logprobs,
        token_ids=_boolean(body, "return_token_ids"),
        ignored=tuple(field for field in IGNORED if body.get(field) is not None),
    )


def _limit(body: Mapping[str, Any], fields: tuple[str, ...]) -> int | None:
    for field in fields:
        value = body.get(field)
        if value is None:
            continue
        if not _is_count(value) or value < 1:
            raise BadRequest(field, f"{field} is {_shown(value)}; it must be an integer, at least 1")
        return int(value)
    return None


def _stop(value: Any) -> tuple[str, ...]:
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(each, str) and each for each in strings):
        raise BadRequest("stop", f"stop is {_shown(value)}; it must be a text or a list of texts, none of them empty")
    if len(strings) > MOST_STOPS:
        raise BadRequest("stop", f"stop has {len(strings)} texts; there may be {MOST_STOPS}")
    return tuple(strings)


def _boolean(body: Mapping[str, Any], field: str, *, default: bool = False) -> bool:
    value = body.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise BadRequest(field, f"{field} is {_shown(value)}; it must be true or false")
    return value


def _checked(field: str, value: Any, check: Callable[[Any, str], Any]) -> Any:
    try:
        return check(value, field)
    except RowFault as fault:
        raise BadRequest(field, str(fault)) from None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shown(value: Any) -> str:
    return repr(value)[:60]
