"""Seven families of chat models that call tools, and how each writes calls and reasoning.

Written for these tests in the shortest form that keeps a family's public rules, as in ``chat_families``.
"""

from tests.support.chat_families import Family

_CHATML_END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
_THINK = (
    "{% if m.role == 'assistant' and (loop.last or m.reasoning_content) %}<think>\n{{ m.reasoning_content }}\n</think>"
    "\n\n{% endif %}"
)


def _chatml(calls: str, think: str = "", opens: str = "") -> str:
    return (
        "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n" + think + "{{ m.content }}"
        "{% for c in m.tool_calls or [] %}" + calls + "{% endfor %}" + _CHATML_END + opens + "{% endif %}"
    )


_HERMES = (
    '\n<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
)
_XML = (
    "<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments | items %}<parameter={{ k }}>\n"
    "{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
)
_GLM = (
    "<tool_call>{{ c.function.name }}\n{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key>\n"
    "<arg_value>{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}</tool_call>"
)
_IM = ("<|im_start|>", "<|im_end|>")
_DEEPSEEK = (
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>"),
    *("<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
)

TOOL_FAMILIES = {
    "hermes": Family(_chatml(_HERMES), _IM, added=("<tool_call>", "</tool_call>"), tools=True),
    "qwen3": Family(
        _chatml(_HERMES, _THINK, "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"),
        _IM,
        added=("<tool_call>", "</tool_call>", "<think>", "</think>"),
        tools=True,
    ),
    "qwen3_xml": Family(_chatml(_XML), _IM, added=("<tool_call>", "</tool_call>"), tools=True),
    "glm45": Family(
        "[gMASK]<sop>{% if tools %}<|system|>\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
        "{% for m in messages %}{% if m.role == 'tool' %}<|observation|>\n{{ m.content }}{% elif m.role == 'user' %}"
        "<|user|>\n{{ m.content }}{% else %}<|assistant|>\n<think>{{ m.reasoning_content }}</think>\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}\n" + _GLM + "{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        added=(
            *("<tool_call>", "</tool_call>", "<think>", "</think>"),
            *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        ),
        tools=True,
    ),
    "mistral": Family(
        "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}"
        "[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% elif m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
        "{% if c.id | length != 9 %}{{ raise_exception('tool call ids must have 9 letters') }}"
        "{% endif %}{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}"
        "{% if not loop.last %}, {% endif %}{% endfor %}]</s>{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]"),
        bos="<s>",
        tools=True,
    ),
    "deepseek_v3": Family(
        "{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}"
        "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'tool' %}\n{{ m.content }}{% else %}"
        "<｜Assistant｜>{{ m.content }}{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}"
        "{{ '<｜tool▁call▁begin｜>' + c.type + '<｜tool▁sep｜>' + c.function.name + '\n```json\n'"
        " + c.function.arguments + '\n```' + '<｜tool▁call▁end｜>' }}{% endfor %}<｜tool▁calls▁end｜>{% endif %}"
        "<｜end▁of▁sentence｜>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
        _DEEPSEEK,
        bos="<｜begin▁of▁sentence｜>",
        tools=True,
    ),
    "llama3_json": Family(
        "{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}"
        "<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n{% if m.tool_calls %}"
        '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
        "{{ m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content }}{% endif %}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),
        bos="<|begin_of_text|>",
        tools=True,
    ),
}
"""By the name of vLLM's parser of its calls, but for qwen3, which writes them as hermes does."""

THINKS = {"qwen3", "glm45"}
EOS = {
    **dict.fromkeys(("hermes", "qwen3", "qwen3_xml"), "<|im_end|>"),
    "glm45": "<|user|>",
    "mistral": "</s>",
    "deepseek_v3": "<｜end▁of▁sentence｜>",
    "llama3_json": "<|eot_id|>",
}
