"""Translates settings into Megatron's configuration objects of the model and of data parallelism.

What Megatron offers beyond the named settings is in trainer.megatron and trainer.ddp; ``config.upstream`` says which of
its names are refused there, because a setting of ours decides them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from async_rl.config.fields import Dtype
from async_rl.config.memory_checks import first_for_gpus, refusal_on_cpu
from async_rl.config.schema import RunConfig
from async_rl.config.training import ParallelSection
from async_rl.errors import TrainerError
from async_rl.models.config import LatentAttention, ModelConfig
from async_rl.trainer.megatron import platform
from async_rl.trainer.megatron.platform import Device

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(config: RunConfig, model: ModelConfig, device: Device) -> TransformerConfig:
    """Translate the model's shape and the run's settings into Megatron's configuration.

    Raises TrainerError for a setting that works on GPUs alone, on a CPU.
    """
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    if device == "cpu" and (found := first_for_gpus(config)) is not None:
        raise TrainerError(f"{found[0]} is {refusal_on_cpu(found)}; set it to {found[2]}")
    kind = TransformerConfig if model.latent is None else MLATransformerConfig
    return kind(**(transformer_settings(config, model, device) | config.trainer.megatron))


def transformer_settings(config: RunConfig, model: ModelConfig, device: Device) -> dict[str, Any]:
    """Return what the model's shape and the named settings say of Megatron's configuration, by its names."""
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
        "pipeline_model_parallel_layout": _stages(model, sizes),
        # Microbatches are packed to different lengths, which the stages must then send each other.
        "variable_seq_lengths": sizes.pp > 1,
        # Two stages that are each other's next and previous cannot send both ways in one batch.
        "overlap_p2p_comm": sizes.vpp > 1,
        "batch_p2p_comm": sizes.vpp == 1,
        # What a stage has sent has no use but its place in the graph.
        "deallocate_pipeline_outputs": sizes.pp > 1,
        "context_parallel_size": sizes.cp,
        "expert_model_parallel_size": sizes.ep,
        "expert_tensor_parallel_size": sizes.etp,
        "moe_token_dispatcher_type": _dispatcher(config),
        **platform.model_overrides(device, latent=model.latent is not None),
        **_recomputation(config),
    }
    if config.trainer.offload_activations:
        settings |= {
            "fine_grained_activation_offloading": True,
            "offload_modules": list(config.trainer.offload_activations),
        }
    if model.moe_layers:
        settings |= _experts(config, model)
    if model.latent is not None:
        return settings | _latent_attention(model, model.latent)
    return settings | {
        "num_query_groups": model.num_kv_heads,
        "kv_channels": model.head_dim,
        "qk_layernorm": model.qk_norm,
        "add_qkv_bias": model.qkv_bias,
    }


def ddp_config(config: RunConfig, device: Device) -> DistributedDataParallelConfig:
    """Translate the settings of gradients and their reduction."""
    from megatron.core.distributed import DistributedDataParallelConfig

    return DistributedDataParallelConfig(**(ddp_settings(config, device) | config.trainer.ddp))


def ddp_settings(config: RunConfig, device: Device) -> dict[str, Any]:
    """Return what the named settings say of gradients and their reduction, by Megatron's names."""
    sizes = config.trainer.parallel
    return {
        "grad_reduce_in_fp32": config.trainer.optimizer.gradient_dtype == "float32",
        "use_distributed_optimizer": device == "cuda",
        "overlap_grad_reduce": device == "cuda" and sizes.dp * sizes.cp > 1,
    }


def _dispatcher(config: RunConfig) -> str:
    """Return Megatron's name of how tokens get to their experts."""
    sizes = config.trainer.parallel
    if config.trainer.moe_dispatcher != "auto":
        return config.trainer.moe_dispatcher
    # With every expert and token on this rank, "allgather" gathers nothing and saves alltoall's second sort; it refuses
    # the pipeline's microbatches of different lengths.
    return "allgather" if sizes.tp * sizes.ep * sizes.pp == 1 else "alltoall"


def _stages(model: ModelConfig, sizes: ParallelSection) -> list[list[str]] | None:
    """Return what each virtual stage has, in Megatron's words; None for Megatron's own even split."""
    counts = sizes.stage_layers(model.num_layers)
    if len(set(counts)) == 1:
        return None
    stages = [["decoder"] * count for count in counts]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def _recomputation(config: RunConfig) -> dict[str, Any]:
    match config.trainer.recompute:
        case "full":
            return {
                "recompute_granularity": "full",
                "recompute_method": config.trainer.recompute_method,
                "recompute_num_layers": config.trainer.recompute_num_layers,
            }
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
