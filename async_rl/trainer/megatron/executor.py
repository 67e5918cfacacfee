"""Runs microbatches through this rank's part of the model under Megatron's own schedules, with replay armed.

Every forward and backward pass of the trainer goes through ``Executor``. The caller passes a ``LossFunction`` for the
logits, which only ranks of the last pipeline stage call. Knows Megatron's schedules, ``replay``, ``fingerprint``,
``parallel`` and the device seam; knows neither settings nor groups.

All ranks call the same methods in the same order. They may bring different numbers of microbatches: ranks with fewer
compute microbatches of padding, because ranks that share experts or a pipeline compute microbatch by microbatch
together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from async_rl.trainer import packing
from async_rl.trainer.megatron import platform
from async_rl.trainer.megatron.fingerprint import FingerprintHooks
from async_rl.trainer.megatron.model import packed_seq_params
from async_rl.trainer.megatron.platform import Device
from async_rl.trainer.megatron.reduction import GradientReduction
from async_rl.trainer.megatron.replay import RoutingReplay
from async_rl.trainer.packing import Microbatch
from async_rl.trainer.parallel import Place, context_rows
from async_rl.types import Float32Array

# The fields of packing.BY_POSITION, [T / cp]: those positions of a microbatch that this rank's attention sees.
Tensors = dict[str, torch.Tensor]

# (a microbatch's tensors, logits [T / cp, V / tp]) -> (scalar to differentiate, value to keep of this microbatch).
LossFunction = Callable[[Tensors, torch.Tensor], tuple[torch.Tensor, Any]]

# (number of a microbatch in the schedule, number of the chunk that has just computed it).
Watcher = Callable[[int, int], None]


class Executor:
    """Computes with this rank's chunks of one model. A ``filler`` is a microbatch of padding alone."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        replay: RoutingReplay,
        place: Place,
        device: Device,
    ) -> None:
        self._chunks = list(chunks)
        self._reduction = GradientReduction(chunks)
        self._replay = replay
        self._place = place
        self._device = device

    def zero_gradients(self) -> None:
        """Set the gradients of all parameters to zero."""
        self._reduction.zero()

    def accumulate(
        self,
        batches: Sequence[Microbatch],
        loss: LossFunction,
        *,
        filler: Microbatch,
        last: bool = True,
        verify: bool = False,
    ) -> list[Any]:
        """Add the gradient of the summed losses to this rank's gradients. May be called several times in a step.

        Only the ``last`` of these calls reduces gradients.

        Returns the values that ``loss`` kept of this rank's microbatches, on the last stage. verify: compare the
        experts executed with those to replay. Raises ReplayError where they differ.
        """
        return self._run(batches, loss, filler, forward_only=False, last=last, verify=verify)

    def take_disagreement(self) -> tuple[float, float]:
        """Return how ``accumulate`` has routed since the last call; see RoutingReplay.take_disagreement."""
        return self._replay.take_disagreement()

    def finish_gradients(self, divisor: float) -> None:
        """Leave the sum of all ranks' gradients, over ``divisor``, in the parameters' main_grad."""
        with platform.redirect_cuda_to(self._device):
            self._reduction.finish(divisor)

    def forward(
        self,
        batches: Sequence[Microbatch],
        keep: LossFunction | None = None,
        *,
        filler: Microbatch,
        watch: Watcher | None = None,
    ) -> list[Any]:
        """Return the values that ``keep`` kept of each microbatch, on the last stage. No gradients, no state.

        watch: called on every rank after each forward pass of each of its chunks, those of fillers included.
        """

        def nothing(_: Tensors, logits: torch.Tensor) -> tuple[torch.Tensor, Any]:
            return logits.new_zeros(()), None

        with torch.no_grad():
            return self._run(batches, keep or nothing, filler, forward_only=True, watch=watch)

    def record_routing(
        self, batches: Sequence[Microbatch], *, filler: Microbatch
    ) -> list[dict[int, npt.NDArray[np.int64]]]:
        """Return the experts that this rank's routers choose now, for each microbatch.

        By MoE layer index, int64[rows, K]; the rows are ``parallel.router_rows``.
        """
        recorded: list[dict[int, npt.NDArray[np.int64]]] = [{} for _ in batches]

        def note(index: int, chunk: int) -> None:
            if index < len(recorded):
                recorded[index] |= {layer: rows.cpu().numpy() for layer, rows in self._replay.recorded(chunk).items()}

        with self._replay.recording():
            self.forward(batches, filler=filler, watch=note)
        return recorded

    def record_fingerprints(
        self, batches: Sequence[Microbatch], *, filler: Microbatch
    ) -> list[dict[int, Float32Array]]:
        """Return the fingerprints of this rank's layers, for each microbatch.

        By entry (0 for the embeddings, then one for each layer), float32[rows, WIDTH]; the rows are
        ``parallel.router_rows``.
        """
        recorded: list[dict[int, Float32Array]] = [{} for _ in batches]
        with FingerprintHooks([chunk.module for chunk in self._chunks]) as hooks:

            def note(index: int, _chunk: int) -> None:
                taken = hooks.take()
                if index < len(recorded):
                    recorded[index] |= taken

            self.forward(batches, filler=filler, watch=note)
        return recorded

    def _run(
        self,
        batches: Sequence[Microbatch],
        loss: LossFunction,
        filler: Microbatch,
        *,
        forward_only: bool,
        last: bool = False,
        verify: bool = False,
        watch: Watcher | None = None,
    ) -> list[Any]:
        count = self._common_count(len(batches))
        if count == 0:
            return []
        run = [*batches, *[filler] * (count - len(batches))]
        chunk_of = {id(chunk): number for number, chunk in enumerate(self._chunks)}

        def forward_step(iterator: Any, chunk: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            index, batch = next(iterator)
            number = chunk_of[id(chunk)]
            tensors = self._to_device(batch)
            # A forward pass alone is a probe, or comes before the training pass over the same rows.
            compared = None if forward_only else batch.of_samples
            self._replay.before_forward(batch.routed_experts, batch.cu_seqlens, number, compared)
            logits = chunk(
                input_ids=tensors["token_ids"].unsqueeze(0),
                position_ids=tensors["position_ids"].unsqueeze(0),
                attention_mask=None,
                packed_seq_params=packed_seq_params(torch.from_numpy(batch.cu_seqlens).to(self._device), batch.longest),
            )
            self._replay.after_forward(number)
            if watch is not None:
                watch(index, number)

            def scalar(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
                value, kept = loss(tensors, output.squeeze(0))
                # Megatron wants a token count for an average; finish_gradients divides instead.
                return value, torch.tensor(len(batch), dtype=torch.int, device=value.device), kept

            return logits, scalar

        iterators = [iter(enumerate(run)) for _ in self._chunks]
        schedule = self._replay.schedule(verify=verify), self._reduction.schedule(last=last)
        with platform.redirect_cuda_to(self._device), schedule[0], schedule[1]:
            kept: list[Any] = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self._chunks,
                num_microbatches=count,
                seq_length=max(len(batch) for batch in run),
                micro_batch_size=1,
                forward_only=forward_only,
            )
        return kept[: len(batches)]

    def _common_count(self, count: int) -> int:
        """Return how many microbatches every rank runs: the largest count of a rank.

        An interleaved pipeline runs whole rounds of its stages.
        """
        most = torch.tensor(count, device=self._device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        sizes = self._place.sizes
        return int(most) + -int(most) % (sizes.pp if sizes.vpp > 1 else 1)

    def _to_device(self, batch: Microbatch) -> Tensors:
        rows = context_rows(batch.cu_seqlens, self._place)
        arrays = {name: getattr(batch, name) for name in packing.BY_POSITION}
        return {
            name: torch.from_numpy(array[rows]).to(self._device) for name, array in arrays.items() if array is not None
        }
