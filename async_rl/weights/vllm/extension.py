"""The extension of vLLM's worker class (``worker_extension_cls``), which runs in the process that holds the model."""

from __future__ import annotations

import contextlib
from typing import Any

from async_rl.weights.vllm.fingerprint import FingerprintExtension


class WorkerExtension(FingerprintExtension):
    """Methods for ``AsyncLLM.collective_rpc``. Their names must differ from those of vLLM's worker class."""

    def seed_by_rank(self) -> None:
        """Give each data-parallel rank a stream of random numbers of its own; vLLM 0.30 gives all of them the same.

        Ranks that sample the same prompts would then sample the same responses.
        """
        from vllm.utils.torch_utils import set_random_seed

        worker: Any = self
        config = worker.vllm_config
        set_random_seed(config.model_config.seed + config.parallel_config.data_parallel_rank)

    def receive_weight_update(self, update_info: dict[str, Any], *, first: bool) -> None:
        """Receive weights, as ``update_weights`` does; ``first`` begins the update in the same call."""
        worker: Any = self
        if first:
            worker.start_weight_update()
        worker.update_weights(update_info)

    def abandon_weight_update(self) -> None:
        """End an update whose sender died before it was finished, so that another one can begin.

        The weights may be half overwritten: send them again before the engine computes. vLLM 0.30 has no way to do
        this itself: it refuses a new update while one is active, and cannot finish one that received nothing.
        """
        worker: Any = self
        if worker._weight_update_active:
            with contextlib.suppress(Exception):
                worker.finish_weight_update()
            worker.weight_transfer_engine.reset_weight_update_target()
            worker._weight_update_active = False
