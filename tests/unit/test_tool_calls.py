"""Arguments of tool calls in the form that a chat template writes as the model has learned it."""

import json

import pytest

from async_rl.data.chat import CheckpointEncoder
from async_rl.data.messages import checked_history, checked_tools
from async_rl.data.tool_calls import wants_text, with_arguments
from async_rl.errors import RowFault
from tests.support.chat_families import tokenizer
from tests.support.tool_families import TOOL_FAMILIES

OBJECT = {"zq": "v", "n": [1, "ü"]}


def history(arguments):
    function = {"name": "look", "arguments": arguments}
    return [
        {"role": "user", "content": "u"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "000000000", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "x", "tool_call_id": "000000000"},
    ]


@pytest.mark.parametrize("family", TOOL_FAMILIES)
def test_text_and_objects_are_written_alike(family):
    encoder = CheckpointEncoder(lambda: tokenizer(TOOL_FAMILIES[family]))
    as_object = encoder.chat(history(OBJECT), None, {})
    assert encoder.chat(history(json.dumps(OBJECT, ensure_ascii=False)), None, {}) == as_object
    assert '"zq": "v"' in as_object[0] or ">zq</" in as_object[0] or "=zq>" in as_object[0]
    assert "\\" not in as_object[0]


@pytest.mark.parametrize(
    ("render", "expected"),
    [
        (lambda arguments: json.dumps(arguments), False),  # writes both, text with quotes
        (lambda arguments: "" + arguments, True),
        (str, True),  # an object as Python writes it
        (lambda arguments: "".join(f"<{key}>" for key, _ in arguments.items()), False),
        (lambda _: "", False),  # writes neither
    ],
)
def test_what_a_template_wants(render, expected):
    def written(messages):
        return render(messages[1]["tool_calls"][0]["function"]["arguments"])

    assert wants_text(written) is expected


def test_what_is_no_object_stays_as_it_is():
    for arguments in ("{", "[1]", "3", None):
        (_, asked, _) = with_arguments(history(arguments), as_text=False)
        assert asked["tool_calls"][0]["function"]["arguments"] == arguments
    flat = [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{}"}]}]
    assert with_arguments(flat, as_text=False)[0]["tool_calls"] == [{"name": "f", "arguments": {}}]
    given = history(OBJECT)
    with_arguments(given, as_text=True)
    assert given == history(OBJECT), "the messages of the agent are its own"


def test_calls_and_tools_of_other_types_are_refused():
    with pytest.raises(RowFault, match="message 1: tool_calls is 'look', not a list of objects"):
        checked_history([{"role": "assistant", "tool_calls": "look"}], "messages")
    tool = {"type": "function", "function": {"name": "f", "parameters": "none"}}
    with pytest.raises(RowFault, match="tools, tool 1: parameters is str, not dict"):
        checked_tools([tool], "tools")
