"""What follows a turn of the policy: the one rule of ``ChatTurns`` against ``renderers``, with code for each family.

The tokenizers and the templates are made here, by the families' public rules.
"""

import functools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from renderers.configs import (
    DeepSeekV3RendererConfig,
    GLM45RendererConfig,
    Llama3RendererConfig,
    Qwen3RendererConfig,
)
from renderers.deepseek_v3 import DeepSeekV3Renderer
from renderers.glm45 import GLM45Renderer
from renderers.llama_3 import Llama3Renderer
from renderers.qwen3 import Qwen3Renderer

from async_rl.data.chat import CheckpointEncoder
from async_rl.data.chat_turns import ChatTurns
from tests.support.chat_families import Family, tokenizer
from tests.support.examples import examples

_FIRST_OF_TOOLS = "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
_LAST_OF_TOOLS = "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}"


def _deepseek(*names):
    return tuple(f"<｜{name.replace(' ', '▁')}｜>" for name in names)


QWEN3 = Family(
    "{% for m in messages %}{% if m.role == 'tool' %}"
    + _FIRST_OF_TOOLS
    + "<|im_start|>user{% endif %}{{ '\n' }}<tool_response>\n{{ m.content }}\n</tool_response>"
    + _LAST_OF_TOOLS
    + "<|im_end|>\n{% endif %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    added=("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
)
GLM45 = Family(
    "[gMASK]<sop>{% for m in messages %}{% if m.role == 'tool' %}"
    + _FIRST_OF_TOOLS
    + "<|observation|>{% endif %}{{ '\n' }}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    added=(
        *("<think>", "</think>", "<tool_call>", "</tool_call>"),
        *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
)
DEEPSEEK = Family(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'tool' %}"
    + _FIRST_OF_TOOLS
    + "<｜tool▁outputs▁begin｜>{% endif %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>"
    + _LAST_OF_TOOLS
    + "<｜tool▁outputs▁end｜>{% endif %}{% else %}<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>{% endif %}"
    "{% endfor %}{% if add_generation_prompt and messages[-1].role != 'tool' %}<｜Assistant｜>{% endif %}",
    _deepseek("begin of sentence", "end of sentence"),
    bos="<｜begin▁of▁sentence｜>",
    added=_deepseek(
        *("User", "Assistant", "tool calls begin", "tool calls end", "tool call begin", "tool call end", "tool sep"),
        *("tool outputs begin", "tool outputs end", "tool output begin", "tool output end"),
    ),
)
LLAMA3 = Family(
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}"
    "<|end_header_id|>\n\n{{ m.content | tojson if m.role == 'tool' else m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    (
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|eot_id|>", "<|eom_id|>"),
    ),
    bos="<|begin_of_text|>",
)

KEEP = {"thinking_retention": "all"}  # What was sampled stays as it was.
KNOWN = {
    "qwen3": (QWEN3, Qwen3Renderer, Qwen3RendererConfig, {"user": "<|im_end|>", "tool": "<|im_end|>"}),
    "glm45": (GLM45, GLM45Renderer, GLM45RendererConfig, {"user": "<|user|>", "tool": "<|observation|>"}),
    "deepseek_v3": (
        DEEPSEEK,
        DeepSeekV3Renderer,
        DeepSeekV3RendererConfig,
        dict.fromkeys(("user", "tool"), "<｜end▁of▁sentence｜>"),
    ),
    "llama3": (LLAMA3, Llama3Renderer, Llama3RendererConfig, dict.fromkeys(("user", "tool"), "<|eot_id|>")),
}
"""Rules, what ``renderers`` has for the family, and where its turns stop before a message of each role."""


@functools.cache
def subject(family):
    """The family's tokenizer, how it renders, what follows its turns by our rule and by ``renderers``, its stops."""
    rules, renderer, config, stops = KNOWN[family]
    made = tokenizer(rules)
    render = CheckpointEncoder(lambda: made).chat
    ids = {role: made.convert_tokens_to_ids(stop) for role, stop in stops.items()}
    return made, render, ChatTurns(render, ids.values()), renderer(made, config(**KEEP)), ids


TEXT = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=30).filter(
    lambda text: text == text.strip() and "<" not in text
)
AFTER = st.one_of(
    st.tuples(st.just("user"), st.lists(TEXT, min_size=1, max_size=1)),
    st.tuples(st.just("tool"), st.lists(TEXT, min_size=1, max_size=3)),
)


@pytest.mark.parametrize("family", KNOWN)
@settings(max_examples=examples(100), deadline=None)
@given(said=TEXT, after=AFTER, stopped=st.booleans())
def test_the_rule_gives_the_tokens_that_are_written_by_hand(family, said, after, stopped):
    made, render, turns, renderer, stops = subject(family)
    role, contents = after
    messages = [{"role": role, "content": content} for content in contents]
    prompt = render([{"role": "user", "content": "What is 2 + 2?"}], None, {})[1]
    # A turn of GLM's that was cut ends by <|endoftext|> in renderers, and as if it had stopped in its template.
    assume(stopped or family != "glm45")
    thought = "<think></think>" if family == "glm45" else ""  # which renderers closes where it is open
    turn = [*made.encode(thought + said, add_special_tokens=False), *([stops[role]] if stopped else [])]
    bridged = renderer.bridge_to_next_turn(list(prompt), turn, messages).token_ids
    ours = turns.tokens(messages, {}, turn[-1])
    assert made.decode([*prompt, *turn, *ours]) == made.decode(bridged)
    assert [*prompt, *turn, *ours] == bridged
