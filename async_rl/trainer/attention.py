"""Causal attention over packed sequences of different lengths, for Megatron's local layer specification.

Megatron's own DotProductAttention pads to one length; Transformer Engine's needs a GPU. This one calls
torch's fused attention once per sequence, so that no token attends across a border and nothing is padded.
Knows Megatron's module interface, nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class PackedAttention(MegatronModule):  # type: ignore[misc]  # Megatron has no types
    """Core attention for ``thd`` inputs: query [T, heads, D], key and value [T, kv_heads, D]; output [T, heads * D]."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise NotImplementedError(f"layer {layer_number}: only causal self-attention, not {attn_mask_type}")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams,
    ) -> torch.Tensor:
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        outputs = [
            # [n, heads, D] -> [1, heads, n, D], the layout that the fused kernel takes without a copy
            F.scaled_dot_product_attention(
                q.transpose(0, 1).unsqueeze(0),
                k.transpose(0, 1).unsqueeze(0),
                v.transpose(0, 1).unsqueeze(0),
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            .squeeze(0)
            .transpose(0, 1)
            for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        ]
        return torch.cat(outputs).flatten(1)
