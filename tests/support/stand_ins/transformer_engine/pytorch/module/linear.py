"""Linear layers, whole or cut by columns or rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear as product

from transformer_engine.pytorch.distributed import (
    AllReduce,
    GatherAlongFirstDim,
    ReduceScatterAlongFirstDim,
    SumGradient,
    set_tensor_model_parallel_attributes,
)
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule, constant, divide


class ParallelLinear(TransformerEngineBaseModule):
    """What Linear and LayerNormLinear share: weight, bias, and the collectives around the product."""

    def _make_linear(
        self,
        in_features,
        out_features,
        *,
        tp_group,
        tp_size,
        sequence_parallel,
        parallel_mode,
        bias,
        return_bias,
        params_dtype,
        device,
        init_method,
        get_rng_state_tracker,
        unsupported,
    ):
        for name, value in unsupported.items():
            if value:
                raise NotImplementedError(f"the stand-in for Transformer Engine has no {name}")
        assert parallel_mode in (None, "column", "row"), parallel_mode
        params_dtype = torch.get_default_dtype() if params_dtype is None else params_dtype
        self._set_tensor_parallel_size(tp_group, tp_size)
        self.parallel_mode = parallel_mode
        self.in_features = divide(in_features, self.tp_size) if parallel_mode == "row" else in_features
        self.out_features = divide(out_features, self.tp_size) if parallel_mode == "column" else out_features
        self.sequence_parallel = (self.tp_size > 1) and sequence_parallel
        self.use_bias = bias
        self.return_bias = return_bias
        self.apply_bias = bias and not return_bias
        self.register_parameter(
            "weight",
            torch.nn.Parameter(torch.empty(self.out_features, self.in_features, device=device, dtype=params_dtype)),
            init_fn=init_method,
            get_rng_state_tracker=get_rng_state_tracker,
        )
        if bias:
            self.register_parameter(
                "bias",
                torch.nn.Parameter(torch.empty(self.out_features, device=device, dtype=params_dtype)),
                init_fn=constant(0.0),
            )
        else:
            self.bias = torch.Tensor().to(dtype=params_dtype, device=device)

    def reset_parameters(self, defer_init=False):
        super().reset_parameters(defer_init=defer_init)
        # Also where no dimension is cut: the real one does not ask.
        dim = 1 if self.parallel_mode == "row" else 0
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=dim, stride=1)
        if self.use_bias and self.parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel
        elif self.use_bias and self.parallel_mode == "column":
            set_tensor_model_parallel_attributes(self.bias, True, 0, 1)

    def _product(self, inp: torch.Tensor):
        assert inp.shape[-1] == self.in_features, "GEMM not possible"
        # Communication follows the mode: without one, each rank computes by itself.
        if self.parallel_mode == "column" and self.sequence_parallel:
            inp = GatherAlongFirstDim.apply(inp, self.tp_group)
        elif self.parallel_mode == "column" and self.tp_size > 1:
            inp = SumGradient.apply(inp, self.tp_group)
        out = product(inp, self.weight)
        if self.parallel_mode == "row" and self.tp_size > 1:
            collective = ReduceScatterAlongFirstDim if self.sequence_parallel else AllReduce
            out = collective.apply(out, self.tp_group)
        if self.apply_bias:
            out = out + self.bias
        return (out, self.bias) if self.return_bias else out


class Linear(ParallelLinear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.save_original_input = save_original_input
        self.rng_tracker_name = rng_tracker_name
        self._make_linear(
            in_features,
            out_features,
            tp_group=tp_group,
            tp_size=tp_size,
            sequence_parallel=sequence_parallel,
            parallel_mode=parallel_mode,
            bias=bias,
            return_bias=return_bias,
            params_dtype=params_dtype,
            device=device,
            init_method=init_method,
            get_rng_state_tracker=get_rng_state_tracker,
            unsupported={
                "fuse_wgrad_accumulation": fuse_wgrad_accumulation,
                "parameters_split": parameters_split,
                "overlap": ub_overlap_ag or ub_overlap_rs or ub_overlap_rs_dgrad or ub_bulk_dgrad or ub_bulk_wgrad,
                "delay_wgrad_compute": delay_wgrad_compute,
                "symmetric_ar_type": symmetric_ar_type,
            },
        )
        self.reset_parameters()

    def forward(
        self,
        inp: torch.Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ):
        return self._product(self.prepare_forward(inp))
