"""Rewards as a user would write them, named by module:function in the tests' configs."""

import zlib

from async_rl.types import Prompt


def fails_on_long_prompts(prompt: Prompt, response: str) -> float:
    if len(prompt.text) > 30:
        raise ValueError(f"prompt of {len(prompt.text)} characters is too long for me")
    return float(len(response) == len(prompt.fields["answer"]))


def by_chance(prompt: Prompt, response: str) -> float:
    """A number from 0 to 1 for each prompt and response, so that responses of a group differ and have a gradient."""
    return zlib.crc32(f"{prompt.text} {response}".encode()) / 2**32


def in_parts(prompt: Prompt, response: str) -> dict[str, float]:
    """A reward of which the length is a named part."""
    return {"score": by_chance(prompt, response), "length": float(len(response))}


def ask_twice(prompt: Prompt, turns: tuple[str, ...]) -> str | None:
    """An environment that goes on twice with some letters of the prompt."""
    return prompt.text[:3] if len(turns) < 5 else None


def equal_on_even_rows(prompt: Prompt, response: str) -> float:
    """All responses to a prompt of an even row are equally right, so that nothing can be learnt from its group."""
    return 1.0 if prompt.row % 2 == 0 else by_chance(prompt, response)


def always_right(prompt: Prompt, response: str) -> float:
    return 1.0
