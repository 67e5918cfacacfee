"""Attention over packed sequences (``thd``), causal; with context parallelism each rank has two parts of a sequence."""

import math
from collections.abc import Callable
from typing import Any

import torch

from transformer_engine.pytorch.distributed import GatherAlongFirstDim
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule


class DotProductAttention(TransformerEngineBaseModule):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
    ) -> None:
        super().__init__()
        if attention_dropout or window_size or softmax_type != "vanilla" or return_max_logit:
            raise NotImplementedError("the stand-in's attention has no dropout, windows, sinks or largest logits")
        if cp_comm_type != "p2p" or attention_type != "self":
            raise NotImplementedError(f"the stand-in's attention has no {cp_comm_type}, {attention_type}")
        self._set_tensor_parallel_size(tp_group, tp_size)
        sizes = (kv_channels, kv_channels) if isinstance(kv_channels, int) else kv_channels
        self.hidden_size_per_attention_head_k, self.hidden_size_per_attention_head_v = sizes
        self.num_attention_heads = num_attention_heads
        self.num_gqa_groups_per_partition = (num_gqa_groups or num_attention_heads) // self.tp_size
        self.softmax_scale = 1.0 / math.sqrt(sizes[0]) if softmax_scale is None else softmax_scale
        self.layer_number = layer_number
        self.cp_group = cp_group
        self.cp_comm_type = cp_comm_type

        # An older checkpoint may lack this state, as the real one allows.
        def forgive(_module, incompatible_keys):
            for key in incompatible_keys.missing_keys:
                if "core_attention._extra_state" in key:
                    incompatible_keys.missing_keys.remove(key)

        self.register_load_state_dict_post_hook(forgive)

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: Any = None,
        qkv_format: str | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: torch.Tensor | None = None,
        cu_seqlens_kv_padded: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool | None = False,
        num_splits: int | None = 1,
    ) -> torch.Tensor:
        """Attend: query [T, heads, D], key [T, kv_heads, D], value [T, kv_heads, V], output [T, heads x V]."""
        self._check(query_layer, key_layer, value_layer)
        assert (qkv_format, attn_mask_type) == ("thd", "padding_causal"), (qkv_format, attn_mask_type)
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32, "cu_seqlens must be int32"
        assert cu_seqlens_q_padded is cu_seqlens_kv_padded is None
        lengths = cu_seqlens_q.diff()
        assert int(lengths.max()) <= max_seqlen_q == max_seqlen_kv, "a sequence is longer than the longest"
        ranks, rank = (1, 0) if self.cp_group is None else (self.cp_group.size(), self.cp_group.rank())
        assert not (lengths % (2 * ranks)).any() or ranks == 1, "sequences must divide into 2 parts per rank"
        keys, values = key_layer, value_layer
        if ranks > 1:
            keys, values = (GatherAlongFirstDim.apply(tensor, self.cp_group) for tensor in (keys, values))
        assert len(query_layer) == int(lengths.sum()) // ranks, "rows outside of all sequences have no attention"
        # The sequence and the place in it of each row: of this rank's queries, and of the keys in gathered order.
        mine = _places(lengths.tolist(), ranks, rank)
        theirs = torch.cat([_places(lengths.tolist(), ranks, other) for other in range(ranks)])
        outputs = []
        for sequence in range(len(lengths)):
            rows, seen = (torch.nonzero(places[:, 0] == sequence).flatten() for places in (mine, theirs))
            mask = mine[rows, 1][:, None] >= theirs[seen, 1][None, :]
            outputs.append(self._attend(query_layer[rows], keys[seen], values[seen], mask))
        return torch.cat(outputs).flatten(1)

    def _check(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        assert query.dtype == key.dtype == value.dtype, "Queries, keys and values must have the same data type!"
        assert query.ndim == key.ndim == value.ndim == 3, "must be 3D tensors when qkv_format = thd!"
        assert key.shape[:-1] == value.shape[:-1]
        assert query.shape[-1] == key.shape[-1] == self.hidden_size_per_attention_head_k
        assert value.shape[-1] == self.hidden_size_per_attention_head_v
        assert key.shape[-2] == self.num_gqa_groups_per_partition

    def _attend(self, query, key, value, mask) -> torch.Tensor:
        """query [N, heads, D], key [M, kv_heads, D], value [M, kv_heads, V], mask [N, M] -> [N, heads, V]."""
        group = query.shape[1] // key.shape[1]
        key, value = (tensor.float().repeat_interleave(group, dim=1) for tensor in (key, value))
        scores = torch.einsum("nhd,mhd->hnm", query.float(), key) * self.softmax_scale
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return torch.einsum("hnm,mhv->nhv", weights, value).to(query.dtype)


def _places(lengths: list[int], ranks: int, rank: int) -> torch.Tensor:
    """Return int64[T / ranks, 2]: the sequence of each row of a rank, and its place there."""
    result = []
    for sequence, length in enumerate(lengths):
        places = torch.arange(length)
        if ranks > 1:
            parts = places.chunk(2 * ranks)
            places = torch.cat([parts[rank], parts[2 * ranks - 1 - rank]])
        result.append(torch.stack([torch.full_like(places, sequence), places], dim=1))
    return torch.cat(result)
