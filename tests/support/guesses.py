"""The two environments of verifiers that tests play, one of each version of the library: they say no to each guess."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.needs import NEEDS_VERIFIERS, NEEDS_VERIFIERS_V1, VERIFIERS_PYTHON, VERIFIERS_V1_PYTHON

CLASS = "async_rl.rollout.environments.verifiers:Verifiers"
LIBRARIES = Path(__file__).resolve().parent / "libraries"
PROMPT = [{"role": "system", "content": "Guess."}, {"role": "user", "content": "q2"}]


@dataclass(frozen=True)
class Library:
    """A version of the library with its environment."""

    python: Path
    environment: str
    made_by: str
    """The function that makes it."""
    row: Callable[..., dict[str, Any]]
    """Returns a row as ``data.train`` has it after ``prepare``; what the rollout does is in its arguments."""

    def agent(self, **arguments: Any) -> dict[str, Any]:
        """Return the settings of an agent."""
        arguments = {"environment": self.environment, **arguments}
        return {"environment": CLASS, "python": str(self.python), "arguments": arguments}


def _row_v0(**info: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "question": "q2", "answer": "42", "info": {"level": 2, **info}, "example_id": 2}


def _row_v1(**fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "task": json.dumps({"idx": 2, "prompt": "q2", "system_prompt": "Guess.", **fields})}


V0 = Library(VERIFIERS_PYTHON, "guess-env", "guess_env:load_environment", _row_v0)
V1 = Library(VERIFIERS_V1_PYTHON, "guess-taskset", "guess_taskset:load_environment", _row_v1)

EACH = (pytest.param(V0, id="0.3", marks=NEEDS_VERIFIERS), pytest.param(V1, id="0.4", marks=NEEDS_VERIFIERS_V1))
"""The parameters of a test of both."""


def calling(name: str, turns: int, **arguments: Any) -> Any:
    """Return a reader of the policy's turns with which each of the first calls a tool, with its number if no more."""

    class Reader:
        made = 0

        def message(self, turn: Any) -> dict[str, Any]:
            self.made += 1
            said = {"role": "assistant", "content": "well"}
            if self.made > turns:
                return said
            function = {"name": name, "arguments": json.dumps(arguments or {"n": self.made})}
            return {**said, "tool_calls": [{"id": f"c{self.made}", "type": "function", "function": function}]}

    return Reader()
