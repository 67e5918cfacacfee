"""Environments of verifiers 0.3: those that its ``load_environment`` makes, with rubrics."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from async_rl.rollout.environments.host import import_class
from async_rl.rollout.environments.instance import Failed
from async_rl.rollout.environments.interface import PolicyAddress, Step, Task

# Errors of verifiers for what the policy did: it said nothing, or called tools as no tool can be called. The rubric has
# scored the rollout all the same.
_OF_THE_POLICY = (
    *("EmptyModelResponseError", "InvalidModelResponseError"),
    *("ToolError", "ToolParseError", "ToolCallError"),
)

# Codes with which the gateway refuses a request at a limit of the run.
_NO_ROOM = ("context_length_exceeded", "rollout_budget_exceeded")


class Rubrics:
    """An environment, whose rubric says what a rollout was worth."""

    def __init__(self, name: str, environment: Any) -> None:
        self._name, self._environment = name, environment

    def check(self) -> None:
        """Refuse rewards of whole groups. Raises Failed."""
        if getattr(self._environment, "requires_group_rollouts", False):
            raise Failed(
                f"{self._name} has reward functions that compare the rollouts of a group, which are made one by one "
                "here; give its rubric functions of single rollouts"
            )

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of its dataset ("train") or of its eval_dataset ("eval"). Raises Failed."""
        train = split == "train"
        dataset = self._environment.build_dataset() if train else self._environment.build_eval_dataset()
        if dataset is None:
            raise Failed(f"{self._name} has no {'dataset' if train else 'eval_dataset'}; set data.{split}")
        for row in dataset:
            yield {**row, "prompt": _without_none(row["prompt"])}

    async def play(self, task: Task, policy: PolicyAddress) -> Step:
        """Have the environment make the rollout of a row. Raises Failed."""
        fields = {name: value for name, value in task.fields.items() if value is not None}
        asked = task.text if task.messages is None else task.messages
        row = {"example_id": task.row, **fields, "prompt": asked}
        environment, client = self._environment, _client(policy)
        try:
            made = await environment.run_rollout(row, client, policy.model, dict(environment.sampling_args))
        finally:
            await client.close()
        return _outcome(made)


def load(environment: str, args: dict[str, Any]) -> Rubrics:
    """Return what the user's function or the environment's package makes. Raises Failed."""
    import verifiers

    made = import_class(environment)(**args) if ":" in environment else verifiers.load_environment(environment, **args)
    if not callable(getattr(made, "run_rollout", None)):
        raise Failed(f"{environment} returned a {type(made).__name__}; expected an Environment of verifiers")
    return Rubrics(environment, made)


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
