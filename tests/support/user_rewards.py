"""Rewards as a user would write them, named by module:function in the tests' configs."""

import random

from async_rl.types import Prompt


def fails_on_long_prompts(prompt: Prompt, response: str) -> float:
    if len(prompt.text) > 30:
        raise ValueError(f"prompt of {len(prompt.text)} characters is too long for me")
    return float(len(response) == len(prompt.fields["answer"]))


def ask_twice(prompt: Prompt, turns: tuple[str, ...]) -> str | None:
    """An environment that goes on twice with some letters of the prompt."""
    return prompt.text[:3] if len(turns) < 5 else None


def at_random(prompt: Prompt, response: str) -> float:
    """A reward by which the responses of a group differ, whatever they are."""
    return random.random()
