"""The demo's model before its warm-up: a Qwen3-MoE of about two million parameters with random weights.

It is a Qwen3-MoE in everything but size, so that engine and trainer take the same paths as with the real one. Knows
only its tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from async_rl.demo.tokenizer import EOS_ID, TOKENS

# head_dim 32 is the smallest that vLLM's CPU attention accepts; four heads of it, two of them sharing each key and
# value, make the hidden size. Four layers are enough to sort and few enough for thousands of tokens/s per core.
# Context: 202 prompt and 201 response tokens of the longest problem, up to the next power of two.
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 320,  # Of dense layers, of which there are none; some readers insist on a value.
    "moe_intermediate_size": 160,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "eos_token_id": EOS_ID,
    "pad_token_id": EOS_ID,
    "bos_token_id": None,
}


def save_random_model(folder: Path, seed: int) -> None:
    """Write config.json and float32 weights drawn from ``seed``."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # It counts to one.
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, dtype="float32"))
    model.save_pretrained(folder)
