"""Functions that a setting names: ``module:function`` to the function itself.

Owns where functions have moved to, so that configs and run folders of the release before stay usable. Knows only
``errors``; callers know the purpose of a function.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import structlog

from async_rl.errors import AsyncRLError

log = structlog.get_logger(__name__)

MOVED_MODULES = {
    "async_rl.rollout.environment": "async_rl.rollout.environments.turns",
    "async_rl.tiny.model": "async_rl.demo.model",
    "async_rl.tiny.prepare": "async_rl.demo.prepare",
    "async_rl.tiny.task": "async_rl.demo.task",
    "async_rl.tiny.tokenizer": "async_rl.demo.tokenizer",
    "async_rl.tiny.warmup": "async_rl.demo.warmup",
}
"""{module in release 0.1: module now}, for modules whose functions a setting may name. Kept for one release."""


def load_function(
    setting: str, name: str, arguments: tuple[str, ...], error_type: type[AsyncRLError]
) -> Callable[..., Any]:
    """Import ``module:function``, which ``setting`` names, and check that it can be called with these ``arguments``.

    Raises ``error_type``, naming the setting and the fix, when it cannot be imported or called so.
    """
    function = import_function(setting, name, error_type)
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise error_type(f"{setting}: {name!r} cannot be called as f({', '.join(arguments)}): {error}") from None
    except ValueError:
        pass  # A builtin without a signature: the first call will show whether it fits.
    return function


def import_function(setting: str, name: str, error_type: type[AsyncRLError]) -> Callable[..., Any]:
    """Import ``module:function``, which ``setting`` names.

    Raises ``error_type``, naming the setting and the fix, when it cannot be imported or is no function.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise error_type(f"{setting}: {name!r} is not of the form module:function")
    module_name = _current_module(setting, module_name, attribute)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise error_type(
            f"{setting}: {name!r}: there is no module {error.name!r}; check the spelling, or add the folder that "
            "contains it to PYTHONPATH"
        ) from error
    except Exception as error:
        raise error_type(
            f"{setting}: {name!r}: importing {module_name!r} raised {type(error).__name__}: {error}"
        ) from error
    function: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise error_type(
            f"{setting}: {name!r}: module {module_name!r} has no function {attribute!r}"
            + (f"; it has {', '.join(found)}" if found else "")
        )
    return function


def _current_module(setting: str, module: str, attribute: str) -> str:
    """Return where the module is now, and warn if that is elsewhere."""
    current = MOVED_MODULES.get(module, module)
    if current != module:
        log.warning("moved_function_name", setting=setting, old=f"{module}:{attribute}", new=f"{current}:{attribute}")
    return current
