"""The plugin that vLLM loads in each of its processes: registers the transfer backends, ends engines with their parent.

In engine processes it also installs ``scheduler_leak``, ``cpu_exchange`` and ``listening``. The entry point is declared
in pyproject.toml under ``vllm.general_plugins``. Knows vLLM's two factories, and the classes by name.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from typing import Any

from async_rl.runtime.logs import log_libraries
from async_rl.runtime.process import mark_shared_memory, signal_on_parent_death
from async_rl.weights.vllm.scheduler_leak import forget_freed_requests

log = logging.getLogger(__name__)

# Names that vLLM gives to the processes that it starts. Only these end with their parent: this module is loaded in the
# parent too, which is the user's process.
ENGINE_PROCESSES = ("EngineCore", "VllmWorker")

# What the backends of sync.backend are called in vLLM's factories, where ``nccl`` is vLLM's own.
BACKENDS = {"shm": "shm", "object_store": "object_store", "nccl": "async_rl_nccl"}


def register() -> None:
    """Register the backends of both sides; an engine process also ends with its parent from now on. Idempotent."""
    from vllm.distributed.weight_transfer.factory import (
        WeightTransferEngineFactory,
        WeightTransferTrainerFactory,
    )

    for factory, backend, path in (
        (WeightTransferEngineFactory, "shm", "shm:ShmWeightTransferEngine"),
        (WeightTransferTrainerFactory, "shm", "shm:ShmTrainerWeightTransferEngine"),
        # What an engine loads from is a memory file of its host with both.
        (WeightTransferEngineFactory, "object_store", "shm:ShmWeightTransferEngine"),
        (WeightTransferTrainerFactory, "object_store", "object_store:ObjectStoreTrainerWeightTransferEngine"),
        (WeightTransferEngineFactory, "nccl", "nccl:TimedNCCLWeightTransferEngine"),
        (WeightTransferTrainerFactory, "nccl", "nccl:TimedNCCLTrainerWeightTransferEngine"),
    ):
        module, class_name = path.split(":")
        if BACKENDS[backend] not in factory._registry:
            factory.register_engine(BACKENDS[backend], f"async_rl.weights.vllm.{module}", class_name)
    if (name := multiprocessing.current_process().name).startswith(ENGINE_PROCESSES):
        from async_rl.weights.vllm.cpu_exchange import exchange_on_cpus
        from async_rl.weights.vllm.listening import listen_at_own_address

        log_libraries(name)
        die_with_parent()
        _mark_shared_memory()
        _allow_amx()
        listen_at_own_address()
        exchange_on_cpus()
        forget_freed_requests()


def _mark_shared_memory() -> None:
    """Have what tensor-parallel ranks share removed with the run; killed, they leave it."""
    if (mark := mark_shared_memory()) is None:
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    name = _CPUSHMDistributed.make_group_name

    def marked(communicator: Any) -> str:
        """Return the name of what ranks on a CPU reduce in, with one mark however often this was called."""
        found: str = name(communicator)
        return found if found.startswith(mark) else f"{mark}-{found}"

    _CPUSHMDistributed.make_group_name = staticmethod(marked)


def _allow_amx() -> None:
    """Ask the kernel for permission to use AMX, which it grants per process.

    The CPU attention of vLLM 0.30 uses AMX in bfloat16 on every processor that has it, without asking: the engine core
    then dies of an illegal instruction.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, even by SIGKILL; exit now if it is dead already.

    Otherwise an engine would outlive a killed parent, because vLLM relies on a signal handler in the parent. The kernel
    sends the signal when the *thread* that started this process ends, so an engine must be started from a thread that
    lives as long as the engine.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return
    signal_on_parent_death(signal.SIGKILL)
    # The parent may have died before the call above; then no signal will come.
    if os.getppid() != parent.pid:
        log.error("engine_parent_died parent=%d", parent.pid)  # The standard library's logger: it takes no fields.
        os._exit(1)
