"""Rows as users of other systems have them, and what the policy and the reward see of them.

One row per convention: what a file holds, the settings that fit, the prompt, and the fields that reach the reward.
"""

import json

import pytest

from async_rl.errors import DatasetError
from tests.support.datasets import read_files

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

USER = {"role": "user", "content": "2+2?"}
SYSTEM = {"role": "system", "content": "Be brief."}
GSM8K = {
    "data_source": "openai/gsm8k",
    "prompt": [USER],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"split": "train", "index": 0, "answer": "2+2=4 #### 4", "question": "2+2?"},
}

CONVENTIONS = {
    "plain text": ({"prompt": "2+2=", "answer": "4"}, {}, "2+2=", {"answer": "4"}),
    "a field of another name (slime's input and label keys)": (
        {"question": "2+2=", "label": "4"},
        {"prompt_field": "question"},
        "2+2=",
        {"label": "4"},
    ),
    "messages in the field prompt (slime, miles, TRL)": (
        {"prompt": [SYSTEM, USER], "label": "4"},
        {},
        "system:Be brief.;user:2+2?;",
        {"prompt": [SYSTEM, USER], "label": "4"},
    ),
    "the field messages (Hugging Face sets of conversations)": (
        {"messages": [USER], "answer": "4"},
        {"prompt_field": "messages"},
        "user:2+2?;",
        {"messages": [USER], "answer": "4"},
    ),
    "a question that becomes a message": (
        {"question": "2+2?", "answer": "4"},
        {"format": "messages", "prompt_field": "question", "system_prompt": "Be brief."},
        "system:Be brief.;user:2+2?;",
        {"question": "2+2?", "answer": "4"},
    ),
    "verl": (GSM8K, {"format": "verl"}, "user:2+2?;", GSM8K),
    "verl, a prompt of text": (
        GSM8K | {"prompt": "2+2?"},
        {"format": "verl"},
        "user:2+2?;",
        GSM8K | {"prompt": "2+2?"},
    ),
    "TRL, standard": ({"prompt": "2+2=", "solution": "4"}, {"format": "trl"}, "2+2=", {"solution": "4"}),
    "TRL, conversational": (
        {"prompt": [USER], "solution": "4", "difficulty": 0.5},
        {"format": "trl"},
        "user:2+2?;",
        {"prompt": [USER], "solution": "4", "difficulty": 0.5},
    ),
    "OpenAI's parts of text": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]}]},
        {},
        "user:2+2?;",
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]}]},
    ),
    "a conversation with an answer in it": (
        {"prompt": [USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}]},
        {"system_prompt": "Be brief."},
        "system:Be brief.;user:2+2?;assistant:4;user:Sure?;",
        {"prompt": [USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}]},
    ),
    "a system message of its own wins over data.system_prompt": (
        {"prompt": [SYSTEM, USER]},
        {"system_prompt": "Be verbose."},
        "system:Be brief.;user:2+2?;",
        {"prompt": [SYSTEM, USER]},
    ),
}


def encode(text):
    return list(text.encode())


def write(path, *rows):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(("row", "settings", "text", "fields"), CONVENTIONS.values(), ids=CONVENTIONS)
def test_a_row_in_the_form_of(tmp_path, row, settings, text, fields, suffix):
    dataset = read_files(write(tmp_path / f"d.{suffix}", row), encode=encode, **settings)
    assert dataset.rows[0].text == text
    assert dataset.rows[0].token_ids.tolist() == encode(text)
    assert dataset.rows[0].fields == fields


BAD = {
    "an unknown role": (
        [USER, {"role": "robot", "content": "x"}],
        "prompt', message 2: the role is 'robot'; it must be",
    ),
    "no role": ([{"content": "x"}], "message 1: the role is 'None'; it must be one of system, developer, user"),
    "an empty content": ([{"role": "user", "content": "  "}], "message 1: the content of the user is empty"),
    "no content": ([{"role": "user", "content": None}], "message 1: the content of the user is empty"),
    "an empty answer": (
        [USER, {"role": "assistant", "content": ""}, USER],
        "message 2: the content of the assistant is",
    ),
    "an image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "message 1: the content has a part of type 'image_url'; only text can be trained on",
    ),
    "a number as content": ([{"role": "user", "content": 7}], "message 1: the content is int, not text"),
    "no messages": ([], "field 'prompt' has no messages"),
    "messages that are text": (["2+2?"], "message 1 is str, not an object with role and content"),
    "an answer at the end": ([USER, {"role": "assistant", "content": "4"}], "message 2: the last message is the assis"),
    "no question": ([SYSTEM], "field 'prompt' has no message of a user; it has only system messages"),
    "half a character": ([{"role": "user", "content": "\ud800"}], "message 1 has half of a surrogate pair"),
}


@pytest.mark.parametrize(("prompt", "reason"), BAD.values(), ids=BAD)
def test_messages_that_a_template_would_misread_are_named(tmp_path, prompt, reason):
    path = write(tmp_path / "d.jsonl", {"prompt": [USER]}, {"prompt": prompt})
    with pytest.raises(DatasetError) as error:
        read_files(path, encode=encode)
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert reason in str(error.value)
    assert "set data.on_bad_row to skip" in str(error.value)
    assert len(read_files(path, encode=encode, on_bad_row="skip").bad_rows) == 1


HOW = {"prompt": "2+2="}
SAMPLED = {"sampling_field": "how", "max_response_tokens": 8}


@pytest.mark.parametrize(
    ("row", "settings", "reason"),
    [
        ({"prompt": [USER]}, {"format": "verl"}, "no text in field 'data_source', which data.format verl needs"),
        (GSM8K | {"reward_model": {"style": "model"}}, {"format": "verl"}, "no 'ground_truth' in field 'reward_model'"),
        (
            {"prompt": "2+2="},
            {"system_prompt": "Be brief."},
            "so that data.system_prompt would be ignored; set data.fo",
        ),
        ({"prompt": "2+2="}, {"tools": []}, "so that data.tools would be ignored; set data.format to messages, or"),
        ({"prompt": {"role": "user"}}, {"format": "messages"}, "field 'prompt' is dict, not a list of messages"),
        ({"prompt": [USER], "tools": "{"}, {}, "field 'tools' is not JSON"),
        ({"prompt": [USER], "tools": [{"name": "f"}]}, {}, "field 'tools', tool 1: no name of a function"),
        ({"prompt": [USER], "chat_template_kwargs": 1}, {}, "field 'chat_template_kwargs' is int, not an object"),
        (HOW | {"how": {"temperature": 0}}, SAMPLED, "field 'how' (data.sampling_field): temperature: Input should be"),
        (HOW | {"how": {"top_p": 0.5}}, SAMPLED, "field 'how' (data.sampling_field): top_p: Extra inputs are not per"),
        (HOW | {"how": [1]}, SAMPLED, "field 'how' (data.sampling_field): Input should be"),
        (HOW | {"how": {"stop": "x"}}, SAMPLED, "field 'how' (data.sampling_field): stop: Input should be a valid lis"),
        (HOW | {"how": {"max_response_tokens": 9}}, SAMPLED, "has max_response_tokens 9, above the 8 of its source"),
    ],
)
def test_a_row_that_does_not_fit_its_settings_is_named(tmp_path, row, settings, reason):
    path = write(tmp_path / "d.jsonl", row)
    with pytest.raises(DatasetError) as error:
        read_files(path, encode=encode, **settings)
    assert str(error.value).startswith(f"{path}, line 1: ")
    assert reason in str(error.value)


class Seen:
    """An encoder that keeps what it was called with."""

    def text(self, text):
        return [1]

    def chat(self, messages, tools, variables):
        self.called = messages, tools, variables
        return "x", [1]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_tools_and_variables_of_a_row_win_over_those_of_the_settings(tmp_path, suffix, monkeypatch):
    def tool(name):
        return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}

    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    rows = [
        {"prompt": [USER, call, {"role": "tool", "content": "4"}], "tools": [tool("row")]},
        {"prompt": [USER], "tools": None, "chat_template_kwargs": {"enable_thinking": False}},
    ]
    seen, called = Seen(), []
    monkeypatch.setattr("tests.support.datasets.TextEncoder", lambda _: seen)
    path = write(tmp_path / f"d.{suffix}", *rows)
    for number in (1, 2):
        one = write(tmp_path / f"one.{suffix}", *rows[:number][-1:])
        settings = {"tools": [tool("setting")], "template_kwargs": {"enable_thinking": True, "depth": 1}}
        read_files(one, encode=encode, **settings)
        called.append(seen.called)
    assert path.exists()
    assert called[0] == ([USER, call, {"role": "tool", "content": "4"}], [tool("row")], settings["template_kwargs"])
    assert called[1] == ([USER], [tool("setting")], {"enable_thinking": False, "depth": 1})
    # A table has every key in every row; what a row lacks is null there, and no template must see it.
    read_files(path, encode=encode)
    assert seen.called[0] == [USER]
