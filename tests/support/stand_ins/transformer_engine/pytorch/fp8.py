"""FP8's global state: never enabled."""

import contextlib
from typing import Any


class FP8GlobalStateManager:
    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return False

    @classmethod
    def get_fp8_recipe(cls) -> None:
        return None


def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Any = None,
    fp8_group: Any = None,
    _graph: bool = False,
):
    if enabled or calibrating:
        raise NotImplementedError("the stand-in for Transformer Engine has no FP8")
    return contextlib.nullcontext()
