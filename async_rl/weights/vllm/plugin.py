"""What vLLM loads in each of its processes: our weight-transfer backends, and the tie to the parent's life.

The entry point is declared in pyproject.toml under ``vllm.general_plugins``. Knows vLLM's two factories and ``shm``.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal

from async_rl.runtime.process import signal_on_parent_death

log = logging.getLogger(__name__)

# Names that vLLM gives to the processes that it starts. Only they are tied to their parent: this module is loaded
# in the parent too, which is the user's process and none of our business.
ENGINE_PROCESSES = ("EngineCore", "VllmWorker")


def register() -> None:
    """Register the backends on both sides, and die with the parent if this is an engine process. Idempotent."""
    from vllm.distributed.weight_transfer.factory import (
        WeightTransferEngineFactory,
        WeightTransferTrainerFactory,
    )

    for factory, class_name in (
        (WeightTransferEngineFactory, "ShmWeightTransferEngine"),
        (WeightTransferTrainerFactory, "ShmTrainerWeightTransferEngine"),
    ):
        if "shm" not in factory._registry:
            factory.register_engine("shm", "async_rl.weights.vllm.shm", class_name)
    if multiprocessing.current_process().name.startswith(ENGINE_PROCESSES):
        die_with_parent()
        _allow_amx()


def _allow_amx() -> None:
    """Ask the kernel for the use of AMX, which it grants by process.

    The CPU attention of vLLM 0.30 uses it in bfloat16 wherever the processor has it, and does not ask: the engine core
    dies of an illegal instruction.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, even by SIGKILL; exit now if it is dead already.

    Without it an engine whose parent is killed lives on: vLLM's own watch on its parent is a signal handler there.
    The kernel sends the signal when the *thread* that started this process ends, so an engine must be started
    from a thread that lives as long as the engine.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return
    signal_on_parent_death(signal.SIGKILL)
    # The parent may have died before the call above; then nobody will send the signal.
    if os.getppid() != parent.pid:
        log.error("parent %d is gone, so this engine process ends", parent.pid)
        os._exit(1)
