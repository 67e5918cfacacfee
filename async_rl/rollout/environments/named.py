"""The environments of a run by name, as the settings have them. Pure."""

from __future__ import annotations

from async_rl.config.schema import RunConfig

SETTING = "rollout.environment.function"


def environments_of(config: RunConfig) -> dict[str, str]:
    """Return the functions that settings name as environments, each with the first setting that does."""
    own = {f"data.sources.{name}.environment": each.environment for name, each in config.data.sources.items()}
    own |= {f"eval.sets.{name}.environment": each.environment for name, each in config.eval.sets.items()}
    found: dict[str, str] = {}
    for setting, function in {SETTING: config.rollout.environment.function, **own}.items():
        if function is not None:
            found.setdefault(function, setting)
    return found
