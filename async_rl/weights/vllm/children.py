"""What vLLM runs in the processes of an engine with data-parallel ranks, replaced where the processes are started.

``plugin`` comes too late for it, or never: the coordinator of the ranks loads no plugin, and an engine core loads it
after it has opened the store where the ranks meet.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.engine.coordinator import DPCoordinatorProc
from vllm.v1.engine.core import EngineCoreProc

from async_rl.runtime.logs import log_libraries
from async_rl.weights.vllm.listening import listen_at_own_address
from async_rl.weights.vllm.plugin import die_with_parent

_run_coordinator, _run_engine_core = DPCoordinatorProc.run_coordinator, EngineCoreProc.run_engine_core


def prepare_children() -> None:
    """Have coordinators that this process starts end with it, and engine cores listen where they should. Idempotent."""
    DPCoordinatorProc.run_coordinator = staticmethod(run_coordinator)
    EngineCoreProc.run_engine_core = staticmethod(run_engine_core)


def run_coordinator(**arguments: Any) -> None:
    """Run a coordinator. Killed, its parent would leave it running indefinitely."""
    log_libraries("DPCoordinator")
    die_with_parent()
    _run_coordinator(**arguments)


def run_engine_core(**arguments: Any) -> None:
    """Run an engine core, whose stores no other host reaches."""
    listen_at_own_address()
    _run_engine_core(**arguments)
