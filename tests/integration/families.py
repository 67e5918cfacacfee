"""Tiny random checkpoints of the model families that the trainer supports, and what ``transformers`` makes of them.

    make("mixtral", folder)        a folder as one downloads it, with published tensor names
    reference(folder, sequences)   log-probs, routing and gradients, float32 on the CPU

Knows torch and transformers, and imports them only when asked; knows nothing of async_rl.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

VOCAB, LAYERS, EXPERTS = 256, 4, 8

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    # transformers takes 1e-6 for the norms inside latent attention whatever config.json says, vLLM does not.
    "rms_norm_eps": 1e-6,
    # A tensor cannot be told from its transpose by its shape where sizes are alike: head_dim x heads is not hidden_size.
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
# vLLM's attention on a CPU takes heads of 32 and more.
_GROUPED = {"num_key_value_heads": 2, "head_dim": 32}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SIGMOID = {
    **_EXPERTS,
    "n_routed_experts": EXPERTS,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 40,
    # 32 together: so vLLM can compute it as ordinary attention (VLLM_MLA_DISABLE=1) on a CPU.
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    # transformers assumes these two; published checkpoints state them, and vLLM asks.
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


def qwen3(**changes):
    """Qwen3 (dense), embeddings tied as in its small models."""
    from transformers import Qwen3Config

    return Qwen3Config(
        **{**_SHAPE, **_GROUPED, "tie_word_embeddings": True, "rope_parameters": _rope(1e6), **changes}
    )


def qwen3_moe(**changes):
    """Qwen3-30B-A3B."""
    from transformers import Qwen3MoeConfig

    own = {"num_experts": EXPERTS, "norm_topk_prob": True, "rope_parameters": _rope(1e6)}
    return Qwen3MoeConfig(**{**_SHAPE, **_GROUPED, **_EXPERTS, **own, **changes})


def mixtral(**changes):
    """Mixtral-8x7B."""
    from transformers import MixtralConfig

    own = {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "rope_parameters": _rope(1e6),
    }
    return MixtralConfig(**{**_SHAPE, **_GROUPED, **own, **changes})


def moonlight(**changes):
    """Moonlight-16B-A3B: DeepSeek-V3 without compressed queries, yarn and groups of experts."""
    from transformers import DeepseekV3Config

    own = {
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.446,
        "rope_parameters": _rope(50000.0),
    }
    return DeepseekV3Config(**{**_SHAPE, **_SIGMOID, **_LATENT, **own, **changes})


def deepseek_v3(**changes):
    """DeepSeek-V3. Sequences of more than 64 tokens are where yarn has stretched positions."""
    from transformers import DeepseekV3Config

    yarn = {"factor": 8.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
    own = {
        "q_lora_rank": 48,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        # Twice topk_group, as published; the trainer takes nothing else.
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 2.5,
        "rope_parameters": _rope(10000.0, rope_type="yarn", beta_fast=32, beta_slow=1, **yarn),
    }
    return DeepseekV3Config(**{**_SHAPE, **_SIGMOID, **_LATENT, **own, **changes})


def glm4_moe(**changes):
    """GLM-4.5, which has norms of queries and keys; GLM-4.5-Air is the same without (use_qk_norm=False)."""
    from transformers import Glm4MoeConfig

    own = {
        "attention_bias": True,
        "use_qk_norm": True,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "rope_parameters": _rope(1e6, partial_rotary_factor=0.5),
    }
    return Glm4MoeConfig(**{**_SHAPE, **_GROUPED, **_SIGMOID, **own, **changes})


def _rope(theta, rope_type="default", **more):
    return {"rope_type": rope_type, "rope_theta": theta, **more}


# Each takes keys of config.json that shall be otherwise, and returns the configuration of transformers.
FAMILIES: dict[str, Callable] = {
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "moonlight": moonlight,
    "deepseek_v3": deepseek_v3,
    "glm4_moe": glm4_moe,
}
DENSE = ("qwen3",)


def make(name, folder, seed=0, **changes) -> Path:
    """Save a checkpoint of which no parameter or buffer is trivial; ``changes`` to keys of its config.json.

    Matrices keep the size of what goes through them, so that log-probs and experts differ from token to token.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(FAMILIES[name](**changes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict(keep_vars=True)  # without inv_freq, which is computed and not saved
    with torch.no_grad():
        for key, tensor in saved.items():
            if key == "lm_head.weight" and model.config.tie_word_embeddings:
                continue
            if "norm" in key:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.dim() == 1:
                # Biases. That of the choice of experts is added to scores of 0.2 standard deviation.
                tensor.normal_(0.0, 0.2, generator=generator)
            else:
                tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)
    # transformers holds the experts of a layer in one tensor, and writes the published names: one tensor for each.
    model.save_pretrained(folder)
    return Path(folder)


class Reference(NamedTuple):
    """What transformers computes, per sequence of N tokens, L MoE layers, K experts per token.

    logprobs: float32[N-1] of tokens 1..N-1. routing: int32[N-1, L, K], the experts of positions 0..N-2, in no order
    that means anything; [N-1, 0, 0] of a dense model. weights: float32[N-1]. gradients: float32, by published name, of
    -sum of weight x log-prob over all sequences; e_score_correction_bias has none.
    """

    logprobs: list[np.ndarray]
    routing: list[np.ndarray]
    weights: list[np.ndarray]
    gradients: dict[str, np.ndarray]


def token_weights(sequences, seed=0) -> list[np.ndarray]:
    """float32[N-1] per sequence, of both signs, so that no gradient is that of a mean."""
    rng = np.random.default_rng(seed)
    return [rng.uniform(-1.0, 1.0, len(ids) - 1).astype(np.float32) for ids in sequences]


def reference(folder, sequences, seed=0) -> Reference:
    """``seed``: of the weights in the loss whose gradients are returned."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    # Eager experts, because the grouped kernel has been seen to be off by 1e-4 on a CPU now and then.
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager"
    ).eval()
    chosen, executed = _watch_experts(model)
    found = Reference([], [], token_weights(sequences, seed), {})
    for ids, weights in zip(sequences, found.weights, strict=True):
        chosen.clear(), executed.clear()
        tokens = torch.from_numpy(np.asarray(ids)).long()
        logits = model(tokens[None, :-1], use_cache=False).logits[0]
        logprobs = logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        (-(logprobs * torch.from_numpy(weights)).sum()).backward()
        assert len(chosen) == len(executed) and all(map(torch.equal, chosen, executed))
        rows = torch.stack(chosen, dim=1) if chosen else torch.zeros(len(ids) - 1, 0, 0)
        found.logprobs.append(logprobs.detach().numpy())
        found.routing.append(rows.int().numpy())
    for name, parameter in model.named_parameters():
        found.gradients.update(_published(name, parameter.grad.numpy(), model.config.model_type == "mixtral"))
    return found


def _watch_experts(model):
    """Two lists that a forward pass fills, layer by layer, with [N, K]: what routers chose, and what experts were given
    to execute."""
    chosen, executed = [], []
    for name, module in model.named_modules():
        if name.endswith(".mlp.gate"):
            module.register_forward_hook(lambda _module, _arguments, output: chosen.append(output[2].clone()))
        if name.endswith(".mlp.experts"):
            module.register_forward_pre_hook(lambda _module, arguments: executed.append(arguments[1].clone()))
    return chosen, executed


def _published(name, gradient, mixtral):
    """A parameter's gradient by the names of checkpoints, where each expert has three tensors of its own."""
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    if mixtral:
        name = name.replace(".mlp.", ".block_sparse_moe.")
    fused = re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj", name)
    if not fused:
        return {name: gradient}
    if fused[2] == "down":
        return {f"{fused[1]}.{expert}.{down}.weight": one for expert, one in enumerate(gradient)}
    halves = {gate: 0, up: 1}  # [E, 2F, H]: the gate is the first half
    return {
        f"{fused[1]}.{expert}.{part}.weight": np.split(one, 2)[half]
        for expert, one in enumerate(gradient)
        for part, half in halves.items()
    }
