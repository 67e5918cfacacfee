"""What the policy samples as the message that an agent gets: calls and reasoning of each family, and neither."""

import json
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.data.chat import CheckpointEncoder
from async_rl.data.chat_turns import ChatTurns
from async_rl.rollout.engine.vllm.parsing import TOOL_PARSERS, ToolParser
from async_rl.rollout.turn_message import Sampled, ToolParsers, TurnReader
from tests.support.chat_families import tokenizer
from tests.support.tool_families import EOS, THINKS, TOOL_FAMILIES

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "unit": {"type": "string"}},
            "required": ["a"],
        },
    },
}
USER = {"role": "user", "content": "u"}


class Subject:
    """A reader of turns of one family, and its tokenizer."""

    def __init__(self, family, tool_parser="auto", **variables):
        self.tokenizer = tokenizer(TOOL_FAMILIES[family])
        encoder = CheckpointEncoder(lambda: self.tokenizer)
        stop = self.tokenizer.convert_tokens_to_ids(EOS[family])
        self.row = ChatTurns(encoder.chat, [stop], None, variables, encoder.written).for_row({})
        self.made = []
        self.reader = TurnReader(
            lambda: ToolParsers(TOOL_PARSERS, self.make),
            lambda ids: self.tokenizer.decode(ids, skip_special_tokens=False),
            tool_parser,
        )

    def make(self, name):
        self.made.append(name)
        return ToolParser(name, self.tokenizer)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def message(self, text, tools=(ADD,), stop=(), history=(USER,)):
        """Return the message of a turn in which the policy samples ``text`` after ``history``."""
        tools, ids = list(tools) or None, self.encode(text)
        plain = self.tokenizer.decode(ids, skip_special_tokens=True)
        for each in stop:
            plain = plain.partition(each)[0]
        before = np.array(self.row.prompt(list(history), tools), np.int32)
        return self.reader.message(Sampled(plain, np.array(ids, np.int32), before, stop, tools), self.row)


def called(*calls, **more):
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": f"00000000{at}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for at, (name, arguments) in enumerate(calls)
        ],
        **more,
    }


def calls_of(message):
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message.get("tool_calls", [])
    ]


def turn(subject, family, message):
    """Return what the template writes of a turn of the policy, up to its stop token."""
    asked = subject.row.written([USER], [ADD], asks=True)
    whole = subject.row.written([USER, message], [ADD], asks=False)
    assert whole.startswith(asked)
    return whole[len(asked) :].partition(EOS[family])[0]


@pytest.mark.parametrize("family", TOOL_FAMILIES)
def test_a_call_is_read_as_the_template_writes_it_and_written_as_it_was_read(family):
    subject = Subject(family)
    text = turn(subject, family, called(("add", {"a": 1, "unit": "ü"})))
    message = subject.message(text)
    assert calls_of(message) == [("add", {"a": 1, "unit": "ü"})]
    assert message["content"].strip() == ""
    (call,) = message["tool_calls"]
    assert len(call["id"]) == 9
    assert call["id"].isalnum()
    # Arguments are text now; a template that wants an object must not quote them.
    assert turn(subject, family, message).strip() == text.strip().replace("000000000", call["id"])
    assert subject.reader.read == {True: 1, False: 0}
    assert subject.message(text)["tool_calls"] == message["tool_calls"], "the id is the same however often it is read"


@pytest.mark.parametrize("family", sorted(THINKS))
def test_reasoning_stands_apart_with_calls_and_without(family):
    subject = Subject(family)
    both = turn(subject, family, called(("add", {"a": 1}), reasoning_content="one more"))
    message = subject.message(both)
    assert (message["reasoning_content"], calls_of(message)) == ("one more", [("add", {"a": 1})])
    said = turn(subject, family, {"role": "assistant", "content": "two", "reasoning_content": "one more"})
    for tools in ((), (ADD,)):
        assert subject.message(said, tools) == {"role": "assistant", "content": "two", "reasoning_content": "one more"}


def test_what_has_no_marks_of_reasoning_is_content():
    subject = Subject("qwen3")
    for text in ("plain", "a</think>b", "say <think> and go"):
        assert subject.message(text) == {"role": "assistant", "content": text}
    assert subject.message("<think>cut o") == {"role": "assistant", "content": "", "reasoning_content": "cut o"}
    assert subject.message("<think>\n\n</think>\n\nyes") == {"role": "assistant", "content": "yes"}


def test_reasoning_that_the_prompt_has_begun():
    template = TOOL_FAMILIES["qwen3"].template
    for strips in (False, True):  # templates of models that only reason do not write it again
        text = template.replace("{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}", "<think>\n")
        if strips:
            text = text.replace("{{ m.reasoning_content }}", "")
        subject = Subject("qwen3")
        subject.tokenizer.chat_template = text
        message = subject.message("one more\n</think>\n\ntwo")
        assert message == {"role": "assistant", "content": "two", "reasoning_content": "one more"}
        assert subject.message("one mo") == {"role": "assistant", "content": "", "reasoning_content": "one mo"}


def test_thinking_that_is_switched_off_changes_nothing_of_calls():
    subject = Subject("qwen3", enable_thinking=False)
    assert subject.message("two") == {"role": "assistant", "content": "two"}
    message = subject.message('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>')
    assert calls_of(message) == [("add", {"a": 1})]


def test_without_tools_nothing_is_a_call_and_no_parser_is_made():
    subject = Subject("hermes")
    text = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    assert subject.message(text, tools=()) == {"role": "assistant", "content": text}
    assert not subject.made
    off = Subject("hermes", tool_parser=None)
    assert off.message(text) == {"role": "assistant", "content": text}
    assert not off.made


@pytest.mark.parametrize(
    "text",
    [
        'hm <tool_call>\n{"name": "add", "arguments": {"a": \n</tool_call>',
        '<tool_call>\n{"name": "add"',
        "<tool_call>add(1)</tool_call>",
    ],
)
@pytest.mark.parametrize("family", ["hermes", "qwen3_xml"])
def test_a_call_that_cannot_be_read_stays_text_and_is_counted(family, text, caplog):
    subject = Subject(family)
    assert subject.message(text) == {"role": "assistant", "content": text}
    assert subject.reader.read == {True: 0, False: 1}
    assert not caplog.records, "a policy that misspells a call is no error of the system"


def test_several_calls_and_what_was_said_before_them():
    subject = Subject("hermes")
    text = turn(subject, "hermes", called(("add", {"a": 1}), ("no_such", {})))
    message = subject.message("sure" + text)
    assert message["content"].strip() == "sure"
    assert calls_of(message) == [("add", {"a": 1}), ("no_such", {})], "whether a tool exists is for the agent to say"
    assert len({call["id"] for call in message["tool_calls"]}) == 2


def test_calls_after_more_tokens_have_other_ids():
    subject = Subject("hermes")
    text = turn(subject, "hermes", called(("add", {})))
    first = subject.message(text)
    history = [USER, first, {"role": "tool", "content": "2", "tool_call_id": first["tool_calls"][0]["id"]}]
    second = subject.message(text, history=history)
    assert first["tool_calls"][0]["id"] != second["tool_calls"][0]["id"]


def test_the_message_ends_before_a_stop_string_whatever_parses_it():
    subject = Subject("qwen3")
    text = '<think>r</think>\nbefore STOP <tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    assert subject.message(text, stop=("STOP",)) == {
        "role": "assistant",
        "content": "before ",
        "reasoning_content": "r",
    }


def test_a_parser_that_is_named_is_used_and_one_that_is_not_there_is_refused():
    text = "[add(a=1)]"
    assert calls_of(Subject("hermes", tool_parser="pythonic").message(text)) == [("add", {"a": 1})]
    with pytest.raises(ValueError, match="no tool parser 'hermse'; it has apertus"):
        Subject("hermes", tool_parser="hermse").message(text)
    with pytest.raises(ValueError, match=r"'llama3_json' does not fit the tokenizer: .*python_tag"):
        Subject("hermes", tool_parser="llama3_json").message(text)


@given(
    st.lists(st.sampled_from([*"ab <>{}[]:,\"'\n", "<tool_call>", "</tool_call>", "<function=", "add", "arguments"]))
)
def test_whatever_a_policy_writes_is_a_message(hermes, pieces):
    text = "".join(pieces)
    message = hermes.message(text)
    assert isinstance(message["content"], str)
    assert calls_of(message) or message["content"] == text


@pytest.fixture(scope="module")
def hermes():
    return Subject("hermes")


def test_a_template_that_no_parser_reads_leaves_text():
    subject = Subject("hermes")
    subject.tokenizer.chat_template = subject.tokenizer.chat_template.replace("tool_call>", "invented>")
    text = '<invented>\n{"name": "add", "arguments": {"a": 1}}\n</invented>'
    assert subject.message(text) == {"role": "assistant", "content": text}
    assert subject.made == list(TOOL_PARSERS)


def test_threads_find_the_parser_once():
    subject = Subject("hermes")
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    found = []
    threads = [threading.Thread(target=lambda: found.append(subject.message(text))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(calls_of(message) == [("add", {"a": 1})] for message in found)
    assert subject.made == ["hermes"]
