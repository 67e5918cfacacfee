"""Hugging Face and Megatron parameter names, as tables that can be checked at a glance, and how tensors are cut.

Pure: knows torch and ``ModelConfig``, neither Megatron nor vLLM. Loading and export both use ``entries``,
so that export writes what loading read, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open

from async_rl.models.config import ModelConfig

# The Megatron layer specification that names belong to: Megatron's own modules, or Transformer Engine's, which
# fold a norm into the projection after it and keep a layer's experts in one grouped module.
Layout = Literal["local", "transformer_engine"]
Kind = Literal["same", "qkv", "gate_up"]
# How tensor parallelism cuts the Hugging Face tensors: by rows (dimension 0), by columns (1), or not at all.
Cut = Literal["rows", "columns", "whole"]
AXIS: dict[Cut, int] = {"rows": 0, "columns": 1}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: a Megatron parameter and the Hugging Face tensors that make it.

    {M} and {H} stand for one layer in Megatron and Hugging Face, {E} for one expert of it.
    """

    local: str
    transformer_engine: str
    kind: Kind
    cut: Cut
    hf: tuple[str, ...]


_SAME = ""  # Transformer Engine uses the local name.

# fmt: off
BEFORE = (
    Row("embedding.word_embeddings.weight", _SAME, "same", "rows", ("model.embed_tokens.weight",)),
)
ATTENTION = (
    Row("{M}.input_layernorm.weight", "{M}.self_attention.linear_qkv.layer_norm_weight", "same", "whole",
        ("{H}.input_layernorm.weight",)),
    Row("{M}.self_attention.linear_qkv.weight", _SAME, "qkv", "rows",
        ("{H}.self_attn.q_proj.weight", "{H}.self_attn.k_proj.weight", "{H}.self_attn.v_proj.weight")),
    Row("{M}.self_attention.linear_proj.weight", _SAME, "same", "columns", ("{H}.self_attn.o_proj.weight",)),
)
QKV_BIAS = (
    Row("{M}.self_attention.linear_qkv.bias", _SAME, "qkv", "rows",
        ("{H}.self_attn.q_proj.bias", "{H}.self_attn.k_proj.bias", "{H}.self_attn.v_proj.bias")),
)
QK_NORM = (
    Row("{M}.self_attention.q_layernorm.weight", _SAME, "same", "whole", ("{H}.self_attn.q_norm.weight",)),
    Row("{M}.self_attention.k_layernorm.weight", _SAME, "same", "whole", ("{H}.self_attn.k_norm.weight",)),
)
LATENT_QUERY = (
    Row("{M}.input_layernorm.weight", _SAME, "same", "whole", ("{H}.input_layernorm.weight",)),
    Row("{M}.self_attention.linear_q_proj.weight", _SAME, "same", "rows", ("{H}.self_attn.q_proj.weight",)),
)
LATENT_COMPRESSED_QUERY = (
    Row("{M}.input_layernorm.weight", _SAME, "same", "whole", ("{H}.input_layernorm.weight",)),
    Row("{M}.self_attention.linear_q_down_proj.weight", _SAME, "same", "whole", ("{H}.self_attn.q_a_proj.weight",)),
    Row("{M}.self_attention.q_layernorm.weight", "{M}.self_attention.linear_q_up_proj.layer_norm_weight",
        "same", "whole", ("{H}.self_attn.q_a_layernorm.weight",)),
    Row("{M}.self_attention.linear_q_up_proj.weight", _SAME, "same", "rows", ("{H}.self_attn.q_b_proj.weight",)),
)
LATENT_KEY_VALUE = (
    Row("{M}.self_attention.linear_kv_down_proj.weight", _SAME, "same", "whole",
        ("{H}.self_attn.kv_a_proj_with_mqa.weight",)),
    Row("{M}.self_attention.kv_layernorm.weight", "{M}.self_attention.linear_kv_up_proj.layer_norm_weight",
        "same", "whole", ("{H}.self_attn.kv_a_layernorm.weight",)),
    Row("{M}.self_attention.linear_kv_up_proj.weight", _SAME, "same", "rows", ("{H}.self_attn.kv_b_proj.weight",)),
    Row("{M}.self_attention.linear_proj.weight", _SAME, "same", "columns", ("{H}.self_attn.o_proj.weight",)),
)
DENSE_MLP = (
    Row("{M}.pre_mlp_layernorm.weight", "{M}.mlp.linear_fc1.layer_norm_weight", "same", "whole",
        ("{H}.post_attention_layernorm.weight",)),
    Row("{M}.mlp.linear_fc1.weight", _SAME, "gate_up", "rows",
        ("{H}.mlp.gate_proj.weight", "{H}.mlp.up_proj.weight")),
    Row("{M}.mlp.linear_fc2.weight", _SAME, "same", "columns", ("{H}.mlp.down_proj.weight",)),
)
MOE_MLP = (
    Row("{M}.pre_mlp_layernorm.weight", _SAME, "same", "whole", ("{H}.post_attention_layernorm.weight",)),
    Row("{M}.mlp.router.weight", _SAME, "same", "whole", ("{H}.mlp.gate.weight",)),
)
EXPERT_BIAS = (
    Row("{M}.mlp.router.expert_bias", _SAME, "same", "whole", ("{H}.mlp.gate.e_score_correction_bias",)),
)
SHARED_EXPERT = (
    Row("{M}.mlp.shared_experts.linear_fc1.weight", _SAME, "gate_up", "rows",
        ("{H}.mlp.shared_experts.gate_proj.weight", "{H}.mlp.shared_experts.up_proj.weight")),
    Row("{M}.mlp.shared_experts.linear_fc2.weight", _SAME, "same", "columns",
        ("{H}.mlp.shared_experts.down_proj.weight",)),
)
EXPERT = (
    Row("{M}.mlp.experts.local_experts.{E}.linear_fc1.weight", "{M}.mlp.experts.linear_fc1.weight{E}",
        "gate_up", "rows", ("{H}.mlp.experts.{E}.gate_proj.weight", "{H}.mlp.experts.{E}.up_proj.weight")),
    Row("{M}.mlp.experts.local_experts.{E}.linear_fc2.weight", "{M}.mlp.experts.linear_fc2.weight{E}",
        "same", "columns", ("{H}.mlp.experts.{E}.down_proj.weight",)),
)
MIXTRAL_MLP = (
    Row("{M}.pre_mlp_layernorm.weight", _SAME, "same", "whole", ("{H}.post_attention_layernorm.weight",)),
    Row("{M}.mlp.router.weight", _SAME, "same", "whole", ("{H}.block_sparse_moe.gate.weight",)),
)
MIXTRAL_EXPERT = (
    Row("{M}.mlp.experts.local_experts.{E}.linear_fc1.weight", "{M}.mlp.experts.linear_fc1.weight{E}",
        "gate_up", "rows",
        ("{H}.block_sparse_moe.experts.{E}.w1.weight", "{H}.block_sparse_moe.experts.{E}.w3.weight")),
    Row("{M}.mlp.experts.local_experts.{E}.linear_fc2.weight", "{M}.mlp.experts.linear_fc2.weight{E}",
        "same", "columns", ("{H}.block_sparse_moe.experts.{E}.w2.weight",)),
)
AFTER = (
    Row("decoder.final_layernorm.weight", _SAME, "same", "whole", ("model.norm.weight",)),
)
UNTIED = (
    Row("output_layer.weight", _SAME, "same", "rows", ("lm_head.weight",)),
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Entry:
    """One Megatron parameter of a given model, and the Hugging Face tensors that make it."""

    pattern: str
    """Megatron's name, with {M} and {E} as in ``Row``."""
    kind: Kind
    """How the tensors are merged."""
    cut: Cut
    """How tensor parallelism cuts them."""
    layer: int
    """Number of the layer; -1 before the layers, the model's number of layers after them."""
    expert: int | None
    """Number of the expert; None for a parameter outside of experts."""
    hf: tuple[str, ...]
    """Names of the Hugging Face tensors, in the order in which they are merged."""

    def name(self, layer: int | None = None, expert: int | None = None) -> str:
        """Return Megatron's name of the parameter; layer and expert may have other numbers on this rank."""
        return self.pattern.format(
            M=f"decoder.layers.{self.layer if layer is None else layer}", E=self.expert if expert is None else expert
        )


@dataclass(frozen=True, slots=True)
class Meta:
    """The description of a checkpoint's tensor, without its data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def entries(model: ModelConfig, layout: Layout) -> Iterator[Entry]:
    """Yield every parameter of the model in the order of export: embedding, layer by layer, output."""

    def fill(rows: Sequence[Row], layer: int, expert: int | None = None) -> Iterator[Entry]:
        for row in rows:
            pattern = row.local if layout == "local" else row.transformer_engine or row.local
            hf = tuple(name.format(H=f"model.layers.{layer}", E=expert) for name in row.hf)
            yield Entry(pattern, row.kind, row.cut, layer, expert, hf)

    yield from fill(BEFORE, -1)
    for layer in range(model.num_layers):
        for rows in _attention(model):
            yield from fill(rows, layer)
        if layer not in model.moe_layers:
            yield from fill(DENSE_MLP, layer)
            continue
        mixtral = model.architecture == "MixtralForCausalLM"
        yield from fill(MIXTRAL_MLP if mixtral else MOE_MLP, layer)
        if model.expert_bias:
            yield from fill(EXPERT_BIAS, layer)
        if model.shared_intermediate_size:
            yield from fill(SHARED_EXPERT, layer)
        for expert in range(model.num_experts):
            yield from fill(MIXTRAL_EXPERT if mixtral else EXPERT, layer, expert)
    yield from fill(AFTER, model.num_layers)
    if not model.tie_word_embeddings:
        yield from fill(UNTIED, model.num_layers)


def _attention(model: ModelConfig) -> list[tuple[Row, ...]]:
    if model.latent is not None:
        return [LATENT_QUERY if model.latent.query_rank is None else LATENT_COMPRESSED_QUERY, LATENT_KEY_VALUE]
    return [ATTENTION, *([QKV_BIAS] if model.qkv_bias else []), *([QK_NORM] if model.qk_norm else [])]


def ignored(model: ModelConfig, hf_name: str) -> bool:
    """Return whether a tensor of a checkpoint is not built: a copy, or of a layer that predicts further tokens."""
    return (
        hf_name.endswith("rotary_emb.inv_freq")
        or (model.tie_word_embeddings and hf_name == "lm_head.weight")
        or of_extra_layer(model, hf_name)
    )


def of_extra_layer(model: ModelConfig, hf_name: str) -> bool:
    """Return whether a tensor belongs to a layer past the last: never built, and exported unchanged."""
    return hf_name.startswith(tuple(f"model.layers.{model.num_layers + n}." for n in range(model.extra_layers)))


def extra_layers(model: ModelConfig, shards: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of the layers past the last from a checkpoint's files."""
    for shard in shards if model.extra_layers else ():
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                if of_extra_layer(model, name):
                    yield name, file.get_tensor(name)


def hf_shapes(model: ModelConfig, entry: Entry, shape: Sequence[int], parts: int = 1) -> list[tuple[int, ...]]:
    """Return the shapes of the whole Hugging Face tensors that make a Megatron parameter, without reading data.

    ``shape`` is that of one of the ``parts`` which tensor parallelism cuts the parameter into.
    """
    if entry.kind == "qkv":
        rows = [model.num_heads * model.head_dim, *[model.num_kv_heads * model.head_dim] * 2]
        return [(count, *shape[1:]) for count in rows]
    if entry.kind == "gate_up":
        return [(shape[0] * parts // 2, *shape[1:])] * 2
    return [tuple(size * parts if axis == AXIS.get(entry.cut) else size for axis, size in enumerate(shape))]


def part(entry: Entry, tensor: torch.Tensor, index: int, parts: int) -> torch.Tensor:
    """Return the piece of a Hugging Face tensor that makes part ``index`` of ``parts`` of the Megatron parameter."""
    return tensor if entry.cut == "whole" else tensor.chunk(parts, dim=AXIS[entry.cut])[index]


def join(entry: Entry, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join all pieces of one Hugging Face tensor to the whole; the inverse of ``part``."""
    return pieces[0] if entry.cut == "whole" or len(pieces) == 1 else torch.cat(list(pieces), dim=AXIS[entry.cut])


def to_megatron(model: ModelConfig, kind: Kind, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Merge Hugging Face tensors, or one rank's pieces of them, to the Megatron parameter that they make."""
    return _MERGE[kind](model, tensors)


def to_hf(model: ModelConfig, kind: Kind, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Split a Megatron parameter into Hugging Face tensors, as views if possible; the inverse of ``to_megatron``."""
    return _SPLIT[kind](model, tensor)


def _merge_same(_: ModelConfig, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    (tensor,) = tensors
    return tensor


def _split_same(_: ModelConfig, tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor]


def _merge_gate_up(_: ModelConfig, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    gate, up = tensors  # each [F, H]; Megatron's gated MLP takes the gate from the first half
    return torch.cat([gate, up])


def _split_gate_up(_: ModelConfig, tensor: torch.Tensor) -> list[torch.Tensor]:
    gate, up = tensor.chunk(2)
    return [gate, up]


def _merge_qkv(model: ModelConfig, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    # Megatron keeps each key/value head next to the query heads it serves: for every group g of grouped-query
    # attention the rows are [queries of g | key of g | value of g], so that tensor parallelism can cut by
    # group. A bias is laid out as the weight's rows are.
    groups = tensors[1].shape[0] // model.head_dim
    parts = [tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in tensors]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _split_qkv(model: ModelConfig, tensor: torch.Tensor) -> list[torch.Tensor]:
    queries = model.num_heads // model.num_kv_heads
    grouped = tensor.reshape(-1, (queries + 2) * model.head_dim, *tensor.shape[1:])
    sizes = [queries * model.head_dim, model.head_dim, model.head_dim]
    return [part.flatten(0, 1) for part in grouped.split(sizes, dim=1)]


_MERGE: dict[Kind, Callable[[ModelConfig, Sequence[torch.Tensor]], torch.Tensor]] = {
    "same": _merge_same,
    "gate_up": _merge_gate_up,
    "qkv": _merge_qkv,
}
_SPLIT: dict[Kind, Callable[[ModelConfig, torch.Tensor], list[torch.Tensor]]] = {
    "same": _split_same,
    "gate_up": _split_gate_up,
    "qkv": _split_qkv,
}
