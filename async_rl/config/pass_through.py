"""Which fields of Megatron and the engines trainer.megatron, trainer.ddp and rollout.engine_args may not set, and why.

A field that one of our settings decides is refused with the name of that setting, and so is one that would make trainer
and engine compute different functions. ``doctor.pass_through`` knows which fields there are at all. Knows only the tree
that it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from async_rl.config.schema import RunConfig

# For each section: why -> the fields that it decides.
Reasons = Mapping[str, str]

_SHAPE = "config.json of model.path decides it"
_SAME = "the trainer must compute what the engine does"
_OURS = "this trainer's own schedule and loss decide it"

MEGATRON: Reasons = {
    _SHAPE: """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization
        layernorm_epsilon layernorm_zero_centered_gamma gated_linear_unit activation_func activation_func_clamp_value
        glu_linear_offset add_bias_linear add_qkv_bias qk_layernorm qk_l2_norm rotary_interleaved window_size
        window_attn_skip_freq num_moe_experts moe_ffn_hidden_size moe_layer_freq moe_shared_expert_intermediate_size
        moe_shared_expert_gate moe_router_topk moe_router_score_function moe_router_pre_softmax moe_router_num_groups
        moe_router_group_topk moe_router_topk_scaling_factor moe_router_enable_expert_bias multi_latent_attention
        q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rotary_base rotary_percent rope_type
        rotary_scaling_factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim no_rope_freq
        attention_output_gate softmax_scale softmax_type moe_latent_size apply_residual_connection_post_layernorm
        experimental_attention_variant linear_attention_freq heterogeneous_block_specs is_hybrid_model mrope_section""",
    _SAME: """hidden_dropout attention_dropout moe_input_jitter_eps moe_expert_capacity_factor moe_token_dropping
        moe_pad_expert_input_to_capacity moe_token_drop_policy moe_router_dtype moe_router_force_load_balancing
        moe_router_bias_update_rate moe_router_topk_limited_devices moe_apply_probs_on_input qk_clip""",
    _OURS: """calculate_per_token_loss variable_seq_lengths perform_initialization init_method
        output_layer_init_method embedding_init_method init_model_with_meta_device moe_router_load_balancing_type
        moe_aux_loss_coeff moe_z_loss_coeff mtp_num_layers mtp_loss_scaling_factor mtp_standalone
        finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func param_sync_func timers
        cross_entropy_loss_fusion num_microbatches_with_partial_activation_checkpoints
        hybrid_context_parallel max_seqlen_per_dp_cp_rank
        transformer_impl delay_wgrad_compute overlap_moe_expert_parallel_comm defer_embedding_wgrad_compute
        moe_router_padding_for_quantization moe_router_padding_for_fp8""",
    "trainer.parallel.tp decides it": "tensor_model_parallel_size sequence_parallel",
    "trainer.parallel.pp decides it": "pipeline_model_parallel_size",
    "trainer.parallel.vpp decides it": "virtual_pipeline_model_parallel_size microbatch_group_size_per_vp_stage",
    "trainer.parallel.layers_per_stage decides it": """pipeline_model_parallel_layout num_layers_in_first_pipeline_stage
        num_layers_in_last_pipeline_stage account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split""",
    "trainer.parallel.cp decides it": "context_parallel_size hierarchical_context_parallel_sizes",
    "trainer.parallel.ep decides it": "expert_model_parallel_size",
    "trainer.parallel.etp decides it": "expert_tensor_parallel_size moe_extended_tp",
    "model.dtype decides it": "params_dtype pipeline_dtype bf16 fp16 enable_autocast autocast_dtype",
    "trainer.recompute decides it": "recompute_granularity moe_layer_recompute",
    "trainer.recompute_method decides it": "recompute_method",
    "trainer.recompute_num_layers decides it": "recompute_num_layers",
    "trainer.recompute_modules decides it": "recompute_modules",
    "trainer.offload_activations decides it": "fine_grained_activation_offloading offload_modules",
    "trainer.router_replay decides it": "moe_enable_routing_replay",
    "trainer.router_fusion decides it": "moe_router_fusion",
    "trainer.moe_dispatcher decides it": "moe_token_dispatcher_type moe_enable_deepep",
    "resources.device decides it": "use_cpu_initialization",
}

DDP: Reasons = {
    "trainer.optimizer.gradient_dtype decides it": "grad_reduce_in_fp32",
    "resources.device decides it": "use_distributed_optimizer",
    _OURS: "average_in_collective gradient_reduce_div_fusion num_distributed_optimizer_instances delay_wgrad_compute",
    "a weight sync, a checkpoint and the canary read every rank's weights right after an update": """
        overlap_param_gather align_param_gather fp8_param_gather reuse_grad_buf_for_mxfp8_param_ag""",
    "checkpoints and weight syncs know each rank's part of a parameter by trainer.parallel alone": """
        use_megatron_fsdp use_custom_fsdp data_parallel_sharding_strategy outer_dp_sharding_strategy fsdp_double_buffer
        suggested_communication_unit_size preserve_fp32_weights keep_fp8_transpose_cache fsdp_manual_registration""",
    "trainer ranks have expandable segments of memory (PYTORCH_CUDA_ALLOC_CONF), which it does not allow": """nccl_ub
        disable_symmetric_registration""",
}

VLLM: Reasons = {
    "model.path decides it": """model model_weights served_model_name tokenizer hf_config_path revision code_revision
        tokenizer_revision tokenizer_mode skip_tokenizer_init config_format runner convert download_dir""",
    "model.trust_remote_code decides it": "trust_remote_code",
    "rollout.dtype decides it": "dtype",
    "rollout.quantization decides it": "quantization quantization_config",
    "rollout.kv_cache_dtype decides it": "kv_cache_dtype",
    "seed decides it": "seed",
    "data.max_prompt_tokens and rollout.max_response_tokens decide it": "max_model_len",
    "rollout.max_num_seqs decides it": "max_num_seqs",
    "rollout.max_num_batched_tokens decides it": "max_num_batched_tokens",
    "rollout.tensor_parallel_size decides it": "tensor_parallel_size",
    "rollout.gpu_memory_utilization decides it": "gpu_memory_utilization",
    "rollout.kv_cache_bytes decides it": "kv_cache_memory_bytes",
    "rollout.enforce_eager decides it": "enforce_eager",
    "rollout.return_routed_experts decides it": "enable_return_routed_experts",
    "rollout.temperature and the other sampling settings decide it": """generation_config override_generation_config
        return_sampling_mask""",
    "behaviour log-probs are of the distribution that was sampled from": "logprobs_mode",
    "sync.backend decides it": "weight_transfer_config worker_extension_cls worker_cls",
    "metrics.engine decides it": "disable_log_stats",
    "the routed experts of a sequence are not returned with it": """pipeline_parallel_size kv_transfer_config
        kv_events_config kv_offloading_size kv_offloading_backend ec_transfer_config ec_manager_config
        decode_context_parallel_size prefill_context_parallel_size""",
    "expert ids must be those of the checkpoint": "enable_eplb eplb_config enable_elastic_ep expert_placement_strategy",
    "rollout.data_parallel_size decides it": """data_parallel_size data_parallel_rank data_parallel_start_rank
        data_parallel_size_local data_parallel_address
        data_parallel_rpc_port data_parallel_hybrid_lb data_parallel_external_lb data_parallel_multi_port_external_lb
        data_parallel_backend""",
    "rollout.hosts_per_engine decides it": """nnodes node_rank master_addr master_port
        distributed_executor_backend""",
    "Ray and resources.numa place the engine": "numa_bind numa_bind_nodes numa_bind_cpus device_ids",
    "resources.device decides it": "device",
}

SGLANG: Reasons = {
    "model.path decides it": "model_path tokenizer_path served_model_name skip_tokenizer_init revision",
    "model.trust_remote_code decides it": "trust_remote_code",
    "rollout.dtype decides it": "dtype",
    "seed decides it": "random_seed",
    "data.max_prompt_tokens and rollout.max_response_tokens decide it": "context_length",
    "rollout.max_num_seqs decides it": "max_running_requests",
    "rollout.max_num_batched_tokens decides it": "chunked_prefill_size",
    "rollout.tensor_parallel_size decides it": "tp_size",
    "rollout.gpu_memory_utilization decides it": "mem_fraction_static",
    "rollout.kv_cache_bytes decides it": "max_total_tokens",
    "rollout.return_routed_experts decides it": "enable_return_routed_experts",
    "the weight sync decides it": "weight_version custom_weight_loader",
    "its engines are loaded with the weights that the trainer sends, as they are": """quantization
        quantization_param_path kv_cache_dtype""",
    "a step under old weights may else be stamped with the new version": "disable_overlap_schedule",
    "metrics.engine decides it": "enable_metrics",
    "the run waits for the server, as long as watchdog.abort_s says": "skip_server_warmup",
    "the routed experts of a sequence are not returned with it": """pp_size disaggregation_mode
        enable_hierarchical_cache""",
    "expert ids must be those of the checkpoint": "enable_eplb ep_num_redundant_experts init_expert_location",
    "an engine is one server on one host, and rollout.replicas says how many there are": """dp_size enable_dp_attention
        nnodes node_rank dist_init_addr""",
    "this run starts the server, and alone calls it": """host port api_key admin_api_key log_level sleep_on_idle
        incremental_streaming_output json_model_override_args""",
    "resources.device decides it": "device",
}


def why_refused(reasons: Reasons) -> dict[str, str]:
    """Return the reason for each field that is refused."""
    return {name: why for why, names in reasons.items() for name in names.split()}


def check_pass_through(config: RunConfig) -> None:
    """Raise ValueError for fields that our settings decide, naming these."""
    _refuse("trainer.megatron", config.trainer.megatron, MEGATRON)
    _refuse("trainer.ddp", config.trainer.ddp, DDP)
    arguments, engines = config.rollout.engine_args, config.rollout.engine_names
    if not arguments:
        return
    if len(engines) > 1:
        raise ValueError(
            f"rollout.engine_args is set, but rollout.engines has engines of several kinds ({', '.join(engines)}), "
            "whose arguments have other names; remove it, or have one kind of engine"
        )
    if engines[0] in ("vllm", "sglang"):
        _refuse("rollout.engine_args", arguments, VLLM if engines[0] == "vllm" else SGLANG)
    if engines[0] == "sglang" and (off := [name for name, value in arguments.items() if value is False]):
        raise ValueError(
            f"rollout.engine_args.{off[0]} is false, but a flag of SGLang's server can only be given; remove it"
        )


def _refuse(section: str, given: Mapping[str, Any], reasons: Reasons) -> None:
    refused = why_refused(reasons)
    for name, value in given.items():
        if name in refused:
            raise ValueError(f"{section}.{name} is {value!r}, but {refused[name]}; remove it from {section}")
