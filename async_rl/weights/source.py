"""The trainer's weights as vLLM sees them: a WeightSource of (Hugging Face name, tensor), tensor by tensor.

Knows the table in ``names`` and vLLM's weight-transfer base class, not Megatron: it gets named parameters.
Importing this module imports part of vLLM (about 3.5 s and 270 MiB without an engine), so the trainer does so
only when asked for a source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from async_rl.model_config import ModelConfig
from async_rl.weights import names


class MegatronWeightSource(WeightSource):  # type: ignore[misc]  # vLLM is not followed
    """Streams a model's parameters under their Hugging Face names.

    Tensors are views of the live parameters where Megatron's layout allows and copies of one parameter
    otherwise, so a pass needs memory for one parameter, and a consumer must be done with a tensor before the
    next optimizer step.
    """

    def __init__(self, model: ModelConfig, parameters: Mapping[str, torch.nn.Parameter], layout: names.Layout) -> None:
        self._model = model
        self._parameters = parameters
        self._layout = layout

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and shape of everything that iteration yields, in the same order."""
        return [
            ParamMeta(name, parameter.dtype, shape)
            for entry in names.entries(self._model, self._layout)
            for parameter in [self._parameters[entry.megatron]]
            for name, shape in zip(entry.hf, names.hf_shapes(self._model, entry.kind, parameter.shape), strict=True)
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return names.export(self._model, self._parameters, self._layout)
