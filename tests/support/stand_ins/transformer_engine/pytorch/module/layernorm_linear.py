"""A norm and the linear layer after it, as one module."""

from collections.abc import Callable
from typing import Any

import torch

from transformer_engine.pytorch.module.base import constant
from transformer_engine.pytorch.module.linear import ParallelLinear
from transformer_engine.pytorch.module.norms import normalize


class LayerNormLinear(ParallelLinear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: Any = None,
        zero_centered_gamma: bool = False,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        assert normalization in ("LayerNorm", "RMSNorm"), "Unsupported normalization type!"
        if parallel_mode == "row":
            raise NotImplementedError("Normalization does not support tensor-parallel distribution.")
        self.eps = eps
        self.normalization = normalization
        # In the order of the real one: the norm's parameters come first.
        dtype = torch.get_default_dtype() if params_dtype is None else params_dtype

        def vector() -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(in_features, device=device, dtype=dtype))

        self.register_parameter("layer_norm_weight", vector(), init_fn=constant(1.0))
        if normalization == "LayerNorm":
            self.register_parameter("layer_norm_bias", vector(), init_fn=constant(0.0))
        else:
            self.layer_norm_bias = None
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
                "return_layernorm_output": return_layernorm_output or return_layernorm_output_gathered,
                "zero_centered_gamma": zero_centered_gamma,
                "delay_wgrad_compute": delay_wgrad_compute,
                "symmetric_ar_type": symmetric_ar_type,
            },
        )
        self.reset_parameters()

    def reset_parameters(self, defer_init=False):
        super().reset_parameters(defer_init=defer_init)
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        if self.layer_norm_bias is not None:
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel

    def forward(
        self,
        inp: torch.Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ):
        inp = self.prepare_forward(inp)
        return self._product(normalize(self.normalization, inp, self.layer_norm_weight, self.layer_norm_bias, self.eps))
