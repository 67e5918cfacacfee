"""The fused router's names, which Megatron imports. ``moe_router_fusion`` would call them; it bypasses replay."""


def fused_topk_with_score_function(
    logits, topk, use_pre_softmax, num_groups, group_topk, scaling_factor, score_function, expert_bias
):
    raise NotImplementedError("the stand-in for Transformer Engine has no fused router")


def fused_compute_score_for_moe_aux_loss(logits, topk, score_function):
    raise NotImplementedError("the stand-in for Transformer Engine has no fused router")


def fused_moe_aux_loss(probs, tokens_per_expert, total_num_tokens, num_experts, topk, coeff):
    raise NotImplementedError("the stand-in for Transformer Engine has no fused router")
