"""What vLLM's worker class is extended with (``worker_extension_cls``); runs in the process that holds the model."""

from __future__ import annotations

import contextlib
from typing import Any

from async_rl.weights.vllm.fingerprint import FingerprintExtension


class WorkerExtension(FingerprintExtension):
    """Methods for ``AsyncLLM.collective_rpc``. Their names must not be any of vLLM's worker class."""

    def abandon_weight_update(self) -> None:
        """End an update that its sender, dead by now, did not finish, so that another one can begin.

        What it left of the weights must be overwritten before the engine computes again. vLLM 0.30 has no way to do
        this: it refuses a new update while one is active, and an update that received nothing cannot be finished.
        """
        worker: Any = self
        if worker._weight_update_active:
            with contextlib.suppress(Exception):
                worker.finish_weight_update()
            worker.weight_transfer_engine.reset_weight_update_target()
            worker._weight_update_active = False
