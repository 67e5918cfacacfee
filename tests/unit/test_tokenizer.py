"""How prompts are encoded: one beginning-of-sequence token; and which token ends a response."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from async_rl.config.loading import validate
from async_rl.data.tokenizer import end_token, prompt_encoder, stop_token_ids
from async_rl.driver import run

BEGIN, END = "<s>", "</s>"


def tokenizer(template: str) -> Tokenizer:
    found = Tokenizer(WordLevel({"<unk>": 0, BEGIN: 1, END: 2, "abc": 3, "a": 4}, unk_token="<unk>"))
    found.pre_tokenizer = Whitespace()
    found.add_special_tokens([AddedToken(BEGIN, special=True), AddedToken(END, special=True)])
    found.post_processor = TemplateProcessing(single=template, special_tokens=[(BEGIN, 1), (END, 2)])
    return found


LLAMA = f"{BEGIN} $A"


def encoder(template, removed):
    made = tokenizer(template)
    return prompt_encoder(lambda text: made.encode(text).ids, made.id_to_token, removed.append)


@pytest.mark.parametrize(
    ("template", "text", "ids", "removed"),
    [
        (LLAMA, "abc", [1, 3], []),
        (LLAMA, "<s>abc", [1, 3], [BEGIN]),
        (LLAMA, "<s><s>abc", [1, 1, 3], [BEGIN]),
        (LLAMA, "abc<s>", [1, 3, 1], []),
        (f"{BEGIN} $A {END}", "<s>abc", [1, 3, 2], [BEGIN]),
        ("$A", "<s>abc", [1, 3], []),
        (f"$A {END}", "</s>", [2, 2], []),
    ],
)
def test_a_prompt_that_begins_with_the_begin_token_gets_no_second_one(template, text, ids, removed):
    found = []
    encode = encoder(template, found)
    assert list(encode(text)) == list(encode(text)) == ids
    assert found == removed, "reported once"


def test_the_run_reads_prompts_so_and_its_log_says_it_once(tmp_path, monkeypatch):
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer(LLAMA), bos_token=BEGIN, eos_token=END)
    fast.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    rows = [{"prompt": "<s>abc"}, {"prompt": "abc"}, {"prompt": "<s>abc abc"}]
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = []
    monkeypatch.setattr(run, "log", type("Log", (), {"warning": lambda _, event, **fields: lines.append(event)})())
    data = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl"), "max_prompt_tokens": 3}
    inputs = run.read_inputs(validate({"model": {"path": str(tmp_path)}, "data": data, "eval": {"n": 1}}))
    assert [row.token_ids.tolist() for row in inputs.train_set.rows] == [[1, 3], [1, 3], [1, 3, 3]]
    np.testing.assert_array_equal(inputs.eval_sets[0].problems[0].prompt.token_ids, [1, 3])
    assert lines == ["stop_token_of_tokenizer", "second_begin_token_removed"]


def test_the_tokenizers_end_token_is_taken_where_the_model_names_none(tmp_path):
    assert stop_token_ids(tmp_path) == []
    tokenizer(LLAMA).save(str(tmp_path / "tokenizer.json"))
    assert stop_token_ids(tmp_path) == []
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": END}}))
    assert stop_token_ids(tmp_path) == [2]
    (tmp_path / "tokenizer.json").unlink()
    assert end_token(tmp_path) is None
    decoder = {"7": {"content": END}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "added_tokens_decoder": decoder}))
    assert stop_token_ids(tmp_path) == [7]
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert stop_token_ids(tmp_path) == [5, 6]
