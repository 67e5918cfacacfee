"""A tiny MoE that calls tools although it is random: a few of its tokens are each the text of a whole call.

Its tokenizer has a token for each byte, and the marks of Hermes' template, by which vLLM's parser reads the calls.
"""

import dataclasses

from tests.support.chat_families import tokenizer
from tests.support.engine_checkpoint import make_checkpoint
from tests.support.tool_families import EOS, TOOL_FAMILIES

TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}},
    }
]
_HERMES = TOOL_FAMILIES["hermes"]
_CALLS = tuple(f'<tool_call>\n{{"name": "look", "arguments": {{"n": {n}}}}}\n</tool_call>' for n in range(12))
_FAMILY = dataclasses.replace(_HERMES, added=(*_HERMES.added, *_CALLS))

# So that a turn has about 15 tokens, give or take many: what all embeddings have in common is in every hidden state, so
# that a row of the output layer can ask for it.
_COMMON, _ENDS = 0.02, 2.3


def make_tool_model(folder):
    """Write a checkpoint with its tokenizer and chat template; return the folder."""
    from safetensors.torch import save_file

    tensors = _written(folder)
    tensors["model.embed_tokens.weight"] += _COMMON
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    common = _mean_hidden(folder)
    tensors["lm_head.weight"][_end()] += _ENDS * common / common.norm() ** 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer(_FAMILY).save_pretrained(folder)
    return folder


def greedy_weights(folder):
    """Return weights for such a model with which a greedy policy has turns of some length, with calls.

    One whose last hidden state is less that of its last token repeats itself at once.
    """
    tensors, end = _written(folder), _end()
    tensors["model.embed_tokens.weight"] *= 8
    tensors["lm_head.weight"][end] *= 2
    tensors["lm_head.weight"][end + 1 :] *= 1.5
    return tensors


def _written(folder):
    """Write a random checkpoint; return its tensors."""
    from safetensors.torch import load_file

    make_checkpoint(folder, eos=_end(), vocab=len(tokenizer(_FAMILY)))
    return load_file(folder / "model.safetensors")


def _mean_hidden(folder):
    """Return what the last hidden states of random bytes have in common, float32[H]."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, 256, (32, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).last_hidden_state.flatten(0, 1).mean(0)


def _end():
    return tokenizer(_FAMILY).convert_tokens_to_ids(EOS["hermes"])
