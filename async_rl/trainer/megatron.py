"""Builds a Megatron GPTModel from a Hugging Face checkpoint folder.

Knows Megatron, the names in ``weights.names`` and the device seam; nothing of Ray, vLLM or the loss. Before
anything here is called, ``platform.activate`` and ``platform.init_distributed`` have run.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors import safe_open

from async_rl.config import RunConfig
from async_rl.errors import ModelError
from async_rl.model_config import ModelConfig, checkpoint_shards
from async_rl.trainer import platform
from async_rl.trainer.platform import Device
from async_rl.weights import names

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(config: RunConfig, model: ModelConfig, device: Device) -> TransformerConfig:
    """The model's shape and the run's settings in Megatron's words."""
    dtype = DTYPES[config.model.dtype]
    experts: dict[str, Any] = {}
    if model.moe_layers:
        experts = {
            "num_moe_experts": model.num_experts,
            "moe_ffn_hidden_size": model.moe_intermediate_size,
            "moe_layer_freq": [int(layer in model.moe_layers) for layer in range(model.num_layers)],
            "moe_router_topk": model.top_k,
            # Renormalizing the k chosen probabilities is a softmax over the k chosen logits.
            "moe_router_pre_softmax": not model.norm_topk_prob,
            # Near-ties must fall the same way in engine and trainer, whatever the parameters' type.
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_enable_routing_replay": True,
            "moe_router_fusion": config.trainer.router_fusion,  # it bypasses replay: the config refuses the pair
            # With every expert on this rank, "allgather" gathers nothing and saves alltoall's second sort.
            "moe_token_dispatcher_type": "allgather",
        }
    recompute: dict[str, Any] = {}
    if config.trainer.recompute == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # The checkpoint overwrites every parameter, so none is initialized.
        perform_initialization=False,
        bias_dropout_fusion=False,
        # The loss arrives as a sum already divided by the global token count: Megatron must not average
        # again, neither over microbatches nor over data-parallel ranks.
        calculate_per_token_loss=True,
        **experts,
        **recompute,
        **platform.model_overrides(device),
    )


def build(config: RunConfig, model: ModelConfig, device: Device) -> DistributedDataParallel:
    """The model with the checkpoint's weights, wrapped for gradient accumulation and data parallelism."""
    settings = transformer_config(config, model, device)
    gpt = GPTModel(
        config=settings,
        transformer_layer_spec=platform.layer_spec(device, settings),
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,  # annotated int, used as a float
        share_embeddings_and_output_weights=model.tie_word_embeddings,
    )
    gpt.to(device=device, dtype=settings.params_dtype)
    load_checkpoint(gpt, config.model.path, model, platform.layout(device))
    return DistributedDataParallel(
        settings,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=device == "cuda", overlap_grad_reduce=False
        ),
        gpt,
    )


def load_checkpoint(gpt: torch.nn.Module, path: Path, model: ModelConfig, layout: names.Layout) -> None:
    """Fill the parameters from the folder's safetensors, one parameter at a time.

    Raises ModelError that names every tensor which is missing, surplus, or of another shape than config.json
    says.
    """
    parameters = dict(gpt.named_parameters())
    table = list(names.entries(model, layout))
    unknown = set(parameters) ^ {entry.megatron for entry in table}
    if unknown:
        raise ModelError(f"model.path {path}: the name table and the built model differ in {sorted(unknown)[:5]}")
    shards: list[Any] = [safe_open(shard, framework="pt") for shard in checkpoint_shards(path)]
    where = {name: shard for shard in shards for name in shard.keys()}  # noqa: SIM118  # not a dict
    faults = _faults(model, table, parameters, where)
    if faults:
        listed = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise ModelError(f"model.path {path}: weights do not fit config.json: {listed}")
    with torch.no_grad():
        for entry in table:
            tensors = [where[name].get_tensor(name) for name in entry.hf]
            parameters[entry.megatron].copy_(names.to_megatron(model, entry.kind, tensors))
    logger.info("loaded %d parameters from %s", len(table), path)


def _faults(
    model: ModelConfig, table: list[names.Entry], parameters: dict[str, Any], where: dict[str, Any]
) -> list[str]:
    faults = []
    for entry in table:
        shapes = names.hf_shapes(model, entry.kind, parameters[entry.megatron].shape)
        for name, shape in zip(entry.hf, shapes, strict=True):
            if name not in where:
                faults.append(f"{name} is missing")
            elif tuple(where[name].get_slice(name).get_shape()) != shape:
                faults.append(f"{name} is {where[name].get_slice(name).get_shape()}, expected {list(shape)}")
    known = {name for entry in table for name in entry.hf}
    faults += [f"{name} is surplus" for name in where if name not in known and not names.ignored(model, name)]
    return faults


def packed(cu_seqlens: torch.Tensor, longest: int) -> PackedSeqParams:
    """Megatron's description of sequences packed back to back; cu_seqlens int32[sequences + 1]."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
