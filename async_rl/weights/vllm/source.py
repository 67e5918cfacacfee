"""The trainer's weights in the form that vLLM's weight transfer takes: a WeightSource over a stream of named tensors.

Knows vLLM's weight-transfer base class, not Megatron. Importing this module imports part of vLLM (about 3.5 s and
270 MiB without an engine), so the trainer does so only when asked for a source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from async_rl.models.names import Meta
from async_rl.weights.shm_file import TensorMeta
from async_rl.weights.vllm.name_table import Rows, rows


class NamedWeights(Protocol):
    """A stream of named tensors in the order of its metadata, such as ``trainer.export.Weights``."""

    def metadata(self) -> list[Meta]: ...

    def by_destination(self) -> Mapping[int, list[Meta]]: ...

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor | None]]: ...


class StreamedSource(WeightSource):  # type: ignore[misc]  # vLLM is not followed
    """Streams ``weights``, tensor by tensor; every trainer rank has one and iterates in step with the others.

    Ranks that do not send get None in place of each tensor.
    """

    def __init__(self, weights: NamedWeights) -> None:
        self._weights = weights

    def metadata(self) -> list[ParamMeta]:
        """Return name, dtype and shape of each tensor that iteration yields, in the same order."""
        return [ParamMeta(meta.name, meta.dtype, meta.shape) for meta in self._weights.metadata()]

    def tables(self) -> dict[int, Rows]:
        """Return the name table of each trainer rank that gets tensors, in the order of ranks."""
        destinations = self._weights.by_destination().items()
        return {rank: rows(TensorMeta.of(meta.name, meta) for meta in metas) for rank, metas in destinations}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        return iter(self._weights)
