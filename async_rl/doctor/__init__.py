"""Checks of machine, installation and inputs before a run starts; ``observe`` and the watchdog read running ones.

Small functions, each of which returns one or a few ``Check``s. ``async-rl doctor`` prints them; the driver calls
``require``, which raises the first FAIL. Imports neither torch nor Ray nor vLLM: versions come from package metadata,
devices from /dev.
"""

from __future__ import annotations

from async_rl.config.schema import RunConfig
from async_rl.doctor import capacity, inputs, installation, machine
from async_rl.doctor.check import Check, Status
from async_rl.doctor.machine import uses_gpu

__all__ = ["Check", "Status", "checks", "failed", "report", "require", "uses_gpu"]


def checks(config: RunConfig | None) -> list[Check]:
    """Check this machine, and with ``config`` whether its run can start here."""
    found = [installation.python(), *installation.packages(), *installation.torch_build()]
    if config is None:
        return [*found, *machine.present()]
    for check in (
        machine.devices,
        machine.compiler,
        machine.cores,
        machine.memory,
        machine.shared_memory,
        machine.ports,
        inputs.folder,
        inputs.model,
        inputs.data,
        inputs.functions,
        inputs.durable_queue,
        capacity.longest_responses,
    ):
        found.extend(check(config))
    return found


def failed(found: list[Check]) -> bool:
    """Return whether a check failed, so that a run could not start."""
    return any(check.status == "FAIL" for check in found)


def require(config: RunConfig) -> None:
    """Raise the first FAIL: a ConfigError for settings and inputs, a ResourceError for the machine."""
    for check in checks(config):
        if check.status == "FAIL":
            if check.cause is not None:
                raise check.cause
            raise check.error(f"{check.name}: {check.detail}" + (f"; {check.fix}" if check.fix else ""))


def report(found: list[Check]) -> str:
    """Return one line per check, followed by one with the fix for each warn and FAIL, and a verdict at the end."""
    width = max(len(check.name) for check in found)
    lines = []
    for check in found:
        lines.append(f"{check.status:<5} {check.name:<{width}}  {check.detail}")
        if check.fix and check.status != "ok":
            lines.append(f"{'':<5} {'':<{width}}  -> {check.fix}")
    fails = sum(check.status == "FAIL" for check in found)
    if not fails:
        lines.append("a run can start on this machine")
    else:
        lines.append(f"this machine cannot run it: {fails} {'check' if fails == 1 else 'checks'} failed (see above)")
    return "\n".join(lines) + "\n"
