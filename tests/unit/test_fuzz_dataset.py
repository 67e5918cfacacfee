"""Datasets that nobody vouches for; see fuzzing."""

import json
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from async_rl.data.arrow_files import looks_like_arrow
from async_rl.data.dataset import Dataset
from async_rl.data.tables import looks_like_parquet
from async_rl.errors import DatasetError
from async_rl.types import Group, Prompt
from tests.support.datasets import read_files
from tests.support.fuzzing import assert_readable, assert_usable, changed_bytes, fuzz
from tests.unit.test_codec import small_group

TABLES = {"Parquet": looks_like_parquet, "Arrow": looks_like_arrow}


def encode_text(text):
    return [ord(character) for character in text]


def read(path, on_bad_row):
    return read_files(path, encode=encode_text, max_prompt_tokens=8, on_bad_row=on_bad_row)


def lines_of(content):
    lines = re.split(rb"\r\n|\r|\n", content)
    return lines if lines[-1] else lines[:-1]


def accounted(folder, content):
    """The dataset that is left when bad rows are skipped, None if nothing is. Every line is in it, or named."""
    path = folder / "data.jsonl"
    path.write_bytes(content)
    numbers = range(1, len(lines_of(content)) + 1)
    try:
        dataset = read(path, "skip")
    except DatasetError as error:
        message = str(error)
        assert_readable(message)
        if kind := next((kind for kind, looks_like in TABLES.items() if looks_like(path)), None):
            assert f"is not a whole {kind} file" in message
        else:
            assert (f"{len(numbers)} of {len(numbers)} rows are bad" if numbers else "is empty") in message
        with pytest.raises(DatasetError):
            read(path, "fail")
        return None
    assert isinstance(dataset, Dataset)
    assert sorted([row.line for row in dataset.rows] + [bad.line for bad in dataset.bad_rows]) == list(numbers)
    for bad in dataset.bad_rows:
        assert_readable(bad.reason)
    if not dataset.bad_rows:
        assert [row.line for row in read(path, "fail").rows] == list(numbers)
        return dataset
    with pytest.raises(DatasetError) as refused:
        read(path, "fail")
    assert f"line {dataset.bad_rows[0].line}: " in str(refused.value)
    assert_readable(str(refused.value))
    return dataset


JSON_LINES = [
    *(
        "",
        " ",
        "\t",
        "null",
        "true",
        "7",
        '"prompt"',
        "[]",
        "{}",
        "{",
        "}",
        "[" * 5000,
        '{"a":' * 5000,
        "NaN",
        "-Infinity",
    ),
    *('{"prompt": "a"}', '{"prompt": "a", "prompt": 7}', '{"prompt": null}', '{"prompt": ""}', '{"prompt": "\\u2003"}'),
    *('{"prompt": "\\u0000"}', '{"prompt": "123456789"}', '{"prompt": ["a"]}', '{"prompt": "a"}{}', '{"prompt": "a",}'),
    *('{"prompt": "a\u2028b\x85"}', '{"prompt": "\t"}', '{"prompt": "a"}\x0c', '\ufeff{"prompt": "a"}', "\ufeff", "\0"),
    *('{"prompt": "a", "x": NaN, "y": -Infinity, "z": 1e999}', '{"prompt": "a", "x": ' + "[" * 400 + "]" * 400 + "}"),
    *('{"x": "\\ud800"}', "'prompt'", "# prompt", '{"prompt"}', '{"\\ud800": 1, "prompt": "a"}', '{"PROMPT": "a"}'),
    *("9" * 5000, '{"prompt": "a", "x": ' + "9" * 5000 + "}", '{"prompt": "a", "x": 1' + "0" * 30 + "}"),
    *('{"a\\nb": 1}', '{"' + "k" * 5000 + '": 1}', json.dumps({str(n): n for n in range(2000)})),
]
JSON_TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.just("prompt"), inner, max_size=3)
    ),
    max_leaves=6,
)
LINES = (
    st.sampled_from(JSON_LINES)
    | JSON_TREES.map(json.dumps)
    | st.tuples(st.text(max_size=9), JSON_TREES).map(lambda row: json.dumps({"prompt": row[0], "x": row[1]}))
    | st.tuples(st.text(max_size=9), JSON_TREES).map(
        lambda row: json.dumps({"prompt": row[0], "x": row[1]}, ensure_ascii=False)
    )
    | st.text(max_size=12)
)
FILES = st.builds(
    lambda bom, lines, end, last: bom + end.join(lines) + last,
    st.sampled_from([b"", b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"]),
    st.lists(LINES.map(lambda line: line.encode("utf-8", "surrogatepass")) | st.binary(max_size=12), max_size=6),
    st.sampled_from([b"\n", b"\n", b"\r\n", b"\r"]),
    st.sampled_from([b"", b"\n", b"\r\n", b"\n\n"]),
)


@fuzz(150)
@given(st.binary(max_size=300))
@example(b"")
@example(b"\r\n\r\r\n")
@example(b"PAR1")  # the first bytes of Parquet and Arrow files, which Hypothesis finds in the code
@example(b"PAR1" * 3)
@example(b"ARROW1")
@example(b"\xff\xff\xff\xff")
def test_arbitrary_bytes_are_no_dataset(folder, content):
    assert accounted(folder, content) is None


@fuzz(400)
@given(FILES)
@example(b"9" * 5000)
def test_every_line_of_any_file_is_a_row_or_named(folder, content):
    accounted(folder, content)


@fuzz(150)
@given(st.data())
def test_a_dataset_that_an_accident_changed(folder, data):
    good = b'{"prompt": "ab", "answer": "b\\u00e9", "level": [1, 2.5, null]}\n' * 3
    accounted(folder, data.draw(changed_bytes(good)))


@pytest.mark.parametrize("line", JSON_LINES, ids=lambda line: ascii(line[:24]))
def test_a_line_of_every_kind_is_accounted_for(folder, line):
    accounted(folder, f'{{"prompt": "a"}}\n{line}\n{line}'.encode("utf-8", "surrogatepass"))
    accounted(folder, line.encode("utf-8", "surrogatepass"))


@fuzz(200)
@given(st.lists(LINES, min_size=1, max_size=4))
@example(['{"prompt": "a", "x": 1' + "0" * 30 + "}"])
@example(['{"prompt": "\\ud800"}'])
@example(['{"prompt": "a", "x": ' + "[" * 400 + "]" * 400 + "}"])
def test_a_row_that_is_accepted_can_be_encoded_and_carried(folder, lines):
    """Else the run ends when that row's turn comes."""
    dataset = accounted(folder, "\n".join(lines).encode("utf-8", "surrogatepass"))
    for row in dataset.rows if dataset else ():
        row.text.encode()  # what every tokenizer does first
        prompt = row.prompt("0-1")
        assert isinstance(prompt, Prompt)
        assert prompt.token_ids.dtype == np.int32
        group = small_group()
        assert_usable(Group("0-1.0", prompt, group.rollouts))
