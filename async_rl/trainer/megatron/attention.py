"""Provides attention for Megatron's local layer specification: causal, over packed sequences of different lengths.

Megatron's own DotProductAttention pads to one length; Transformer Engine's needs a GPU. This one calls torch's fused
attention once per sequence, so that no token attends across a border and nothing is padded. Knows Megatron's module
interface, nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class PackedAttention(MegatronModule):  # type: ignore[misc]  # Megatron has no types
    """Core attention for Megatron's ``thd`` layout of packed sequences."""

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
        """Attend: query [T, heads, D], key and value [T, kv_heads, D], output [T, heads * D]."""
        del attention_mask, attn_mask_type, attention_bias  # Megatron passes them; causal masks need only the lengths
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        group = parallel_state.get_context_parallel_group()
        if group.size() == 1:
            parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
            return torch.cat([self._attend(q, k, v) for q, k, v in parts]).flatten(1)
        return self._context_parallel(query, key, value, lengths, group).flatten(1)

    def _context_parallel(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], group: Any
    ) -> torch.Tensor:
        """Attend to sequences of which every rank has two of 2 x ranks parts; ``lengths`` are of the whole sequences.

        The two are an early part and the late one that mirrors it (``trainer.parallel.context_rows``). Keys and values
        are gathered, queries stay.
        """
        ranks, rank = group.size(), group.rank()
        # [T / ranks, heads, D] of every rank, in the order of the ranks.
        keys, values = (
            gather_from_sequence_parallel_region(tensor, group=group).chunk(ranks) for tensor in (key, value)
        )
        outputs = []
        start = 0
        for length in lengths:
            half = length // (2 * ranks)
            spans = [slice(start, start + half), slice(start + half, start + 2 * half)]
            start += 2 * half
            # The early parts of rank 0, 1, ..., then the late ones of ..., 1, 0: the sequence in its order.
            k, v = (
                torch.cat(
                    [side[r][spans[0]] for r in range(ranks)] + [side[r][spans[1]] for r in reversed(range(ranks))]
                )
                for side in (keys, values)
            )
            for span, part in zip(spans, (rank, 2 * ranks - 1 - rank), strict=True):
                seen = (part + 1) * half
                outputs.append(self._attend(query[span], k[:seen], v[:seen]))
        return torch.cat(outputs)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend from the last n of m positions: queries [n, heads, D], keys and values [m, kv_heads, D]."""
        mask = None
        if len(query) != len(key):
            mask = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device).tril(len(key) - len(query))
        # [n, heads, D] -> [1, heads, n, D], the layout that the fused kernel takes without a copy
        output = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            key.transpose(0, 1).unsqueeze(0),
            value.transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        result: torch.Tensor = output.squeeze(0).transpose(0, 1)
        return result


class LatentAttention(MLASelfAttention):  # type: ignore[misc]
    """Megatron's latent attention with whole down-projections on every tensor-parallel rank.

    Transformer Engine's specification has them whole too. Megatron 0.16.1's local specification cuts them instead, and
    then loses part of the gradient of the rotary key: each rank keeps that of its own heads.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        config = self.config
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = _WholeLinear(config, config.q_lora_rank)
        self.linear_kv_down_proj = _WholeLinear(config, config.kv_lora_rank + config.qk_pos_emb_head_dim)


class _WholeLinear(torch.nn.Module):  # type: ignore[misc]  # torch has no types here
    """A projection of this rank's part of the hidden states, with the whole weight on every rank."""

    def __init__(self, config: TransformerConfig, output_size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, config.hidden_size, dtype=config.params_dtype))
        # Megatron sums this parameter's gradient over the tensor-parallel ranks if they split the sequence.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the projection, and None for the bias that Megatron's linear layers return separately."""
        return F.linear(x, self.weight), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the weight for Megatron's distributed checkpointing."""
        del metadata  # it is for parameters that are cut
        state = self.state_dict(keep_vars=True)
        result: dict[str, Any] = make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)
        return result
