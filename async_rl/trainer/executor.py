"""Runs microbatches through the model under Megatron's own schedule, with their routing armed.

Every forward and backward pass of the trainer goes through ``Executor``; what is done with the logits is the caller's
``LossFunction``. Knows Megatron's schedules, ``replay`` and the device seam; knows neither configuration nor groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from async_rl.trainer import packing, platform
from async_rl.trainer.megatron import packed
from async_rl.trainer.packing import Microbatch
from async_rl.trainer.platform import Device
from async_rl.trainer.replay import RoutingReplay

Tensors = dict[str, torch.Tensor]

# (a microbatch's tensors, logits [T, V]) -> (scalar to differentiate, what to keep of this microbatch).
LossFunction = Callable[[Tensors, torch.Tensor], tuple[torch.Tensor, Any]]


class Executor:
    """One model on this rank."""

    def __init__(self, model: DistributedDataParallel, replay: RoutingReplay, device: Device) -> None:
        self._model = model
        self._replay = replay
        self._device = device
        model.config.no_sync_func = model.no_sync
        model.config.finalize_model_grads_func = _sum_gradients

    def forward_backward(self, batches: Sequence[Microbatch], loss: LossFunction, *, verify: bool = False) -> list[Any]:
        """Leave the gradient of the summed losses, of all ranks, in the parameters' main_grad.

        Returns what ``loss`` kept of each microbatch of this rank. verify: compare the experts executed with the rows
        asked for, raising ReplayError where they differ.
        """
        self._model.zero_grad_buffer()
        if not batches:  # this rank has nothing to add, but the others wait for it in the reduction
            with platform.cuda_means(self._device):
                _sum_gradients([self._model])
            return []
        return self._run(batches, loss, forward_only=False, record=False, verify=verify)

    def forward(self, batches: Sequence[Microbatch], keep: LossFunction) -> list[Any]:
        """What ``keep`` kept of each microbatch. No gradients, no state."""
        with torch.no_grad():
            return self._run(batches, keep, forward_only=True, record=False, verify=False)

    def record_routing(self, batches: Sequence[Microbatch]) -> list[dict[int, torch.Tensor]]:
        """The experts that the routers choose now: MoE layer index -> int64[T, K], for each microbatch."""

        def nothing(_: Tensors, logits: torch.Tensor) -> tuple[torch.Tensor, Any]:
            return logits.new_zeros(()), None

        with torch.no_grad():
            return self._run(batches, nothing, forward_only=True, record=True, verify=False)

    def _run(
        self,
        batches: Sequence[Microbatch],
        loss: LossFunction,
        *,
        forward_only: bool,
        record: bool,
        verify: bool,
    ) -> list[Any]:
        if not batches:
            return []

        def forward_step(iterator: Any, model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            batch = next(iterator)
            tensors = self._to_device(batch)
            self._replay.before_forward(tensors.get("routing"))
            logits = model(
                input_ids=tensors["token_ids"].unsqueeze(0),
                position_ids=tensors["position_ids"].unsqueeze(0),
                attention_mask=None,
                packed_seq_params=packed(tensors["cu_seqlens"], batch.longest),
            )
            recorded = self._replay.after_forward()

            def scalar(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
                value, kept = loss(tensors, output.squeeze(0))
                # Megatron wants a token count, for an average that the loss has taken already.
                count = torch.tensor(len(batch), dtype=torch.int, device=value.device)
                return value, count, recorded if record else kept

            return logits, scalar

        with platform.cuda_means(self._device), self._replay.schedule(record=record, verify=verify):
            kept: list[Any] = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(batches),
                model=[self._model],
                num_microbatches=len(batches),
                seq_length=max(len(batch) for batch in batches),
                micro_batch_size=1,
                forward_only=forward_only,
            )
        return kept

    def _to_device(self, batch: Microbatch) -> Tensors:
        arrays = {name: getattr(batch, name) for name in packing.ARRAYS}
        return {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items() if array is not None}


def _sum_gradients(model: list[Any], _tokens: torch.Tensor | None = None, **groups: Any) -> None:
    """Megatron's finalization, less its division by a token count: the losses were divided before the backward
    pass, by the count of the global batch.
    """
    finalize_model_grads(model, None, **groups)
