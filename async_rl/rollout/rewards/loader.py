"""From ``module:function`` to the function. Knows ``types`` and ``errors``; runs nothing but the module's import."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Awaitable, Callable

from async_rl.errors import RewardError
from async_rl.types import Prompt

RewardFunction = Callable[[Prompt, str], float] | Callable[[Prompt, str], Awaitable[float]]


def load_reward(name: str) -> RewardFunction:
    """Import the function that ``reward.function`` names and check that it takes (prompt, response).

    Raises RewardError, naming the setting and the mend, when it cannot be found or called so.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise RewardError(f"reward.function: {name!r} is not of the form module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RewardError(
            f"reward.function: {name!r}: there is no module {error.name!r}; check the spelling, or put the folder that "
            "holds it on PYTHONPATH"
        ) from error
    except Exception as error:
        raise RewardError(
            f"reward.function: {name!r}: importing {module_name!r} raised {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise RewardError(
            f"reward.function: {name!r}: module {module_name!r} has no function {attribute!r}"
            + (f"; it has {', '.join(found)}" if found else "")
        )
    try:
        inspect.signature(function).bind("prompt", "response")
    except TypeError as error:
        raise RewardError(f"reward.function: {name!r} cannot be called as f(prompt, response): {error}") from None
    except ValueError:
        pass  # A builtin without a signature to look at: the first call will tell.
    reward: RewardFunction = function
    return reward
