"""Environments of the library verifiers (its ``load_environment`` and rubrics) as ``rollout.agent.environment``.

The library makes the whole rollout: its own client asks the policy at the gateway, so that what was sampled is known
token by token as for any agent, and its rubric says what the rollout was worth. It runs in an environment host whose
interpreter has verifiers, and imports nothing else that a host has not.
"""

from __future__ import annotations

import functools
import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from async_rl.rollout.environments.host import import_class
from async_rl.rollout.environments.instance import Failed
from async_rl.rollout.environments.interface import Context, PolicyAddress, Step, Task

# Errors of verifiers for what the policy did: it said nothing, or called tools as no tool can be called. The rubric has
# scored the rollout all the same.
_OF_THE_POLICY = (
    *("EmptyModelResponseError", "InvalidModelResponseError"),
    *("ToolError", "ToolParseError", "ToolCallError"),
)

# Codes with which the gateway refuses a request at a limit of the run.
_NO_ROOM = ("context_length_exceeded", "rollout_budget_exceeded")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Verifiers:
    """One rollout with an environment of verifiers, of which all rollouts of a process have the same object."""

    _loaded: ClassVar[dict[str, Any]] = {}

    def __init__(self, environment: str, args: Mapping[str, Any] | None = None) -> None:
        """Take an environment's id, or module:function of one of your own, and the arguments that it is made with."""
        self._environment = self._load(environment, args)
        self._input: dict[str, Any] = {}

    @classmethod
    def prepare(cls, environment: str, args: Mapping[str, Any] | None = None) -> None:
        """Load the environment, once in a process. Raises Failed."""
        loaded = cls._load(environment, args)
        if getattr(loaded, "requires_group_rollouts", False):
            raise Failed(
                f"{environment} has reward functions that compare the rollouts of a group, which are made one by one "
                "here; give its rubric functions of single rollouts"
            )

    @classmethod
    def rows(cls, split: str, environment: str, args: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the rows of its dataset ("train") or of its eval_dataset ("eval"). Raises Failed."""
        loaded = cls._load(environment, args)
        dataset = loaded.build_dataset() if split == "train" else loaded.build_eval_dataset()
        if dataset is None:
            raise Failed(f"{environment} has no {'dataset' if split == 'train' else 'eval_dataset'}; set data.{split}")
        for row in dataset:
            yield {**row, "prompt": _without_none(row["prompt"])}

    @classmethod
    def _load(cls, environment: str, args: Mapping[str, Any] | None) -> Any:
        args = dict(args or {})
        key = json.dumps([environment, args], sort_keys=True, default=str)
        if key not in cls._loaded:
            if threading.current_thread() is not threading.main_thread():
                # It sets handlers of signals, which only the main thread may.
                raise Failed("runs in environment hosts alone; leave rollout.agent.inline false")
            handlers = {each: signal.getsignal(each) for each in _SIGNALS}
            try:
                cls._loaded[key] = _made(environment, args)
            finally:
                for each, handler in handlers.items():
                    if handler is not None:
                        signal.signal(each, handler)  # Its own would run its teardown, and not end the host.
        return cls._loaded[key]

    def setup(self, task: Task, context: Context) -> None:
        """Make the input of the rollout from the row."""
        del context
        fields = {name: value for name, value in task.fields.items() if value is not None}
        asked = task.text if task.messages is None else task.messages
        self._input = {"example_id": task.row, **fields, "prompt": asked}

    async def rollout(self, policy: PolicyAddress) -> Step:
        """Have the library make the rollout and score it. Raises Failed."""
        client = _client(policy)
        environment = self._environment
        try:
            made = await environment.run_rollout(self._input, client, policy.model, dict(environment.sampling_args))
        finally:
            await client.close()
        return _outcome(made)


def _made(environment: str, args: dict[str, Any]) -> Any:
    """Return what the user's function or the environment's package makes. Raises Failed."""
    try:
        import verifiers
    except ModuleNotFoundError as error:
        if error.name != "verifiers":
            raise
        raise Failed(f"{sys.executable} has no module verifiers; name one that has it (rollout.agent.python)") from None
    if ":" in environment:
        made = import_class(environment)(**args)
    elif hasattr(verifiers, "load_environment"):
        made = verifiers.load_environment(environment, **args)
    else:
        raise Failed(
            f"needs verifiers below 0.4, which has load_environment, and found {verifiers.__version__}; install "
            "requirements/verifiers.txt"
        )
    if not callable(getattr(made, "run_rollout", None)):
        raise Failed(f"{environment} returned a {type(made).__name__}; expected an Environment of verifiers")
    return made


@functools.cache
def _client_class() -> Any:
    from openai import BadRequestError
    from verifiers.clients import OpenAIChatCompletionsClient
    from verifiers.errors import OverlongPromptError

    class Client(OpenAIChatCompletionsClient):  # type: ignore[misc]
        """Says that there is no room in the library's own terms, which end a rollout and have it scored."""

        async def get_native_response(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return await super().get_native_response(*args, **kwargs)
            except BadRequestError as error:
                if error.code in _NO_ROOM:
                    raise OverlongPromptError from error
                raise

    return Client


def _client(policy: PolicyAddress) -> Any:
    from httpx import Timeout
    from openai import AsyncOpenAI

    # A turn may take as long as the run lets it: rollout.agent.timeout_s.
    timeout = Timeout(None, connect=60.0)
    return _client_class()(AsyncOpenAI(base_url=policy.base_url, api_key=policy.api_key, timeout=timeout))


def _outcome(made: Mapping[str, Any]) -> Step:
    error = made.get("error")
    if error is not None and error["error"] not in _OF_THE_POLICY:
        raise Failed(f"ended with {error['error_chain_repr']:.2000}")
    timed_out = made.get("stop_condition") == "timeout_reached"
    ends = {
        "policy_error": error is not None,
        "timed_out": timed_out,
        "no_room": made.get("stop_condition") == "prompt_too_long",
    }
    metrics = {**{name: float(ended) for name, ended in ends.items()}, **(made.get("metrics") or {})}
    truncated = timed_out or bool(made.get("is_truncated"))
    return Step(reward=made["reward"], done=True, truncated=truncated, metrics=metrics)


def _without_none(prompt: Any) -> Any:
    """Return messages without the keys that Arrow has given each because another has them; a text as it is."""
    if isinstance(prompt, str):
        return prompt
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]
