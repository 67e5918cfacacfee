"""Model folders for what looks at shapes and never at weights: config.json alone, or with weights of no model."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

# As published: 30.5 billion parameters.
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
}
# 4.0 billion.
QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
}
# 235.1 billion.
QWEN3_235B_A22B = QWEN3_30B_A3B | {
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "moe_intermediate_size": 1536,
}
# 106.9 billion, without the layer that predicts further tokens.
GLM_4_5_AIR = {
    "architectures": ["Glm4MoeForCausalLM"],
    "vocab_size": 151_552,
    "hidden_size": 4096,
    "intermediate_size": 10_944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 131_072,
    "attention_bias": True,
    "use_qk_norm": False,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
}

SMALLEST = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "eos_token_id": 1,
}
TOKENIZER = {
    "version": "1.0",
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "sort": 1}, "unk_token": "[UNK]"},
    "pre_tokenizer": {"type": "Whitespace"},
}


def write_config(folder: Path, values: dict) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def write_inputs(folder: Path) -> Path:
    """Write what a run reads: ``model``, whose weights are of no model, ``train.jsonl`` and ``eval.jsonl``."""
    model = write_config(folder / "model", SMALLEST)
    (model / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    save_file({"w": np.zeros(1000, dtype=np.float32)}, str(model / "model.safetensors"))
    rows = "".join(json.dumps({"prompt": "sort", "answer": "x"}) + "\n" for _ in range(4))
    (folder / "train.jsonl").write_text(rows)
    (folder / "eval.jsonl").write_text(rows)
    return folder
