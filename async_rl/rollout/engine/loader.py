"""Finds the class that ``rollout.engine`` names. Knows the built-in engines by module; starts none of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from async_rl.config.functions import load_function
from async_rl.errors import ConfigError
from async_rl.rollout.engine.interface import RolloutEngine

# By the name that users write; a module of ours imports its library only when an engine starts.
BUILT_IN = {
    "vllm": "async_rl.rollout.engine.vllm.engine:VllmEngine",
    "sglang": "async_rl.rollout.engine.sglang.engine:SglangEngine",
}

EngineFactory = Callable[..., RolloutEngine]


def load_engine(name: str) -> EngineFactory:
    """Return the class that ``rollout.engine`` names, which is called as ``Class(config, replica, cores=cores)``.

    Raises ConfigError, naming the setting and the fix, when it cannot be found, cannot be called so, or lacks a method
    of ``RolloutEngine``.
    """
    engine: EngineFactory = load_function(
        "rollout.engine", BUILT_IN.get(name, name), ("config", "replica", "cores"), ConfigError
    )
    missing = [method for method, _ in inspect.getmembers(RolloutEngine, inspect.isfunction) if method[0] != "_"]
    missing = [method for method in missing if inspect.isclass(engine) and not hasattr(engine, method)]
    if missing:
        raise ConfigError(f"rollout.engine: {name!r} lacks {', '.join(missing)} of RolloutEngine; add these methods")
    return engine
