"""The files of a dataset: several, in two formats, read by row; what is wrong with one is named."""

import json
import os
import pickle
import re
import sys
from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.data.cursor import DatasetCursor
from async_rl.data.files import JsonlFile, open_files
from async_rl.errors import DatasetError
from tests.support.datasets import read_files
from tests.support.fuzzing import fuzz

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def encode(text):
    return list(text.encode())


def rows_of(count, first=1):
    return [{"prompt": f"p{number}", "answer": {"n": number}} for number in range(first, first + count)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, rows, **options):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def texts(dataset):
    return [row.text for row in dataset.rows]


@fuzz(60)
@given(parts=st.lists(st.sampled_from([b"a", b"\n", b"\r", b"\r\n", b"bc\xff"]), max_size=30), chunk=st.integers(1, 7))
def test_lines_begin_where_bytes_splitlines_has_them_whatever_the_chunks(folder, parts, chunk):
    path, content = folder / "d.jsonl", b"".join(parts)
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("async_rl.data.files._CHUNK", chunk)
        file = JsonlFile(path)
    assert [file._read(index) for index in range(file.count)] == content.splitlines()
    assert file.digest == blake2b(content, digest_size=16).hexdigest(), "that of checkpoints of release 0.2"


def test_several_files_and_patterns_are_one_dataset_in_order(tmp_path):
    write_parquet(tmp_path / "b1.parquet", rows_of(2, first=3))
    write_jsonl(tmp_path / "b0.jsonl", rows_of(2))
    last = write_jsonl(tmp_path / "a.jsonl", rows_of(1, first=5))
    dataset = read_files([tmp_path / "b*", last], encode=encode)
    assert texts(dataset) == ["p1", "p2", "p3", "p4", "p5"]
    assert [row.line for row in dataset.rows] == [1, 2, 3, 4, 5]
    assert [row.fields["answer"]["n"] for row in dataset.rows] == [1, 2, 3, 4, 5]
    assert "b0.jsonl and 2 more" in dataset.path
    other = read_files([last, tmp_path / "b*"], encode=encode)
    assert other.digest != dataset.digest, "the order of files is part of what a checkpoint belongs to"


def test_a_bad_row_of_one_of_several_files_is_named_by_its_own_file_and_place(tmp_path):
    first = write_parquet(tmp_path / "a.parquet", [*rows_of(2), {"prompt": " ", "answer": None}])
    second = write_jsonl(tmp_path / "b.jsonl", [*rows_of(1), {"prompt": 5}])
    with pytest.raises(DatasetError, match=re.escape(f"{first}, row 3: field 'prompt' is empty; fix the row, or set")):
        read_files([first, second], encode=encode)
    report = read_files([first, second], encode=encode, on_bad_row="skip").bad_row_report()
    assert f"2 of 5 rows are bad: {first}, row 3: field 'prompt' is empty; {second}, line 2: field 'prompt'" in report


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["no/*.jsonl"], "data.train: no file matches .*no/"),
        ([], "data.train is an empty list"),
        (["a.jsonl", "a.*"], "data.train names .*a.jsonl twice"),
        (["b.jsonl"], "dataset .*b.jsonl: No such file"),
        (["folder"], "folder is a folder; name its files, for example .*folder/\\*.parquet"),
    ],
)
def test_files_that_are_not_there_are_named_with_their_setting(tmp_path, paths, message):
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "a.jsonl", rows_of(1))
    with pytest.raises(DatasetError, match=message):
        read_files([tmp_path / path for path in paths], encode=encode)


@pytest.mark.parametrize("cut", [0, 3, 100, -1])
def test_a_parquet_file_that_is_cut_off_is_named(tmp_path, cut):
    path = write_parquet(tmp_path / "d.parquet", rows_of(50))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DatasetError, match=f"dataset {re.escape(str(path))}.* is not a whole Parquet file"):
        read_files(path, encode=encode)


@pytest.mark.parametrize("in_memory", [None, 5])
def test_a_parquet_file_that_is_damaged_inside_is_named_and_nothing_of_it_is_left(tmp_path, in_memory):
    path = write_parquet(tmp_path / "d.parquet", rows_of(500), compression="zstd")
    content = bytearray(path.read_bytes())
    content[8:400] = bytes(392)
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=re.escape(f"dataset {path}")):
        read_files(path, encode=encode, in_memory=in_memory, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_a_parquet_file_of_another_schema_is_named_with_its_columns(tmp_path):
    path = write_parquet(tmp_path / "d.parquet", [{"question": "a", "answer": "b"}])
    with pytest.raises(DatasetError, match=r"no column 'prompt' \(data.prompt_field\); it has question, answer"):
        read_files(path, encode=encode)
    path = write_parquet(tmp_path / "d.parquet", [{"prompt": b"\x00\x01", "answer": "b"}])
    with pytest.raises(DatasetError, match="row 1: field 'prompt' is bytes, not a string or a list of messages"):
        read_files(path, encode=encode)
    path = write_parquet(tmp_path / "d.parquet", [{"prompt": "a", "image": b"\x00"}])
    with pytest.raises(DatasetError, match=r"row 1: 'the row\.image' is a bytes; expected"):
        read_files(path, encode=encode)


def test_a_parquet_file_is_known_by_its_first_bytes_too(tmp_path):
    path = write_parquet(tmp_path / "data", rows_of(1))
    assert texts(read_files(path, encode=encode)) == ["p1"]


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "d.parquet", rows_of(1))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DatasetError, match=r"pip install 'async-rl\[data\]'"):
        read_files(path, encode=encode)


def cursors(tmp_path, write, count, in_memory, **settings):
    path = write(tmp_path / f"d.{write.__name__}", rows_of(count))
    made = [read_files(path, encode=encode, in_memory=read, cache=tmp_path / "cache") for read in (None, in_memory)]
    return [DatasetCursor(dataset, **{"shuffle": True, "seed": 7} | settings) for dataset in made]


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_rows_on_the_disk_are_issued_as_if_they_were_in_memory(tmp_path, write):
    whole, lazy = cursors(tmp_path, write, count=40, in_memory=3)
    lazy = pickle.loads(pickle.dumps(lazy))  # as the queue's process gets it
    for _ in range(100):
        expected, prompt = whole.next(), lazy.next()
        assert (prompt.prompt_id, prompt.text, prompt.fields) == (expected.prompt_id, expected.text, expected.fields)
        np.testing.assert_array_equal(prompt.token_ids, expected.token_ids)
    assert lazy.state() | {"usable_rows": 0} == whole.state() | {"usable_rows": 0}


@fuzz(60)
@given(
    before=st.integers(0, 60), back=st.integers(0, 4), after=st.integers(1, 40), read=st.sampled_from([1, 5, 19, 20])
)
def test_a_resumed_run_continues_exactly_as_one_that_was_not_interrupted(folder, before, back, after, read):
    path = write_jsonl(folder / "d.jsonl", rows_of(20))
    dataset = read_files(path, encode=encode, in_memory=read)
    cursor, resumed = (DatasetCursor(dataset, shuffle=True, seed=seed) for seed in (3, 4))
    prompts = [cursor.next() for _ in range(before)]
    for at, prompt in enumerate(prompts[:back]):
        cursor.give_back(prompt, defer=at % 2 == 1)
    resumed.restore(json.loads(json.dumps(cursor.state())))
    for _ in range(after):
        one, other = cursor.next(), resumed.next()
        assert (one.prompt_id, one.text, one.token_ids.tolist()) == (
            other.prompt_id,
            other.text,
            other.token_ids.tolist(),
        )
    assert cursor.state() == resumed.state()


def test_a_state_of_release_0_2_without_the_hash_of_settings_is_read(tmp_path):
    _, cursor = cursors(tmp_path, write_jsonl, count=9, in_memory=2)
    cursor.next()
    state = cursor.state()
    del state["settings"]
    following = cursor.next().prompt_id
    cursor.restore(state)
    assert cursor.next().prompt_id == following


def test_a_run_of_release_0_1_needs_all_its_rows_in_memory(tmp_path):
    _, cursor = cursors(tmp_path, write_jsonl, count=9, in_memory=2)
    state = cursor.state()
    for key in ("usable_rows", "order_of", "settings"):
        del state[key]
    with pytest.raises(
        DatasetError, match=r"has 9 rows, more than data\.rows_in_memory.* set data\.rows_in_memory to 9"
    ):
        cursor.restore(state)


def test_memory_and_reading_do_not_grow_with_the_rows_that_are_left_on_the_disk(tmp_path):
    count, read = 30_000, []
    path = tmp_path / "d.jsonl"
    path.write_text("".join(f'{{"prompt": "p{number}", "answer": "{"x" * 90}"}}\n' for number in range(count)))

    def counting(text):
        read.append(text)
        return [1]

    dataset = read_files(path, encode=counting, in_memory=10)
    assert dataset.lines == count
    assert len(read) == 10
    cursor = DatasetCursor(dataset, shuffle=True, seed=0)
    prompt = cursor.next()
    assert prompt.text == f"p{prompt.row - 1}"
    assert len(read) == 11
    held = len(pickle.dumps((open_files(path, key="", cache=tmp_path, in_memory=10), cursor._order)))
    assert held < 17 * count, "an offset and a place in the order per row, 8 bytes each"


def test_a_bad_row_on_the_disk_is_skipped_or_fails_the_run_when_its_turn_comes(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [*rows_of(2), {"prompt": ""}, *rows_of(1, first=4)])
    cursor = DatasetCursor(read_files(path, encode=encode, in_memory=2, on_bad_row="skip"), shuffle=False, seed=0)
    assert [cursor.next().prompt_id for _ in range(4)] == ["0-1", "0-2", "0-4", "1-1"]
    assert not cursor.usable("0-3")
    assert cursor.usable("0-4")
    with pytest.raises(KeyError):
        cursor.prompt("0-3")
    cursor = DatasetCursor(read_files(path, encode=encode, in_memory=2), shuffle=False, seed=0)
    assert [cursor.next().row for _ in range(2)] == [1, 2]
    for _ in range(2):  # the call may be made again
        with pytest.raises(
            DatasetError, match=r"d\.jsonl, line 3: field 'prompt' is empty; set data.on_bad_row to skip"
        ):
            cursor.next()


def test_the_first_prompts_are_taken_from_the_disk_where_memory_has_too_few(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [*rows_of(2), {"prompt": ""}, *rows_of(2, first=4)])
    dataset = read_files(path, encode=encode, in_memory=1, on_bad_row="skip")
    assert [prompt.row for prompt in dataset.first(3, label="eval", key="eval.n")] == [1, 2, 4]
    with pytest.raises(DatasetError, match=r"eval\.n asks for 9 prompts, but the file has 4 usable rows"):
        dataset.first(9, label="eval", key="eval.n")


def test_a_file_that_changes_while_the_run_reads_it_is_noticed_and_one_that_is_touched_is_not(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", rows_of(9))
    cursor = DatasetCursor(read_files(path, encode=encode, in_memory=1), shuffle=False, seed=0)
    assert [cursor.next().row for _ in range(2)] == [1, 2]
    os.utime(path)
    assert cursor.next().text == "p3"
    path.write_text(path.read_text().replace("p5", "q5"))
    with pytest.raises(DatasetError, match=r"d\.jsonl has changed since the run began to read it"):
        cursor.next()


def test_a_folder_that_cannot_take_an_unpacked_file_is_named(tmp_path):
    path = write_parquet(tmp_path / "d.parquet", rows_of(9))
    (tmp_path / "cache").touch()
    with pytest.raises(DatasetError, match=r"d\.parquet has too many rows for data\.rows_in_memory and cannot be unp"):
        read_files(path, encode=encode, in_memory=3, cache=tmp_path / "cache")


def test_a_long_parquet_file_is_unpacked_once(tmp_path):
    path = write_parquet(tmp_path / "d.parquet", rows_of(3000))
    dataset = read_files(path, encode=encode, in_memory=10, cache=tmp_path / "cache")
    (unpacked,) = (tmp_path / "cache").iterdir()
    assert unpacked.name == f"{dataset.digest}.arrow"
    written = unpacked.stat().st_mtime_ns
    again = read_files(path, encode=encode, in_memory=10, cache=tmp_path / "cache")
    assert unpacked.stat().st_mtime_ns == written
    assert again.later.row(3000).text == "p3000"


LEVELS = [3, 1, 2.5, 1, None, 3, -2, 1]


def leveled(folder, write):
    rows = [{"prompt": f"p{n}", "level": level} for n, level in enumerate(LEVELS, 1)]
    return write(folder / f"{write.__name__}.{'parquet' if write is write_parquet else 'jsonl'}", rows)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
@pytest.mark.parametrize("in_memory", [None, 1])
def test_rows_come_by_a_column_and_at_random_among_equals(tmp_path, write, in_memory):
    settings = {"encode": encode, "in_memory": in_memory, "cache": tmp_path / "cache", "on_bad_row": "skip"}
    dataset = read_files(leveled(tmp_path, write), order_by="level", **settings)
    for seed in range(3):
        cursor = pickle.loads(pickle.dumps(DatasetCursor(dataset, shuffle=True, seed=seed)))
        lines = [cursor.next().row for _ in range(21)]
        epochs = [lines[start : start + 7] for start in (0, 7, 14)]
        for epoch in epochs:
            assert [LEVELS[line - 1] for line in epoch] == [-2, 1, 1, 1, 2.5, 3, 3]
            assert len(set(epoch)) == 7
        assert epochs[0] != epochs[1] or epochs[1] != epochs[2]
        resumed = DatasetCursor(dataset, shuffle=False, seed=9)
        resumed.restore(cursor.state())
        assert [resumed.next().prompt_id for _ in range(9)] == [cursor.next().prompt_id for _ in range(9)]
    ordered = DatasetCursor(dataset, shuffle=False, seed=0)
    assert [ordered.next().row for _ in range(8)] == [7, 2, 4, 8, 3, 1, 6, 7]


def test_an_order_by_what_is_not_there_or_not_a_number_is_named(tmp_path):
    for write, said in (
        (write_jsonl, r"line 1: field 'age' \(data.order_by\) is not"),
        (write_parquet, "no column 'age'"),
    ):
        with pytest.raises(DatasetError, match=said):
            read_files(leveled(tmp_path, write), encode=encode, order_by="age")
    with pytest.raises(DatasetError, match=r"line 5: field 'level' \(data.order_by\) is not a number"):
        read_files(leveled(tmp_path, write_jsonl), encode=encode, order_by="level")


def test_a_run_cannot_change_its_order(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "p", "level": 1}, {"prompt": "q", "level": 2}])
    plain, by_level = (
        DatasetCursor(read_files(path, encode=encode, order_by=by), shuffle=True, seed=0) for by in (None, "level")
    )
    with pytest.raises(DatasetError, match=r"data\.order_by of .*d\.jsonl is level and was null.*set it back to null"):
        by_level.restore(plain.state())
    with pytest.raises(DatasetError, match="is null and was level"):
        plain.restore(by_level.state())
    old = plain.state()
    del old["order_by"]  # as release 0.2 wrote it
    plain.restore(old)
