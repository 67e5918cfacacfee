"""Builds this rank's part of a Megatron GPTModel from a Hugging Face checkpoint folder.

Knows Megatron, the names in ``models.names`` and the device seam; knows nothing of Ray, vLLM or the loss. Call
``platform.activate`` and ``platform.init_distributed`` first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from safetensors import safe_open

from async_rl.config.schema import RunConfig
from async_rl.errors import ModelError
from async_rl.models import names
from async_rl.models.config import LatentAttention, ModelConfig, checkpoint_shards
from async_rl.trainer.megatron import platform
from async_rl.trainer.megatron.platform import Device
from async_rl.trainer.parallel import Place, expert_rank_of, stage_of

log = structlog.get_logger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(config: RunConfig, model: ModelConfig, device: Device) -> TransformerConfig:
    """Translate the model's shape and the run's settings into Megatron's configuration."""
    dtype = DTYPES[config.model.dtype]
    sizes = config.trainer.parallel
    settings: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.intermediate_size,
        "num_attention_heads": model.num_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        # The checkpoint overwrites every parameter, so none is initialized.
        "perform_initialization": False,
        "bias_dropout_fusion": False,
        # The loss is a sum, divided once by the global batch's count: Megatron must not average, neither over
        # microbatches nor over data-parallel ranks.
        "calculate_per_token_loss": True,
        "tensor_model_parallel_size": sizes.tp,
        "sequence_parallel": sizes.tp > 1,
        "pipeline_model_parallel_size": sizes.pp,
        "virtual_pipeline_model_parallel_size": sizes.vpp if sizes.vpp > 1 else None,
        # Microbatches are packed to different lengths, which the stages must then send each other.
        "variable_seq_lengths": sizes.pp > 1,
        # Two stages that are each other's next and previous cannot send both ways in one batch.
        "overlap_p2p_comm": sizes.vpp > 1,
        "batch_p2p_comm": sizes.vpp == 1,
        "context_parallel_size": sizes.cp,
        "expert_model_parallel_size": sizes.ep,
        "expert_tensor_parallel_size": sizes.etp,
        # With every expert and token on this rank, "allgather" gathers nothing and saves alltoall's second sort; it
        # refuses the pipeline's microbatches of different lengths.
        "moe_token_dispatcher_type": "allgather" if sizes.tp * sizes.ep * sizes.pp == 1 else "alltoall",
        **platform.model_overrides(device),
        **_recomputation(config),
    }
    if model.moe_layers:
        settings |= _experts(config, model)
    if model.latent is not None:
        return MLATransformerConfig(**settings, **_latent_attention(model, model.latent))
    return TransformerConfig(
        **settings,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        qk_layernorm=model.qk_norm,
        add_qkv_bias=model.qkv_bias,
    )


def _recomputation(config: RunConfig) -> dict[str, Any]:
    match config.trainer.recompute:
        case "full":
            return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        case "selective":
            return {
                "recompute_granularity": "selective",
                "recompute_modules": list(config.trainer.recompute_modules),
            }
    return {}


def _experts(config: RunConfig, model: ModelConfig) -> dict[str, Any]:
    return {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.moe_intermediate_size,
        "moe_layer_freq": [int(layer in model.moe_layers) for layer in range(model.num_layers)],
        "moe_shared_expert_intermediate_size": model.shared_intermediate_size or None,
        "moe_router_topk": model.top_k,
        "moe_router_score_function": model.score_function,
        # Renormalizing the k chosen probabilities is a softmax over the k chosen logits.
        "moe_router_pre_softmax": model.score_function == "softmax" and not model.norm_topk_prob,
        "moe_router_num_groups": model.num_groups or None,
        "moe_router_group_topk": model.group_top_k or None,
        "moe_router_topk_scaling_factor": model.scaling if model.scaling != 1.0 else None,
        # The bias balances load in pre-training. Here it stays as in the checkpoint, because the engine's does.
        "moe_router_enable_expert_bias": model.expert_bias,
        "moe_router_bias_update_rate": 0.0,
        # Engine and trainer must decide near-ties the same way, whatever the parameters' type.
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_enable_routing_replay": True,
        "moe_router_fusion": config.trainer.router_fusion,  # it bypasses replay: the settings' checks refuse the pair
    }


def _latent_attention(model: ModelConfig, latent: LatentAttention) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.key_value_rank,
        "qk_head_dim": latent.plain_dim,
        "qk_pos_emb_head_dim": latent.rotary_dim,
        "v_head_dim": latent.value_dim,
        "rotary_base": model.rope_theta,
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,  # Megatron scales the softmax by it for plain rotary embeddings too
        "apply_rope_fusion": False,
    }
    if (yarn := latent.yarn) is not None:
        settings |= {
            "rope_type": "yarn",
            "rotary_scaling_factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    return settings


def build(config: RunConfig, model: ModelConfig, device: Device, place: Place) -> list[DistributedDataParallel]:
    """Build this rank's part of the model with the checkpoint's weights.

    Returns one module per virtual pipeline chunk, each wrapped for gradient accumulation and data parallelism.
    """
    settings = transformer_config(config, model, device)
    sizes = place.sizes
    chunks = []
    for chunk in range(sizes.vpp):
        stage = chunk if sizes.vpp > 1 else None
        with platform.redirect_cuda_to(device):
            gpt = GPTModel(
                config=settings,
                transformer_layer_spec=platform.layer_spec(device, settings, stage),
                vocab_size=model.vocab_size,
                max_sequence_length=model.max_position_embeddings,
                pre_process=place.pp == 0 and chunk == 0,
                post_process=place.is_last_stage and chunk == sizes.vpp - 1,
                # Latent attention applies its rotary embedding itself.
                position_embedding_type="rope" if model.latent is None else "none",
                rotary_percent=model.rotary_fraction,
                rotary_base=model.rope_theta,  # annotated int, used as a float
                share_embeddings_and_output_weights=model.tie_word_embeddings,
                vp_stage=stage,
            )
        gpt.to(device=device, dtype=settings.params_dtype)
        platform.keep_float32(gpt)
        chunks.append(gpt)
    here = local_tensors(chunks, model, place, platform.layout(device))
    load_checkpoint(here, config.model.path, model, platform.layout(device))
    _mark(here)
    return [
        DistributedDataParallel(
            settings,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=device == "cuda", overlap_grad_reduce=False
            ),
            gpt,
            # Megatron's own choice for the chunks after the first: the step does not wait for their reduction.
            disable_bucketing=chunk > 0,
        )
        for chunk, gpt in enumerate(chunks)
    ]


def _mark(here: Sequence[LocalTensor]) -> None:
    """Mark the kind of each parameter for Megatron's gradient reduction and norm, where its modules do not.

    Megatron 0.16.1 sets the first two only where it initializes parameters itself. Transformer Engine 2.14.1 marks all
    linear layers as cut, and so the down-projections of latent attention, which every tensor-parallel rank has whole:
    each rank would add their gradient to the norm. Megatron takes experts that are not spread over ranks (ep 1) for
    dense parameters, whose gradients every tensor-parallel rank has whole; but it gives each of these ranks tokens of
    its own unless etp is tp.
    """
    for one in here:
        one.tensor.tensor_model_parallel = one.entry.cut != "whole"
        if one.entry.cut != "whole":
            one.tensor.partition_dim = names.AXIS[one.entry.cut]
        if one.entry.expert is not None:
            one.tensor.allreduce = False


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """A tensor of the model that this rank has, or a part of it."""

    entry: names.Entry
    """Its names in Megatron and in the checkpoint."""
    tensor: torch.Tensor
    """This rank's part, or the whole tensor."""
    part: int
    """The number of this rank's part, from 0."""
    parts: int
    """How many parts there are: 1 where each rank has it whole."""


def local_tensors(chunks: Sequence[Any], model: ModelConfig, place: Place, layout: names.Layout) -> list[LocalTensor]:
    """Return this rank's tensors in the order of the tables in ``models.names``.

    Raises ModelError where a chunk lacks a tensor of the tables, or has one that is not in them.
    """
    named = [dict(_tensors(chunk)) for chunk in chunks]
    missing, used = [], set()
    result = []
    for entry in names.entries(model, layout):
        for chunk, name in _where(entry, model, place):
            if name not in named[chunk]:
                missing.append(name)
                continue
            used.add((chunk, name))
            part, parts = (place.tp, place.sizes.tp) if entry.expert is None else (place.etp, place.sizes.etp)
            result.append(LocalTensor(entry, named[chunk][name], part, parts))
    unknown = [name for chunk, tensors in enumerate(named) for name in tensors if (chunk, name) not in used]
    if missing or unknown:
        raise ModelError(
            f"{model.architecture}: the name table and the built model differ: the model lacks {missing[:5]}, "
            f"the table {unknown[:5]}"
        )
    return result


def _tensors(chunk: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from chunk.named_parameters()
    for name, buffer in chunk.named_buffers():
        if name.endswith("router.expert_bias"):
            yield name, buffer


def _where(entry: names.Entry, model: ModelConfig, place: Place) -> Iterator[tuple[int, str]]:
    """Yield (chunk of this rank, name in it) for each tensor that an entry is loaded into; none if it is elsewhere."""
    sizes = place.sizes
    last_chunk = sizes.vpp - 1
    if entry.layer < 0:
        if place.pp == 0:
            yield 0, entry.name()
        if model.tie_word_embeddings and sizes.pp > 1 and place.is_last_stage:
            yield last_chunk, "output_layer.weight"  # the last stage's copy, kept equal by Megatron
    elif entry.layer == model.num_layers:
        if place.is_last_stage:
            yield last_chunk, entry.name()
    else:
        stage, chunk, layer = stage_of(model.num_layers, sizes, entry.layer)
        if stage != place.pp:
            return
        if entry.expert is None:
            yield chunk, entry.name(layer)
            return
        expert_rank, expert = expert_rank_of(model.num_experts, sizes, entry.expert)
        if expert_rank == place.ep:
            yield chunk, entry.name(layer, expert)


def load_checkpoint(here: Sequence[LocalTensor], path: Path, model: ModelConfig, layout: names.Layout) -> None:
    """Fill this rank's tensors from the folder's safetensors, one parameter at a time, reading nothing else.

    Raises ModelError that names the tensors which are missing, surplus, or of another shape than config.json says.
    """
    shards: list[Any] = [safe_open(shard, framework="pt") for shard in checkpoint_shards(path)]
    where = {name: shard for shard in shards for name in shard.keys()}  # noqa: SIM118  # not a dict
    faults = _faults(model, here, {name for entry in names.entries(model, layout) for name in entry.hf}, where)
    if faults:
        listed = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise ModelError(f"model.path {path}: weights do not fit config.json: {listed}")
    with torch.no_grad():
        for one in here:
            tensors = [
                names.part(one.entry, where[name].get_tensor(name), one.part, one.parts) for name in one.entry.hf
            ]
            one.tensor.copy_(names.to_megatron(model, one.entry.kind, tensors))
    log.info("weights_loaded", tensors=len(here), path=str(path))


def _faults(model: ModelConfig, here: Sequence[LocalTensor], known: set[str], where: dict[str, Any]) -> list[str]:
    faults = []
    for one in here:
        shapes = names.hf_shapes(model, one.entry, one.tensor.shape, one.parts)
        for name, shape in zip(one.entry.hf, shapes, strict=True):
            if name not in where:
                faults.append(f"{name} is missing")
            elif tuple(where[name].get_slice(name).get_shape()) != shape:
                faults.append(f"{name} is {where[name].get_slice(name).get_shape()}, expected {list(shape)}")
    faults += [f"{name} is surplus" for name in where if name not in known and not names.ignored(model, name)]
    return faults


def packed_seq_params(cu_seqlens: torch.Tensor, longest: int) -> PackedSeqParams:
    """Describe sequences that are packed back to back to Megatron; cu_seqlens int32[S + 1]."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
