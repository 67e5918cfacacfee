"""The files of an export: which rank writes which, and that no rank waits long for another."""

import json
import threading

import pytest
import torch
from safetensors.torch import load_file

from async_rl.models import names
from async_rl.models.config import read_model_config
from async_rl.trainer import export
from async_rl.trainer.gather_plan import Parameter, in_files
from tests.support.model_folders import write_inputs

METAS = [names.Meta(f"w{i}", torch.float32, (10, 10)) for i in range(10)]  # of 400 bytes each
FILES = [(0, METAS[:3]), (1, METAS[3:6]), (0, METAS[6:9]), (1, METAS[9:])]


class Weights:
    """Ten tensors, of which each rank gets those of its files."""

    def __init__(self, rank, order, files=FILES):
        self._order, self._files = order, files
        self._mine = {meta.name for owner, metas in files for meta in metas if owner == rank}

    def files(self):
        return self._files

    def __iter__(self):
        for i, meta in enumerate(METAS):
            self._order.append(meta.name)
            yield meta.name, torch.full((10, 10), float(i)) if meta.name in self._mine else None


@pytest.fixture
def model(tmp_path):
    return write_inputs(tmp_path) / "model"


@pytest.fixture
def order(monkeypatch):
    found = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: found.append("meet"))
    return found


def test_a_rank_that_writes_nothing_meets_the_others_after_each_file(tmp_path, order, model):
    alone = [(0, metas) for _, metas in FILES]
    for rank in (1, 0):
        export.write_hf(Weights(rank, order, alone), tmp_path / "out", model, read_model_config(model), rank)
        assert " ".join(order) == "w0 w1 w2 meet w3 w4 w5 meet w6 w7 w8 meet w9 meet meet meet"
        order.clear()
        assert (tmp_path / "out").exists() == (rank == 0), "what other hosts lack is not made there"
    assert len(list(tmp_path.glob("out/*.safetensors"))) == 4


def test_ranks_write_the_files_in_turns_and_rank_0_what_says_that_all_are_there(tmp_path, order, model):
    out, config = tmp_path / "out", read_model_config(model)
    export.write_hf(Weights(1, order), out, model, config, 1)
    assert " ".join(order) == "w0 w1 w2 meet w3 w4 w5 meet w6 w7 w8 meet w9 meet meet meet"
    assert sorted(path.name for path in out.iterdir()) == ["model-00002.safetensors", "model-00004.safetensors"]
    export.write_hf(Weights(0, order), out, model, config, 0)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4000
    files = {meta.name: f"model-0000{i}.safetensors" for i, (_, metas) in enumerate(FILES, 1) for meta in metas}
    assert index["weight_map"] == files
    for i, meta in enumerate(METAS):
        assert (load_file(out / files[meta.name])[meta.name] == i).all()
    assert (out / "config.json").read_text() == (model / "config.json").read_text()


def test_a_rank_gathers_for_others_while_its_own_file_is_written(tmp_path, order, model, monkeypatch):
    written, write = threading.Event(), export.write_tensors

    def slow(tensors, path):
        assert written.wait(60)
        write(tensors, path)

    monkeypatch.setattr(export, "write_tensors", slow)

    def meet():
        order.append("meet")
        if len(order) == 8:
            written.set()

    monkeypatch.setattr(torch.distributed, "barrier", meet)
    export.write_hf(Weights(0, order), tmp_path / "out", model, read_model_config(model), 0)
    assert " ".join(order[:8]) == "w0 w1 w2 meet w3 w4 w5 meet", "until here nothing was written"
    assert len(list(tmp_path.glob("out/*.safetensors"))) == 2


def test_what_cannot_be_written_is_raised(tmp_path, order, model, monkeypatch):
    monkeypatch.setattr(export, "write_tensors", lambda tensors, path: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        export.write_hf(Weights(0, order), tmp_path / "out", model, read_model_config(model), 0)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    ("file_bytes", "expected"), [(10_000, [0] * 5), (800, [0, 0, 1, 1, 2]), (300, [0, 1, 2, 0, 1])]
)
def test_a_file_is_filled_before_the_next_ranks_begins(file_bytes, expected):
    parameters = [
        Parameter(None, torch.float32, (5, 10), range(i, i + 2)) for i in range(5)
    ]  # of 400 bytes in two parts
    files = in_files(parameters, file_bytes, ranks=3)
    assert [parameter.destination for file in files for parameter in file] == expected
    assert all(len({parameter.destination for parameter in file}) == 1 for file in files)
