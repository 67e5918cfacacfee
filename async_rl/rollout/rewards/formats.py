"""Rewards for the form of a response. What they look for is a column of the row, or set by ``reward.arguments``.

A pattern may backtrack for hours on a text that the policy finds, so they run in worker processes, which have a time
limit. jsonschema, which ``json_schema`` needs, comes with vLLM.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from async_rl.errors import RewardError
from async_rl.rollout.user_function import in_worker_process

_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


@in_worker_process
def regex(response: str, *, pattern: str) -> float:
    """Return 1.0 if the whole response, without white space at both ends, matches the regular expression; else 0.0.

    A dot matches line breaks too.
    """
    return float(_compiled(pattern).fullmatch(response.strip()) is not None)


@in_worker_process
def json_schema(response: str, *, schema: Mapping[str, Any] | str) -> float:
    """Return 1.0 if the response is JSON that satisfies the schema, a mapping or JSON text; else 0.0.

    The JSON is the last fenced block, or the whole response if there is none. Formats are not checked.
    """
    blocks = _FENCE.findall(response)
    try:
        value = json.loads(blocks[-1] if blocks else response, parse_constant=_refused)
    except (ValueError, RecursionError):
        return 0.0
    try:
        return float(_validator(schema if isinstance(schema, str) else json.dumps(schema, sort_keys=True))(value))
    except RecursionError:
        return 0.0


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise RewardError(f"the pattern {pattern!r:.200} is no regular expression: {error}") from None


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    """Return a function that says whether a value satisfies a schema."""
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    try:
        found = json.loads(schema)
        kind = validator_for(found)
        kind.check_schema(found)
    except (ValueError, TypeError, SchemaError) as error:
        why = getattr(error, "message", str(error))
        raise RewardError(f"the schema {schema:.200} is no JSON schema: {why:.200}") from None
    return kind(found).is_valid


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
