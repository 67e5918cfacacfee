"""A tiny Qwen3-MoE with a dense layer in it, and the settings of an engine that serves it on CPU in float32."""

from __future__ import annotations

from pathlib import Path

import torch

from async_rl.config import RunConfig, validate

VOCAB = 128
EOS = 1
MAX_RUNNING = 8


def make_checkpoint(path: Path) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        max_position_embeddings=1024,
        eos_token_id=EOS,
        initializer_range=0.1,  # wide enough that tokens and experts are not all alike
    )
    Qwen3MoeForCausalLM(config).float().save_pretrained(path)
    return path


def engine_config(folder: Path) -> RunConfig:
    return validate(
        {
            "model": {"path": str(folder), "dtype": "float32"},
            "data": {"train": "unused.jsonl", "max_prompt_tokens": 256},
            "rollout": {
                "max_response_tokens": 256,
                "max_num_seqs": MAX_RUNNING,
                "kv_cache_bytes": 64 * 2**20,
                "enforce_eager": True,
            },
            "sync": {"backend": "shm"},
            "resources": {"device": "cpu"},
        }
    )
