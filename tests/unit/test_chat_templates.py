"""Prompts that are messages, rendered by ten families of chat templates with tokenizers made here."""

import functools
import json
import pickle

import numpy as np
import pytest

from async_rl.config.loading import validate
from async_rl.data import preview, reading
from async_rl.data.chat import CheckpointEncoder
from async_rl.data.cursor import DatasetCursor
from async_rl.data.mixture import open_cursor
from async_rl.doctor import inputs
from async_rl.driver import run
from async_rl.errors import DatasetError, RowFault
from async_rl.queue import start
from tests.support.chat_families import FAMILIES, tokenizer
from tests.support.queue_parts import make_broker

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"function": {"name": "add", "arguments": {"a": 2}}}


@functools.cache
def made(name):
    return tokenizer(FAMILIES[name])


def encoder(name, template=None):
    return CheckpointEncoder(functools.partial(made, name), template)


def conversation(family, extra="", *, tools=False):
    """A conversation with every role that the family has; ``extra`` is within all that users and tools write."""
    messages = [
        {"role": "user", "content": f"What is 2 + 2?{extra} Überlege."},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": f"Sure?{extra}\n"},
    ]
    if FAMILIES[family].system:
        messages.insert(0, {"role": "system", "content": f"Be brief.{extra}"})
    if tools:
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": f"4{extra} or so"},
        ]
    return messages


def tools_of(family):
    return [TOOL] if FAMILIES[family].tools else None


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_template_with_one_begin_token_at_most(family):
    messages, tools = conversation(family, tools=FAMILIES[family].tools), tools_of(family)
    text, ids = encoder(family).chat(messages, tools, {})
    render = functools.partial(made(family).apply_chat_template, messages, tools=tools, add_generation_prompt=True)
    assert ids == render(return_dict=False)
    assert text == render(tokenize=False)
    bos = made(family).bos_token_id
    assert bos is None or ids.count(bos) == 1
    assert bos is None or ids[0] == bos
    assert set(FAMILIES[family].special) & set(made(family).convert_ids_to_tokens(ids)), "control tokens are tokens"


@pytest.mark.parametrize("family", FAMILIES)
def test_text_of_users_and_tools_never_becomes_a_control_token(family):
    """Every control token of the family, between letters: the counts of control tokens are those without it."""
    control = FAMILIES[family].special + FAMILIES[family].added
    attack = "a" + "b".join(control) + "c"
    has_tools, tools = FAMILIES[family].tools, tools_of(family)
    described = [TOOL | {"function": TOOL["function"] | {"description": attack}}] if has_tools else None
    _, innocent = encoder(family).chat(conversation(family, tools=has_tools), tools, {})
    text, attacked = encoder(family).chat(conversation(family, attack, tools=has_tools), described, {})
    for token in control:
        number = made(family).convert_tokens_to_ids(token)
        assert attacked.count(number) == innocent.count(number), token
    assert attack in made(family).decode(attacked)
    assert attack in text
    naive = made(family).apply_chat_template(conversation(family, attack, tools=has_tools), return_dict=False)
    assert any(naive.count(n) > innocent.count(n) for n in made(family).convert_tokens_to_ids(list(control)))


@pytest.mark.parametrize(
    ("family", "messages", "why"),
    [
        ("gemma", [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}], "System role not supported"),
        ("mistral", [{"role": "user", "content": "x"}] * 2, "roles must alternate"),
    ],
)
def test_what_a_template_refuses_is_a_fault_of_the_row_with_the_templates_words(family, messages, why):
    with pytest.raises(RowFault, match=f"the chat template refuses the messages: .*{why}"):
        encoder(family).chat(messages, None, {})


def test_a_template_that_fails_or_has_no_place_for_tools_is_named():
    question = [{"role": "user", "content": "x"}]
    with pytest.raises(RowFault, match=r"the chat template refuses the messages: .*divi"):
        encoder("chatml", "{{ 1 // 0 }}").chat(question, None, {})
    with pytest.raises(RowFault, match="the chat template has no place for tools"):
        encoder("chatml").chat(question, [TOOL], {})
    with pytest.raises(DatasetError, match=r"the chat template is not valid \(line 2: ") as error:
        encoder("chatml", "\n{% if %}").chat(question, None, {})
    assert not isinstance(error.value, RowFault), "every row has it"


def test_variables_reach_the_template():
    question = [{"role": "user", "content": "x"}]
    thinking, quiet = (encoder("qwen3").chat(question, None, {"enable_thinking": value}) for value in (True, False))
    assert quiet[0] == thinking[0] + "<think>\n\n</think>\n\n"
    assert quiet[1][: len(thinking[1])] == thinking[1]
    assert made("qwen3").convert_tokens_to_ids("<think>") in quiet[1]


def test_an_encoder_pickles_without_its_tokenizer():
    first = encoder("llama3")
    expected = first.text("x"), first.chat([{"role": "user", "content": "x"}], None, {})
    sent = pickle.dumps(first)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert (again.text("x"), again.chat([{"role": "user", "content": "x"}], None, {})) == expected


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def folder_of(tmp_path, family, rows, **data):
    """Settings of a run on a checkpoint of the family that is only a tokenizer."""
    made(family).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"eos_token_id": 1}')
    return validate(
        {
            "model": {"path": str(tmp_path / "model")},
            "runs": str(tmp_path / "runs"),
            "data": {"train": write(tmp_path / "train.jsonl", rows), **data},
        }
    )


MESSAGES = [{"role": "user", "content": "Hi <|eot_id|>"}]


def test_a_run_reads_messages_and_text_with_one_begin_token_each(tmp_path):
    rows = [{"prompt": MESSAGES, "answer": "1"}, {"prompt": "<|begin_of_text|>Hi"}, {"prompt": "Hi"}]
    config = folder_of(tmp_path, "llama3", rows, system_prompt=None)
    dataset = run.read_inputs(config).train_set
    bos = made("llama3").bos_token_id
    assert [row.token_ids.tolist().count(bos) for row in dataset.rows] == [1, 1, 1]
    assert dataset.rows[0].text.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi <|eot_id|>")
    assert dataset.rows[0].fields == rows[0]
    np.testing.assert_array_equal(dataset.rows[1].token_ids, dataset.rows[2].token_ids)


def test_the_settings_of_a_run_decide_the_template_the_system_message_and_the_tools(tmp_path):
    (tmp_path / "mine.jinja").write_text(FAMILIES["tools"].template.replace("<tools>", "Tools:"))
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    config = folder_of(
        tmp_path,
        "chatml",
        [{"question": "2+2?"}],
        format="messages",
        prompt_field="question",
        system_prompt="Be brief.",
        chat_template=str(tmp_path / "mine.jinja"),
        tools=str(tmp_path / "tools.json"),
    )
    dataset = reading.read(config, "data.train", reading.encoder(config))
    text = dataset.rows[0].text
    assert text.startswith('<|im_start|>system\nTools:{"type": "function"')
    assert '"name": "add"' in text
    assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>" in text
    (tmp_path / "mine.jinja").write_text(FAMILIES["tools"].template)
    assert reading.read(config, "data.train", reading.encoder(config)).settings != dataset.settings


@pytest.mark.parametrize(
    ("setting", "content", "message"),
    [
        ("chat_template", None, r"data\.chat_template: .*none: No such file"),
        ("tools", "{", r"data\.tools: .* is not JSON"),
        ("tools", '[{"name": "f"}]', r"data\.tools: .*, tool 1: no name of a function"),
    ],
)
def test_a_file_of_a_setting_that_cannot_be_read_is_named(tmp_path, setting, content, message):
    path = tmp_path / "none"
    if content is not None:
        path.write_text(content)
    config = folder_of(tmp_path, "tools", [{"prompt": MESSAGES}], **{setting: str(path)})
    with pytest.raises(DatasetError, match=message):
        reading.read(config, "data.train", reading.encoder(config))


def test_messages_without_any_template_are_refused_with_the_setting(tmp_path):
    config = folder_of(tmp_path, "chatml", [{"prompt": MESSAGES}], on_bad_row="skip")
    encode = reading.encoder(config)
    encode.tokenizer.chat_template = None
    with pytest.raises(DatasetError, match=r"no chat template; set data\.chat_template to a file that has one"):
        reading.read(config, "data.train", encode)


def test_the_preview_shows_prompts_lengths_and_bad_rows_by_reason(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "x" * length}], "answer": "1"} for length in range(1, 41)]
    rows += [{"prompt": []}, {"prompt": [{"role": "robot", "content": "x"}]}, {"prompt": []}, {"prompt": "y" * 600}]
    text, usable = preview.preview(folder_of(tmp_path, "chatml", rows))
    assert not usable, "data.on_bad_row is fail"
    lines = text.splitlines()
    assert lines[0] == f"data.train: {tmp_path}/train.jsonl: 44 rows, 40 usable, 4 bad"
    assert "line 1, 20 tokens, fields prompt, answer" in lines
    assert "  | <|im_start|>user" in lines
    assert f"  {made('chatml').convert_tokens_to_ids('<|im_start|>')}:'<|im_start|>' " in text
    assert f"  {'20 to 23':>15}  {4:>7}  {'#' * 40}" in lines
    assert "  shortest 20, median 40, 95 % at most 57, longest 59" in lines
    assert "        2  line 41: field 'prompt' has no messages" in lines
    assert "        1  line 42: field 'prompt', message 1: the role is 'robot'" in text
    assert "        1  line 44: prompt of 600 tokens, more than data.max_prompt_tokens = 512" in lines
    assert text.endswith("\ndata.eval: none\n")
    assert preview.preview(folder_of(tmp_path, "chatml", rows, on_bad_row="skip"))[1]


def test_the_preview_and_the_run_have_every_source(tmp_path):
    model = folder_of(tmp_path, "chatml", [{"prompt": MESSAGES}] * 3).model.path
    (tmp_path / "code.jsonl").write_text('{"task": "x = 1"}\n')
    sources = {
        "math": {"path": str(tmp_path / "train.jsonl"), "weight": 3, "limit": 2},
        "code": {"path": str(tmp_path / "code.jsonl"), "prompt_field": "task", "agent": "shell"},
    }
    agents = {"agents": {"shell": {"command": ["solve"]}}}
    config = validate(
        {"model": {"path": str(model)}, "runs": str(tmp_path / "runs"), "data": {"sources": sources}, "rollout": agents}
    )
    text, usable = preview.preview(config)
    assert usable
    lines = text.splitlines()
    assert lines[1:3] == [
        "  math          75.0%            2          3",
        "  code          25.0%            1          4   played by rollout.agents.shell",
    ]
    assert f"data.sources.math.path: {tmp_path}/train.jsonl: 2 rows, 2 usable, 0 bad" in lines
    assert f"data.sources.code.path: {tmp_path}/code.jsonl: 1 rows, 1 usable, 0 bad" in lines
    cursor = open_cursor(run.read_inputs(config).train_set, shuffle=True, seed=0)
    found = [cursor.next().prompt_id for _ in range(4)]
    assert sorted(found) == ["code/0-1", "math/0-1", "math/0-2", "math/1-" + found[-1][-1]]
    (tmp_path / "code.jsonl").write_text('{"task": ""}\n')
    text, usable = preview.preview(config)
    assert not usable
    assert "line 1: field 'task' is empty" in text


def test_the_preview_and_the_run_warn_of_a_template_that_writes_the_date(tmp_path, monkeypatch):
    (tmp_path / "t.jinja").write_text("{{ date_string or strftime_now('%d %b %Y') }}" + FAMILIES["chatml"].template)
    lines = []
    monkeypatch.setattr(run, "log", type("Log", (), {"warning": lambda _, event, **fields: lines.append(event)})())
    for variables, warned in (({}, True), ({"date_string": "26 Jul 2024"}, False)):
        data = {"chat_template": str(tmp_path / "t.jinja"), "template_kwargs": variables}
        config = folder_of(tmp_path, "chatml", [{"prompt": MESSAGES}], **data)
        assert ("writes today's date" in preview.preview(config)[0]) == warned
        lines.clear()
        run.read_inputs(config)
        assert ("chat_template_writes_the_date" in lines) == warned


def test_a_resumed_run_says_that_its_template_is_another_and_only_then(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(start, "log", type("Log", (), {"warning": lambda _, event, **fields: lines.append(event)})())

    def cursor(**data):
        config = folder_of(tmp_path, "qwen3", [{"prompt": MESSAGES}] * 4, **data)
        return DatasetCursor(reading.read(config, "data.train", reading.encoder(config)), shuffle=True, seed=0)

    broker = make_broker(cursor(), window_limit=2)
    broker.issue("w", 2)
    state = json.loads(json.dumps(broker.state()))
    for other, said in (({}, []), ({"template_kwargs": {"enable_thinking": False}}, ["data_settings_changed"])):
        source = cursor(**other)
        make_broker(source, window_limit=2).restore(state)
        start.report_other_prompts(state, source)
        assert lines == said
    del state["source"]["settings"]  # as release 0.2 wrote it
    start.report_other_prompts(state, source)
    assert lines == ["data_settings_changed"]


def test_the_doctor_gives_the_verdict_of_the_run_on_messages(tmp_path):
    config = folder_of(tmp_path, "gemma", [{"prompt": MESSAGES}] * 3)
    check, _ = inputs.data(config)
    assert (check.status, check.detail) == ("ok", f"{tmp_path}/train.jsonl: 3 rows")
    config = folder_of(tmp_path, "gemma", [{"prompt": MESSAGES}], system_prompt="Be brief.")
    check, _ = inputs.data(config)
    assert check.status == "FAIL"
    assert "line 1: the chat template refuses the messages: System role not supported" in check.detail
    config = folder_of(tmp_path, "gemma", [{"prompt": MESSAGES}] * 3, rows_in_memory=2)
    check, _ = inputs.data(config)
    assert check.detail == f"{tmp_path}/train.jsonl: 3 rows, of which the first 2 were checked"
