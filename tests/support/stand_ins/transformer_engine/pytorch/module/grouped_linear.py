"""One linear layer for each of several groups of rows: a layer's experts."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear as product

from transformer_engine.pytorch.distributed import set_tensor_model_parallel_attributes
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule, divide


class GroupedLinear(TransformerEngineBaseModule):
    def __init__(
        self,
        num_gemms: int,
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
        device: torch.device | str = "cuda",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if bias or fuse_wgrad_accumulation or delay_wgrad_compute:
            raise NotImplementedError("the stand-in's GroupedLinear has one weight per group, and nothing beside")
        if ub_overlap_rs or ub_overlap_ag:
            raise ValueError("GroupedLinear doesn't support Userbuffer overlap.")
        assert parallel_mode in (None, "column", "row"), parallel_mode
        self.num_gemms = num_gemms
        self.use_bias = bias
        self.return_bias = return_bias
        self.save_original_input = save_original_input
        self.rng_tracker_name = rng_tracker_name
        self._set_tensor_parallel_size(tp_group, tp_size)
        self.parallel_mode = parallel_mode
        # It only computes the shapes: the dispatcher of tokens communicates.
        self.in_features = divide(in_features, self.tp_size) if parallel_mode == "row" else in_features
        self.out_features = divide(out_features, self.tp_size) if parallel_mode == "column" else out_features
        for group in range(num_gemms):
            self.register_parameter(
                f"weight{group}",
                torch.nn.Parameter(torch.empty(self.out_features, self.in_features, device=device, dtype=params_dtype)),
                init_fn=init_method,
                get_rng_state_tracker=get_rng_state_tracker,
            )
            setattr(self, f"bias{group}", torch.Tensor().to(dtype=params_dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self, defer_init=False):
        super().reset_parameters(defer_init=defer_init)
        for group in range(self.num_gemms):
            dim = 1 if self.parallel_mode == "row" else 0
            set_tensor_model_parallel_attributes(getattr(self, f"weight{group}"), True, dim, 1)

    def forward(self, inp: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None):
        if not all(isinstance(size, int) for size in m_splits):
            raise TypeError(f"m_splits must be a list of integers, not {m_splits}")
        if len(m_splits) != self.num_gemms:
            raise ValueError(f"{len(m_splits)} splits for {self.num_gemms} groups")
        inp = self.prepare_forward(inp)
        weights = (getattr(self, f"weight{group}") for group in range(self.num_gemms))
        return torch.cat([product(rows, weight) for rows, weight in zip(inp.split(m_splits), weights, strict=True)])
