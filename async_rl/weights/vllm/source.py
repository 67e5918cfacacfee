"""The trainer's weights in the form that vLLM's weight transfer takes: a WeightSource over a stream of named tensors.

Knows vLLM's weight-transfer base class, not Megatron. Importing this module imports part of vLLM (about 3.5 s and
270 MiB without an engine), so the trainer does so only when asked for a source.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from async_rl.models.names import Meta


class NamedWeights(Protocol):
    """A stream of named tensors in the order of its metadata, such as ``trainer.export.Weights``."""

    def metadata(self) -> list[Meta]: ...

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

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        return iter(self._weights)
