"""Arrow files and folders that ``datasets`` has saved: read by row, mapped and not copied; what is wrong is named."""

import json
import os
import pickle
import re
import sys
from types import SimpleNamespace

import pytest

from async_rl.config.loading import validate
from async_rl.config.paths import absolute, path_settings
from async_rl.data import reading
from async_rl.data.cursor import DatasetCursor
from async_rl.data.files import expanded
from async_rl.doctor import inputs as doctor
from async_rl.errors import DatasetError
from tests.support.datasets import read_files

pyarrow = pytest.importorskip("pyarrow")


def encode(text):
    return list(text.encode())


def rows_of(count, first=1):
    return [{"prompt": f"p{number}", "answer": {"n": number}} for number in range(first, first + count)]


def write(path, rows, *, stream=True, compression=None, batch=3):
    """Write an Arrow file as ``datasets`` does (stream), or of the format that Feather has."""
    table = pyarrow.Table.from_pylist(rows)
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    kind = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with kind(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=batch)
    return path


def saved(folder, *parts, **state):
    """A folder as ``Dataset.save_to_disk`` of datasets 4 writes it."""
    folder.mkdir()
    names = [f"data-{n:05}-of-{len(parts):05}.arrow" for n in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        write(folder / name, rows)
    files = [{"filename": name} for name in names]
    kept = {"_data_files": files, "_fingerprint": "f", "_format_columns": None, "_split": "train"} | state
    (folder / "state.json").write_text(json.dumps(kept))
    (folder / "dataset_info.json").write_text('{"features": {}}')
    return folder


def texts(dataset):
    return [row.text for row in dataset.rows]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", ["d.arrow", "d"])
def test_a_file_of_either_format_is_read_by_row_without_a_copy_of_it(tmp_path, stream, name):
    path = write(tmp_path / name, rows_of(10), stream=stream)
    before = pyarrow.total_allocated_bytes()
    dataset = read_files(path, encode=encode, in_memory=4, cache=tmp_path / "cache")
    assert texts(dataset) == ["p1", "p2", "p3", "p4"]
    assert dataset.rows[1].fields == {"answer": {"n": 2}}
    cursor = pickle.loads(pickle.dumps(DatasetCursor(dataset, shuffle=False, seed=0)))
    assert [cursor.next().text for _ in range(11)] == [*(f"p{n}" for n in range(1, 11)), "p1"]
    assert pyarrow.total_allocated_bytes() == before
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_compressed_file_is_unpacked_once(tmp_path, compression):
    rows = [{"prompt": f"p{n}" + "x" * 500} for n in range(20)]
    path = write(tmp_path / "d.arrow", rows, stream=False, compression=compression)
    for _ in range(2):
        dataset = read_files(path, encode=encode, cache=tmp_path / "cache")
        assert texts(dataset) == [row["prompt"] for row in rows]
        (unpacked,) = (tmp_path / "cache").iterdir()
        assert unpacked.name == f"{dataset.digest}.arrow"


def test_a_folder_that_datasets_saved_is_one_dataset_in_its_order(tmp_path):
    folder = saved(tmp_path / "math", rows_of(3), rows_of(2, first=4))
    assert [path.name for path in expanded([folder], "data.train")] == [
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
    ]
    dataset = read_files(folder, encode=encode)
    assert texts(dataset) == [f"p{n}" for n in range(1, 6)]


def test_folders_that_cannot_be_read_as_one_dataset_are_named_with_the_way_out(tmp_path):
    splits = tmp_path / "both"
    splits.mkdir()
    (splits / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    selection = saved(tmp_path / "selection", rows_of(1), _indices_data_files=[{"filename": "indices.arrow"}])
    missing = saved(tmp_path / "missing", rows_of(1))
    (missing / "data-00000-of-00001.arrow").unlink()
    broken = saved(tmp_path / "broken", rows_of(1))
    (broken / "state.json").write_text("{")
    for folder, said in (
        (splits, f"has the splits train, test; name one of them: {splits / 'train'}"),
        (selection, "flatten_indices"),
        (missing, "data-00000-of-00001.arrow: No such file"),
        (broken, "state.json cannot be read"),
    ):
        with pytest.raises(DatasetError, match=re.escape(said)):
            read_files(folder, encode=encode)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("cut", [0, 3, 100, -30])
def test_a_file_that_is_cut_off_is_named(tmp_path, stream, cut):
    path = write(tmp_path / "d.arrow", rows_of(50), stream=stream)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DatasetError, match=f"dataset {re.escape(str(path))} is not a whole Arrow file"):
        read_files(path, encode=encode)


def test_a_stream_that_is_cut_off_between_two_batches_is_named(tmp_path):
    path = write(tmp_path / "d.arrow", rows_of(6))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DatasetError, match="not a whole Arrow file"):
        read_files(path, encode=encode)


def test_a_file_that_changes_while_it_is_mapped_is_noticed(tmp_path):
    path = write(tmp_path / "d.arrow", rows_of(9))
    cursor = DatasetCursor(read_files(path, encode=encode, in_memory=1), shuffle=False, seed=0)
    assert [cursor.next().text for _ in range(2)] == ["p1", "p2"]
    os.utime(path, ns=(1, 1))
    assert cursor.next().text == "p3"
    write(path, rows_of(8))
    with pytest.raises(DatasetError, match=r"d\.arrow has changed since the run began to read it"):
        cursor.next()


NAME = "hf:openai/gsm8k:main:train"


def config(tmp_path, train, **data):
    return validate({"model": {"path": str(tmp_path)}, "runs": str(tmp_path), "data": {"train": train, **data}})


def test_a_dataset_of_the_hub_is_read_from_the_files_that_the_library_keeps(tmp_path, monkeypatch):
    path = write(tmp_path / "kept.arrow", rows_of(3))

    def load_dataset(*arguments, **keywords):
        assert (arguments, keywords) == (("openai/gsm8k", "main"), {"split": "train"})
        return SimpleNamespace(cache_files=[{"filename": str(path)}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    settings = absolute(config(tmp_path, NAME, allow_download=True))
    assert str(settings.data.train) == NAME
    assert "data.train" not in dict(path_settings(settings)), "no host is asked for it"
    assert reading.files(settings, "data.train").count == 3
    assert reading.files(settings, "data.train").name == str(path)


def test_a_dataset_of_the_hub_that_cannot_be_loaded_is_named_with_what_to_do(tmp_path, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route to huggingface.co")

    allowed = config(tmp_path, NAME, allow_download=True)
    for settings, library, said in (
        (config(tmp_path, NAME), None, "data.allow_download is false; set it to true, or .*save_to_disk"),
        (config(tmp_path, "hf:openai/gsm8k"), None, "data.train is hf:openai/gsm8k, which is not of the form hf:NAME"),
        (allowed, None, "needs datasets; install it: pip install datasets"),
        (allowed, SimpleNamespace(load_dataset=load_dataset), "cannot be loaded: no route to huggingface.co"),
    ):
        monkeypatch.setitem(sys.modules, "datasets", library)
        with pytest.raises(DatasetError, match=said):
            reading.files(settings, "data.train")
    (check,) = (check for check in doctor.data(allowed) if check.name == "data.train")
    assert (check.status, check.detail) == ("ok", f"{NAME}: loaded when the run starts")
    (check,) = (check for check in doctor.data(config(tmp_path, NAME)) if check.name == "data.train")
    assert check.status == "FAIL"
