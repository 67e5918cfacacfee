"""What this machine has and lacks for a run, line by line, before anything starts.

Small functions, each a Check or a few: ok, warn (the run starts, but you should know) or FAIL (it could not).
``async-rl doctor`` prints them; the pipeline calls ``require``, which raises the first FAIL. Imports neither
torch nor Ray nor vLLM: versions come from package metadata, devices from /dev.
"""

from __future__ import annotations

from async_rl.config.schema import RunConfig
from async_rl.doctor import inputs, installation, machine
from async_rl.doctor.check import Check, Status
from async_rl.doctor.machine import uses_gpu

__all__ = ["Check", "Status", "checks", "failed", "report", "require", "uses_gpu"]


def checks(config: RunConfig | None) -> list[Check]:
    """Everything that can be said about this machine; with ``config``, about its run here too."""
    found = [installation.python(), *installation.packages(), *installation.torch_build()]
    if config is None:
        return [*found, *machine.present()]
    for look in (
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
    ):
        found.extend(look(config))
    return found


def failed(found: list[Check]) -> bool:
    """Whether a run could not start."""
    return any(check.status == "FAIL" for check in found)


def require(config: RunConfig) -> None:
    """Raise the first FAIL as the error it is: ConfigError for settings, ResourceError for the machine."""
    for check in checks(config):
        if check.status == "FAIL":
            if check.cause is not None:
                raise check.cause
            raise check.error(f"{check.name}: {check.detail}" + (f"; {check.mend}" if check.mend else ""))


def report(found: list[Check]) -> str:
    """One line per check, and one below with the mend where something is amiss."""
    width = max(len(check.name) for check in found)
    lines = []
    for check in found:
        lines.append(f"{check.status:<5} {check.name:<{width}}  {check.detail}")
        if check.mend and check.status != "ok":
            lines.append(f"{'':<5} {'':<{width}}  -> {check.mend}")
    fails = sum(check.status == "FAIL" for check in found)
    lines.append("a run can start here" if not fails else f"a run cannot start here: {fails} to mend")
    return "\n".join(lines) + "\n"
