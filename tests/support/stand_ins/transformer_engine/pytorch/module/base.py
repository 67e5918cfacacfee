"""What every layer has: the state of FP8, which checkpoints carry although it is empty, and its parameters' marks."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch


def get_dummy_wgrad(shape: list, dtype: torch.dtype, zero=False) -> torch.Tensor:
    raise NotImplementedError("the stand-in for Transformer Engine accumulates no gradients into main_grad itself")


def divide(numerator: int, denominator: int) -> int:
    assert numerator % denominator == 0, f"{numerator} is not divisible by {denominator}"
    return numerator // denominator


class TransformerEngineBaseModule(torch.nn.Module):
    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.name = name
        self.fp8 = False
        self.fp8_calibration = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.tp_group = None
        self.tp_size = 1
        self.sequence_parallel = False
        self.activation_dtype: torch.dtype | None = None
        self._initializers: dict[str, tuple[Callable | None, Callable | None]] = {}

    def register_parameter(self, name, param, init_fn=None, get_rng_state_tracker=None) -> None:
        super().register_parameter(name, param)
        self._initializers.setdefault(name, (init_fn, get_rng_state_tracker))

    def reset_parameters(self, defer_init: bool | None = False) -> None:
        if defer_init:
            raise NotImplementedError("the stand-in for Transformer Engine builds nothing on the device meta")
        for name, parameter in self.named_parameters(recurse=False):
            initialize, tracker = self._initializers[name]
            name = getattr(self, "rng_tracker_name", None)
            # Megatron's own tracker, which it passes once a seed is set.
            states = contextlib.nullcontext() if tracker is None else tracker().fork(*filter(None, [name]))
            with states:
                (initialize or _default_initializer)(parameter)

    def set_tensor_parallel_group(self, tp_group: Any) -> None:
        self.tp_group = tp_group

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        self.fp8_meta["fp8_checkpoint"] = False

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        if state is not None and state.numel():
            raise NotImplementedError("the stand-in for Transformer Engine has no FP8")

    def _set_tensor_parallel_size(self, tp_group: Any, tp_size: int) -> None:
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        if tp_group is not None or tp_size == 1:
            self.set_tensor_parallel_group(tp_group)

    def prepare_forward(self, inp: torch.Tensor) -> torch.Tensor:
        """Refuse what the real one refuses: another type than the parameters', tensor parallelism without a group."""
        if self.tp_size > 1 and self.tp_group is None:
            raise RuntimeError("Tensor parallel group not initialized.")
        for name, parameter in self.named_parameters():
            if parameter.dtype != inp.dtype:
                raise TypeError(f"Data types for parameters must match: {inp.dtype} and {name} {parameter.dtype}")
        self.activation_dtype = inp.dtype
        return inp.contiguous()


def _default_initializer(parameter: torch.Tensor) -> None:
    torch.nn.init.normal_(parameter, mean=0.0, std=0.023)


def constant(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda parameter: torch.nn.init.constant_(parameter, value)
