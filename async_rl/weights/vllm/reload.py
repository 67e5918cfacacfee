"""Loads weights into a model that vLLM 0.30 serves: the first time as vLLM does it, then by what that first time did.

vLLM's layerwise reload finds out at each reload where every tensor belongs: it walks the model with each name, and runs
each weight loader once on empty tensors, in order to count what it loads, and then once more. The result is the same
each time. So the loader calls of the first reload are remembered, and made again with new tensors. What a layer does
with its weights, packing for example, remains vLLM's own ``_layerwise_process``.

The calls are repeated on CPU only, where it is measured and tested. A tensor that a loader got as a copy, and not as a
view of what was sent, has no place to be found again: then each reload is vLLM's whole one.
"""

from __future__ import annotations

import bisect
import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import vllm
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers

from async_rl.weights.vllm.head_repack import packed_without_weights, repack_tied
from async_rl.weights.vllm.moe_repack import VLLM_VERSION, forget_moe_kernels

Tensors = Sequence[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class _View:
    """A view of one of the tensors that were sent."""

    index: int
    offset: int
    """Elements between the first of the tensor and the first of the view."""
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, tensors: Tensors) -> torch.Tensor:
        tensor = tensors[self.index][1]
        if (self.size, self.stride, self.offset) == (tuple(tensor.shape), tensor.stride(), 0):
            return tensor
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of a weight loader: the parameter's name, its other arguments, and those that are sent tensors."""

    parameter: str
    signature: inspect.Signature
    others: dict[str, Any]
    views: dict[str, _View]

    def on(self, tensors: Tensors) -> inspect.BoundArguments:
        """Return the arguments with ``tensors`` in place of those that were sent then."""
        views = {name: view.of(tensors) for name, view in self.views.items()}
        return inspect.BoundArguments(self.signature, OrderedDict({**self.others, **views}))


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a reload did."""

    shapes: list[tuple[str, torch.dtype, tuple[int, ...]]]
    calls: list[tuple[torch.nn.Module, list[_Call]]]
    """By layer, in the order in which layers were complete."""
    tied: dict[str, Any]
    """Layers with a packed copy of the weights of another."""
    deriving: list[Any]
    """Layers that may derive something from the weights of others: attention."""


class Reload:
    """Loads whole sets of weights into one model."""

    def __init__(self, model: torch.nn.Module, model_config: Any) -> None:
        self._model = model
        self._model_config = model_config
        self._plan: _Plan | None = None

    def load(self, tensors: Tensors) -> None:
        """Load ``tensors``, named as in a checkpoint, all that the model has. Raises WeightSyncError."""
        forget_moe_kernels(self._model)
        plan, self._plan = self._plan, None  # after a fault vLLM's own way is taken
        with torch.no_grad():
            if plan is not None and plan.shapes == _shapes(tensors):
                self._repeat(plan, tensors)
                self._plan = plan
            else:
                self._plan = self._load_as_vllm(tensors)

    def _load_as_vllm(self, tensors: Tensors) -> _Plan | None:
        with _recorded() as calls:
            layerwise.initialize_layerwise_reload(self._model)
            self._model.load_weights(tensors)
            tied = packed_without_weights(self._model)
            layerwise.finalize_layerwise_reload(self._model, self._model_config)
        repack_tied(self._model, tied)
        return _plan(self._model, tensors, calls, tied)

    def _repeat(self, plan: _Plan, tensors: Tensors) -> None:
        for layer, calls in plan.calls:
            info = layerwise.get_layerwise_info(layer)
            info.kernel_tensors = get_layer_params_buffers(layer)
            info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
            restore_layer_on_meta(layer, info)
            for call in calls:
                info.loaded_weights.append((call.parameter, call.on(tensors)))
            layerwise._layerwise_process(layer, info)
        for layer in plan.deriving:
            layer.process_weights_after_loading(self._model_config.dtype)
        repack_tied(self._model, plan.tied)


Recorded = list[tuple[torch.nn.Module, list[tuple[str, Any]]]]


@contextlib.contextmanager
def _recorded() -> Iterator[Recorded]:
    """Note the loader calls of each layer that vLLM completes meanwhile."""
    calls: Recorded = []
    process = layerwise._layerwise_process

    def noted(layer: torch.nn.Module, info: Any) -> None:
        calls.append((layer, list(info.loaded_weights)))
        process(layer, info)

    layerwise._layerwise_process = noted
    try:
        yield calls
    finally:
        layerwise._layerwise_process = process


def _plan(model: torch.nn.Module, tensors: Tensors, recorded: Recorded, tied: dict[str, Any]) -> _Plan | None:
    """Return how to repeat these calls with other tensors; None where that is not known."""
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    deriving = [layer for layer in model.modules() if layerwise.is_deferred_attention_layer(layer)]
    loaded = any(layer is other for layer, _ in recorded for other in deriving)  # scales, of a quantized cache
    if not on_cpu or loaded or not vllm.__version__.startswith(VLLM_VERSION):
        return None
    where = _Where(tensors)
    calls: list[tuple[torch.nn.Module, list[_Call]]] = []
    seen: set[int] = set()
    for layer, loads in recorded:
        of_layer = []
        for parameter, arguments in loads:
            views = {}
            for name, value in arguments.arguments.items():
                if name == "param" or not isinstance(value, torch.Tensor):
                    continue
                if (view := where.find(value)) is None:
                    return None
                views[name] = view
                seen.add(view.index)
            # In their order; vLLM sets the parameter, which is made for each load.
            gone = {"param", *views}
            others = {name: None if name in gone else value for name, value in arguments.arguments.items()}
            of_layer.append(_Call(parameter, arguments.signature, others, views))
        calls.append((layer, of_layer))
    return _Plan(_shapes(tensors), calls, tied, deriving) if len(seen) == len(tensors) else None


class _Where:
    """Finds the tensor that a view belongs to."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._starts = sorted((tensor.data_ptr(), index) for index, (_, tensor) in enumerate(tensors) if tensor.numel())

    def find(self, view: torch.Tensor) -> _View | None:
        place = bisect.bisect_right(self._starts, (view.data_ptr(), len(self._tensors))) - 1
        if place < 0:
            return None
        start, index = self._starts[place]
        tensor = self._tensors[index][1]
        offset, rest = divmod(view.data_ptr() - start, tensor.itemsize)
        last = offset + sum((n - 1) * step for n, step in zip(view.shape, view.stride(), strict=True))
        if rest or view.dtype != tensor.dtype or not tensor.is_contiguous() or last >= tensor.numel():
            return None
        return _View(index, offset, tuple(view.shape), view.stride())


def _shapes(tensors: Tensors) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]
