"""Probes the trainer's model without changing it: log-probs, the experts that its routers choose, fingerprints.

Each rank computes the part that it holds, and every rank gets the whole result. Knows the executor, how sequences are
packed and which rows of a microbatch a rank has; knows neither the loss nor the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from async_rl.config.training import TrainerSection
from async_rl.models.config import ModelConfig
from async_rl.trainer import packing
from async_rl.trainer.logprobs import token_logprobs
from async_rl.trainer.packing import Microbatch, Packer
from async_rl.trainer.parallel import Int64Array, Place, context_rows, router_rows
from async_rl.trainer.samples import Scalar, check_routed_experts, plain_sample
from async_rl.types import ExpertIds, Float32Array, Int32Array
from async_rl.weights.fingerprint import WIDTH

if TYPE_CHECKING:
    from async_rl.trainer.megatron.executor import Executor, Tensors
    from async_rl.trainer.megatron.platform import Device, Groups


class ModelProbe:
    """Probes the model that ``executor`` runs. All ranks make the same calls in the same order."""

    def __init__(
        self,
        executor: Executor,
        model: ModelConfig,
        settings: TrainerSection,
        place: Place,
        groups: Groups,
        device: Device,
    ) -> None:
        self._executor = executor
        self._model = model
        self._settings = settings
        self._place = place
        self._groups = groups
        self._device = device

    def logprobs(
        self,
        sequences: Sequence[Int32Array],
        routed_experts: Sequence[ExpertIds | Int32Array] | None = None,
        temperature: float | Sequence[Float32Array | float] = 1.0,
    ) -> list[Float32Array]:
        """Return log-probs float32[N-1] of tokens 1..N-1 of each sequence int32[N].

        temperature: one for all, or those of each. routed_experts: [N-1, L, K] of each sequence, to replay. Rows of
        NO_ROUTING, or all rows without it, are routed natively. Raises ReplayError where the model cannot execute them.
        """
        batches, filler = self._batches(sequences, routed_experts, temperature)

        def collect(tensors: Tensors, logits: torch.Tensor) -> tuple[torch.Tensor, Any]:
            values, _entropy = token_logprobs(
                logits, tensors["labels"], tensors["temperature"], self._groups.vocabulary
            )
            return values.sum(), {0: values.cpu().numpy()}

        kept = self._executor.forward(batches, collect, filler=filler)
        parts = kept if self._place.reports_loss else [{}] * len(batches)
        whole = self._assembled(batches, parts, self._context_rows, np.zeros((1,), np.float32))
        return [part[:, 0] for part in packing.unpack(whole, batches, len(sequences))]

    def native_routing(self, sequences: Sequence[Int32Array]) -> list[Int32Array]:
        """Return the experts that the routers choose now, int32[N-1, L, K] of each sequence int32[N]."""
        spec = self._model.routing_spec
        batches, filler = self._batches(sequences, None)
        if spec is None:
            return [np.zeros((max(len(ids) - 1, 0), 0, 0), np.int32) for ids in sequences]
        parts = self._executor.record_routing(batches, filler=filler)
        row = np.zeros((spec.num_moe_layers, spec.top_k), np.int32)
        return packing.unpack(self._assembled(batches, parts, self._router_rows, row), batches, len(sequences))

    def fingerprints(
        self, sequences: Sequence[Int32Array], routed_experts: Sequence[ExpertIds | Int32Array] | None = None
    ) -> list[Float32Array]:
        """Return fingerprints of the residual stream, float32[layers + 1, N-1, WIDTH] of each sequence int32[N].

        What they are is in ``weights.fingerprint``. routed_experts as in ``logprobs``.
        """
        batches, filler = self._batches(sequences, routed_experts)
        parts = self._executor.record_fingerprints(batches, filler=filler)
        row = np.zeros((self._model.num_layers + 1, WIDTH), np.float32)
        whole = packing.unpack(self._assembled(batches, parts, self._router_rows, row), batches, len(sequences))
        return [part.swapaxes(0, 1) for part in whole]

    def _batches(
        self,
        sequences: Sequence[Int32Array],
        routed_experts: Sequence[ExpertIds | Int32Array] | None,
        temperature: float | Sequence[Float32Array | float] = 1.0,
    ) -> tuple[list[Microbatch], Microbatch]:
        """Pack the sequences, with ``routed_experts`` to replay where given. Returns them and a filler."""
        spec = self._model.routing_spec
        each = [temperature] * len(sequences) if isinstance(temperature, float) else temperature
        samples = [
            plain_sample(f"sequence {index}", ids, temperature=own)
            for index, (ids, own) in enumerate(zip(sequences, each, strict=True))
        ]
        if routed_experts is not None:
            samples = [sample.with_routed_experts(rows) for sample, rows in zip(samples, routed_experts, strict=True)]
            for sample in samples:
                check_routed_experts(sample, spec)
        packer = Packer.of(self._settings, spec if routed_experts is not None else None)
        return packer.add(samples) + packer.flush(), packer.filler()

    def _context_rows(self, batch: Microbatch) -> Int64Array:
        return context_rows(batch.cu_seqlens, self._place)

    def _router_rows(self, batch: Microbatch) -> Int64Array:
        return router_rows(batch.cu_seqlens, (), self._model.num_layers, self._place)[0]

    def _assembled(
        self,
        batches: Sequence[Microbatch],
        parts: Sequence[Mapping[int, npt.NDArray[Any]]],
        rows: Callable[[Microbatch], Int64Array],
        zero: npt.NDArray[Scalar],
    ) -> list[npt.NDArray[Scalar]]:
        """Return [T, *zero.shape] of each microbatch, joined from the parts of all ranks that share its data.

        parts: for each microbatch, column (first axis of ``zero``) -> values at the positions that ``rows`` gives. No
        two ranks have the same; ``zero`` stands where no rank has any.
        """
        if not batches:
            return []
        starts = np.cumsum([0, *(len(batch) for batch in batches)])
        whole = np.broadcast_to(zero, (int(starts[-1]), *zero.shape)).copy()
        for batch, start, columns in zip(batches, starts, parts, strict=False):
            for column, values in columns.items():
                whole[start + rows(batch), column] = values
        summed = torch.from_numpy(whole).to(self._device)
        torch.distributed.all_reduce(summed, group=self._groups.model)
        return np.split(summed.cpu().numpy(), starts[1:-1])
