"""The reward of a judge: a language model behind an OpenAI-compatible URL, which is asked for a number.

Attempts, time and calls at a time are those of the reward section: ``reward.retries``, ``reward.timeout_s``,
``reward.rate_limit``. A server that says when to ask again (429 with Retry-After) is asked then.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary

import openai

from async_rl.errors import RewardError
from async_rl.types import Prompt

QUESTION = (
    "Judge the answer below to the task below.\n\n<task>\n{prompt}\n</task>\n\n<answer>\n{response}\n</answer>\n\n"
    "Say in a few sentences what is right and what is wrong. Then write, alone on the last line, a number from 0 "
    "(useless) to 10 (perfect)."
)

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")

# Judgements kept per process, the latest: the same response comes again when a group is sampled greedily or restored.
_KEPT = 10_000

# Within one attempt, for answers that say so: 408, 409, 429 and 5xx.
_REPEATS = 2

_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], openai.AsyncOpenAI]] = WeakKeyDictionary()
_judgements: OrderedDict[tuple[str, str, str], float] = OrderedDict()


async def judge(
    prompt: Prompt,
    response: str,
    *,
    url: str,
    model: str,
    question: str = QUESTION,
    highest: float = 10.0,
    key_variable: str = "OPENAI_API_KEY",
    max_tokens: int = 1024,
) -> float:
    """Return the number on the last line of the judge's answer over ``highest``, from 0 to 1. Set ``reward.arguments``.

    url: as OpenAI's clients take it, for example http://10.0.0.5:8000/v1. question: a text with {prompt}, {response}
    and names of the row's columns in braces. key_variable: the environment variable with the key, where one is needed.
    The judge is asked at temperature 0, and equal questions are asked once.

    Raises ValueError for an answer without such a number, and openai's errors for none; both are worth another attempt.
    Raises RewardError for a question with names that the row does not have, and for what the server does not accept.
    """
    try:
        text = question.format_map({**prompt.fields, "prompt": prompt.text, "response": response})
    except (KeyError, ValueError, IndexError) as error:
        what = f"the question {question!r:.100} cannot be filled in from row {prompt.row}"
        raise RewardError(f"{what}: {error!r}") from None
    asked = (url, model, text)
    if asked not in _judgements:
        _judgements[asked] = _number(await _answer(url, model, text, key_variable, max_tokens), highest)
        while len(_judgements) > _KEPT:
            _judgements.popitem(last=False)
    return _judgements[asked]


async def _answer(url: str, model: str, text: str, key_variable: str, max_tokens: int) -> str:
    client = _client(url, os.environ.get(key_variable) or "none")
    try:
        completion = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=max_tokens
        )
    except (openai.BadRequestError, openai.AuthenticationError, openai.NotFoundError) as error:
        raise RewardError(f"the judge {model} at {url} refused: {error!s:.300}") from None
    choices: Any = getattr(completion, "choices", None)
    return str(choices[0].message.content or "") if choices else ""


def _number(answer: str, highest: float) -> float:
    lines = answer.strip().splitlines()
    found = _NUMBER.findall(lines[-1]) if lines else []
    if not found or not 0 <= float(found[-1]) <= highest:
        what = f"a number from 0 to {highest:g} on the last line"
        raise ValueError(f"the judge answered {answer[-200:]!r}; expected {what}")
    return float(found[-1]) / highest


def _client(url: str, key: str) -> openai.AsyncOpenAI:
    """Return the client of this event loop: its connections belong to it."""
    clients = _clients.setdefault(asyncio.get_running_loop(), {})
    if (url, key) not in clients:
        clients[url, key] = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=_REPEATS)
    return clients[url, key]
