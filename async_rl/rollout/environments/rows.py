"""The dataset that an environment's class has itself, written as JSONL for ``data.train``.

Imports the standard library alone. A class has one where it has a class method ``rows(split, **arguments)``, which
returns the rows of "train" or "eval".
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from async_rl.rollout.environments.instance import Failed, failure, hook_of


def write_rows(make: Callable[..., Any], arguments: Mapping[str, Any], split: str, path: str) -> int:
    """Write the rows of a split to a file, whole or not at all, and return how many they are. Raises Failed."""
    rows = hook_of(make, "rows")
    if rows is None:
        raise Failed("has no class method rows, which would say what its dataset is; write data.train yourself")
    count, building = 0, f"{path}.building"
    try:
        with open(building, "w", encoding="utf-8") as file:
            for row in rows(split, **arguments):
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                count += 1
        if not count:
            raise Failed(f"has no rows of {split!r}")
        os.replace(building, path)
    except OSError as error:
        raise Failed(f"cannot write its rows to {path}: {error.strerror}") from None
    except Exception as error:  # noqa: BLE001 - whatever the user's class raises
        raise failure(error, "its rows ") from None
    finally:
        if os.path.exists(building):
            os.remove(building)
    return count
