"""Makes a tiny random checkpoint of each model family that the trainer supports, and computes with transformers."""

import re
from typing import NamedTuple

import numpy as np

VOCAB, LAYERS, EXPERTS = 128, 4, 8


def configs():
    from transformers import (
        DeepseekV3Config,
        Glm4MoeConfig,
        LlamaConfig,
        MixtralConfig,
        Qwen3Config,
        Qwen3MoeConfig,
    )

    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
    }
    grouped = {"num_key_value_heads": 2, "head_dim": 32}  # the least that vLLM's attention takes on a CPU
    sigmoid = {
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        # Published checkpoints say so, and vLLM asks; transformers assumes it.
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    latent = {
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    }
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    return {
        "Llama": LlamaConfig(**shape, **grouped, tie_word_embeddings=True, rope_parameters={"rope_theta": 1e5}),
        "Qwen3": Qwen3Config(**shape, **grouped, tie_word_embeddings=True, rope_parameters={"rope_theta": 1e6}),
        "Qwen3-MoE": Qwen3MoeConfig(
            **shape,
            **grouped,
            num_experts=EXPERTS,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            mlp_only_layers=[1],
            norm_topk_prob=True,
        ),
        "Mixtral": MixtralConfig(
            **shape, **grouped, num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=None
        ),
        "Moonlight": DeepseekV3Config(
            **shape, **sigmoid, **latent, q_lora_rank=None, n_shared_experts=2, routed_scaling_factor=2.446
        ),
        "DeepSeek-V3": DeepseekV3Config(
            **shape,
            **latent,
            **sigmoid | {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
            q_lora_rank=48,
            n_shared_experts=1,
            routed_scaling_factor=2.5,
            rope_parameters=yarn,
        ),
        "GLM-4 MoE": Glm4MoeConfig(
            **shape,
            **grouped,
            **sigmoid,
            attention_bias=True,
            use_qk_norm=True,
            n_shared_experts=1,
            routed_scaling_factor=1.5,
        ),
    }


FAMILIES = ("Llama", "Qwen3", "Qwen3-MoE", "Mixtral", "Moonlight", "DeepSeek-V3", "GLM-4 MoE")
DENSE = ("Llama", "Qwen3")


def make(name, folder, seed=0, tied=None, changes=None):
    """Make a checkpoint with random parameters, norms and biases included, at scales that spread the log-probs.

    ``tied``: whether the output layer shares the weights of the embeddings; None for what the family is tested with.
    ``changes``: other values of the family's configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = configs()[name]
    if tied is not None:
        config.tie_word_embeddings = tied
    for key, value in (changes or {}).items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in key:
                continue
            if "norm" in key:
                tensor.uniform_(0.5, 1.5)
            elif "bias" in key:
                tensor.normal_(0.0, 0.1)
            else:
                tensor.normal_(0.0, 0.12)
    model.save_pretrained(folder)
    if name == "DeepSeek-V3":
        _add_extra_layer(folder)
    return folder


def _add_extra_layer(folder):
    """Add the layer that predicts further tokens: checkpoints have it, transformers leaves it out."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.{LAYERS}.eh_proj.weight"] = torch.randn(64, 128)
    tensors[f"model.layers.{LAYERS}.enorm.weight"] = torch.randn(64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def changed(folder, other, seed):
    """Write the model of ``folder`` to ``other`` with every tensor changed; return the tensors by name."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    other.mkdir()
    shutil.copy(folder / "config.json", other)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return tensors


class Reference(NamedTuple):
    """Results of transformers for sequences int32[N]."""

    logprobs: list
    """float32[N-1] of each sequence."""
    routing: list
    """int32[N-1, L, K] of each sequence."""
    gradients: dict
    """Gradients of -sum of weight x log-prob over all sequences, by name in the checkpoint."""


def token_weights(sequences):
    """Return a weight for each predicted token, so that the gradient is not that of a plain mean."""
    rng = np.random.default_rng(11)
    return [rng.uniform(-1.0, 1.0, len(ids) - 1).astype(np.float32) for ids in sequences]


def reference(folder, sequences):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager"
    )
    chosen = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            # What executes the experts is given their numbers [tokens, K].
            module.register_forward_pre_hook(lambda _m, arguments: chosen.append(arguments[1].detach()))
    logprobs, routing = [], []
    for ids, weights in zip(sequences, token_weights(sequences), strict=True):
        chosen.clear()
        tokens = torch.from_numpy(ids).long()
        logits = model(tokens[None, :-1], use_cache=False).logits[0]
        values = logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        (-(values * torch.from_numpy(weights)).sum()).backward()
        logprobs.append(values.detach().numpy())
        routing.append(torch.stack(chosen, dim=1).int().numpy() if chosen else np.zeros((len(ids) - 1, 0, 0), np.int32))
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients |= _published(name, parameter.grad.numpy(), mixtral="Mixtral" in type(model).__name__)
    return Reference(logprobs, routing, gradients)


def _published(name, gradient, mixtral):
    """Return a gradient by checkpoint names, where transformers 5 keeps a layer's experts in one tensor."""
    mlp = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
    match = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", mlp)
    if match is None:
        return {mlp: gradient}
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    parts = {}
    for expert, one in enumerate(gradient):
        stem = f"{match[1]}.{expert}"
        if match[2] == "down_proj":
            parts[f"{stem}.{down}.weight"] = one
        else:
            parts[f"{stem}.{gate}.weight"], parts[f"{stem}.{up}.weight"] = np.split(one, 2)
    return parts
