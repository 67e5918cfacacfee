"""The device of a rollout engine."""

from __future__ import annotations

from async_rl.config.schema import RunConfig


def on_cpu(config: RunConfig) -> bool:
    """Return whether engines of this host compute on its CPUs."""
    if config.resources.device != "auto":
        return config.resources.device == "cpu"
    import torch

    return not torch.cuda.is_available()
