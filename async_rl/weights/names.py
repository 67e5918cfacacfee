"""Hugging Face <-> Megatron parameter names, as tables that can be checked at a glance, and how tensors are cut.

Pure: knows torch and ``model_config``, neither Megatron nor vLLM. Loading and export both go by ``entries``,
so what one of them reads, the other writes, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from async_rl.model_config import ModelConfig

# Which Megatron layer specification the names are for: Megatron's own modules, or Transformer Engine's, which
# fold a norm into the projection behind it and keep a layer's experts in one grouped module.
Layout = Literal["local", "transformer_engine"]
Kind = Literal["same", "qkv", "gate_up"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: a Megatron parameter and the Hugging Face tensors it is made of.

    {M} and {H} stand for one layer in Megatron and Hugging Face, {E} for one expert of it.
    """

    local: str
    transformer_engine: str
    kind: Kind
    hf: tuple[str, ...]


_SAME = ""  # Transformer Engine uses the local name.

# fmt: off
BEFORE = (
    Row("embedding.word_embeddings.weight", _SAME, "same", ("model.embed_tokens.weight",)),
)
ATTENTION = (
    Row("{M}.input_layernorm.weight", "{M}.self_attention.linear_qkv.layer_norm_weight", "same",
        ("{H}.input_layernorm.weight",)),
    Row("{M}.self_attention.linear_qkv.weight", _SAME, "qkv",
        ("{H}.self_attn.q_proj.weight", "{H}.self_attn.k_proj.weight", "{H}.self_attn.v_proj.weight")),
    Row("{M}.self_attention.q_layernorm.weight", _SAME, "same", ("{H}.self_attn.q_norm.weight",)),
    Row("{M}.self_attention.k_layernorm.weight", _SAME, "same", ("{H}.self_attn.k_norm.weight",)),
    Row("{M}.self_attention.linear_proj.weight", _SAME, "same", ("{H}.self_attn.o_proj.weight",)),
)
DENSE_MLP = (
    Row("{M}.pre_mlp_layernorm.weight", "{M}.mlp.linear_fc1.layer_norm_weight", "same",
        ("{H}.post_attention_layernorm.weight",)),
    Row("{M}.mlp.linear_fc1.weight", _SAME, "gate_up",
        ("{H}.mlp.gate_proj.weight", "{H}.mlp.up_proj.weight")),
    Row("{M}.mlp.linear_fc2.weight", _SAME, "same", ("{H}.mlp.down_proj.weight",)),
)
MOE_MLP = (
    Row("{M}.pre_mlp_layernorm.weight", _SAME, "same", ("{H}.post_attention_layernorm.weight",)),
    Row("{M}.mlp.router.weight", _SAME, "same", ("{H}.mlp.gate.weight",)),
)
EXPERT = (
    Row("{M}.mlp.experts.local_experts.{E}.linear_fc1.weight", "{M}.mlp.experts.linear_fc1.weight{E}",
        "gate_up", ("{H}.mlp.experts.{E}.gate_proj.weight", "{H}.mlp.experts.{E}.up_proj.weight")),
    Row("{M}.mlp.experts.local_experts.{E}.linear_fc2.weight", "{M}.mlp.experts.linear_fc2.weight{E}", "same",
        ("{H}.mlp.experts.{E}.down_proj.weight",)),
)
AFTER = (
    Row("decoder.final_layernorm.weight", _SAME, "same", ("model.norm.weight",)),
)
UNTIED = (
    Row("output_layer.weight", _SAME, "same", ("lm_head.weight",)),
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Entry:
    """One Megatron parameter of a given model, and the Hugging Face tensors that make it, in order."""

    megatron: str
    kind: Kind
    hf: tuple[str, ...]


def entries(model: ModelConfig, layout: Layout) -> Iterator[Entry]:
    """Every parameter of the model, embedding first, layer by layer, output last: the order of export."""

    def fill(rows: Sequence[Row], layer: int = 0, expert: int = 0) -> Iterator[Entry]:
        words = {"M": f"decoder.layers.{layer}", "H": f"model.layers.{layer}", "E": expert}
        for row in rows:
            name = row.local if layout == "local" else row.transformer_engine or row.local
            yield Entry(name.format(**words), row.kind, tuple(hf.format(**words) for hf in row.hf))

    yield from fill(BEFORE)
    for layer in range(model.num_layers):
        yield from fill(ATTENTION, layer)
        if layer not in model.moe_layers:
            yield from fill(DENSE_MLP, layer)
            continue
        yield from fill(MOE_MLP, layer)
        for expert in range(model.num_experts):
            yield from fill(EXPERT, layer, expert)
    yield from fill(AFTER)
    if not model.tie_word_embeddings:
        yield from fill(UNTIED)


def ignored(model: ModelConfig, hf_name: str) -> bool:
    """Tensors that some checkpoints carry and that hold nothing of their own."""
    return hf_name.endswith("rotary_emb.inv_freq") or (model.tie_word_embeddings and hf_name == "lm_head.weight")


def hf_shapes(model: ModelConfig, kind: Kind, shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes of the Hugging Face tensors behind a Megatron parameter of ``shape``, without touching data."""
    if kind == "qkv":
        query, key = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        return [(query, shape[1]), (key, shape[1]), (key, shape[1])]
    if kind == "gate_up":
        return [(shape[0] // 2, shape[1])] * 2
    return [tuple(shape)]


def to_megatron(model: ModelConfig, kind: Kind, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Hugging Face tensors to the Megatron parameter they make."""
    return _MERGE[kind](model, tensors)


def to_hf(model: ModelConfig, kind: Kind, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The inverse of ``to_megatron``: contiguous tensors, views of the parameter where its layout allows."""
    return _SPLIT[kind](model, tensor)


def export(
    model: ModelConfig, parameters: Mapping[str, torch.Tensor], layout: Layout
) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) of the whole model, one Megatron parameter at a time."""
    for entry in entries(model, layout):
        tensors = to_hf(model, entry.kind, parameters[entry.megatron].detach())
        yield from zip(entry.hf, tensors, strict=True)


def write_checkpoint(weights: Iterable[tuple[str, torch.Tensor]], folder: Path, *, shard_bytes: int) -> None:
    """Write a folder's *.safetensors and their index, holding at most one shard in memory.

    Shards are numbered as they fill; the index comes last, so that a folder with an index is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    total = 0

    def flush() -> None:
        # All shards get the long form of the name: how many there will be is not known while streaming.
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        if shard and sum(t.numel() * t.element_size() for t in shard.values()) + size > shard_bytes:
            flush()
        shard[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
        total += size
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


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
    # Megatron keeps each key/value head beside the query heads it serves: for every group g of grouped-query
    # attention the rows are [queries of g | key of g | value of g], so that tensor parallelism can cut by
    # group.
    query, key, value = (t.reshape(model.num_kv_heads, -1, model.hidden_size) for t in tensors)
    return torch.cat([query, key, value], dim=1).reshape(-1, model.hidden_size)


def _split_qkv(model: ModelConfig, tensor: torch.Tensor) -> list[torch.Tensor]:
    queries = model.num_heads // model.num_kv_heads
    grouped = tensor.reshape(model.num_kv_heads, (queries + 2) * model.head_dim, model.hidden_size)
    sizes = [queries * model.head_dim, model.head_dim, model.head_dim]
    return [part.reshape(-1, model.hidden_size) for part in grouped.split(sizes, dim=1)]


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
