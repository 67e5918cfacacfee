"""Ten families of chat models: their control tokens, how their tokenizers encode, and their templates' public rules.

Written for these tests in the shortest form that keeps a family's rules: which tokens stand where, what is stripped,
what is refused. Not the published templates.
"""

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """One family. ``bos`` is a token that the tokenizer adds to any text, and that the template writes too."""

    template: str
    special: tuple[str, ...]
    bos: str | None = None
    added: tuple[str, ...] = ()
    """Control tokens that the tokenizer does not call special."""
    sentencepiece: bool = False
    tools: bool = False
    system: bool = True


_ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}"
)
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

FAMILIES = {
    "chatml": Family(_CHATML, ("<|im_start|>", "<|im_end|>", "<|endoftext|>")),
    "llama3": Family(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
    ),
    "mistral": Family(
        "{{ bos_token }}" + _ALTERNATE + "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        bos="<s>",
        sentencepiece=True,
        system=False,
    ),
    "deepseek": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% else %}<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        bos="<｜begin▁of▁sentence｜>",
        added=("<｜User｜>", "<｜Assistant｜>"),
    ),
    "glm": Family(
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    ),
    "qwen3": Family(
        _CHATML + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
        "<think>\n\n</think>\n\n{% endif %}",
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        added=("<think>", "</think>"),
    ),
    "gemma": Family(
        "{{ bos_token }}"
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + _ALTERNATE
        + "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        system=False,
    ),
    "phi": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    ),
    "command": Family(
        "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|><|{{ 'CHATBOT' if m.role == 'assistant' else "
        "m.role | upper }}_TOKEN|>{{ m.content }}<|END_OF_TURN_TOKEN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        (
            *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
            *("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        ),
        bos="<BOS_TOKEN>",
    ),
    "tools": Family(
        "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n"
        "</tools><|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
        "{% if m.role == 'tool' %}<tool_response>\n{{ m.content }}\n</tool_response>{% else %}{{ m.content }}"
        "{% endif %}{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        added=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
        tools=True,
    ),
}


def tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A tokenizer of the family's kind whose words are single characters or bytes."""
    made = _pieces() if family.sentencepiece else _bytes()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added])
    if family.bos is not None:
        made.post_processor = TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, made.token_to_id(family.bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=family.bos, chat_template=family.template)


def _bytes() -> Tokenizer:
    """Encode as GPT-2 does, without its merges."""
    made = Tokenizer(BPE({letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def _pieces() -> Tokenizer:
    """Encode as SentencePiece does for Llama 2: a space before the text, spaces as "▁", bytes for what has no piece."""
    letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    made = Tokenizer(BPE({letter: at for at, letter in enumerate(letters)}, [], byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made
