"""Model folders with a config.json alone, for what looks at shapes and never at weights."""

import json
from pathlib import Path

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


def write_config(folder: Path, values: dict) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    return folder
