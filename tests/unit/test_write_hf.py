"""Ranks that have nothing to send do not wait for the end of a long export."""

from types import SimpleNamespace

import pytest
import torch

from async_rl.models import names
from async_rl.models.config import read_model_config
from async_rl.trainer import export
from tests.support.model_folders import write_inputs


class Weights:
    """Ten tensors of 400 bytes each, on rank 0."""

    def __init__(self, rank, order):
        self._rank, self._order = rank, order

    def metadata(self):
        return [names.Meta(f"w{i}", torch.float32, (10, 10)) for i in range(10)]

    def __iter__(self):
        for i in range(10):
            self._order.append(f"w{i}")
            yield f"w{i}", torch.full((10, 10), float(i)) if self._rank == 0 else None


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_meet_after_as_much_as_one_file_has(tmp_path, monkeypatch, rank):
    order = []
    monkeypatch.setattr(names, "SHARD_BYTES", 1200)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: order.append("meet"))
    model = write_inputs(tmp_path) / "model"
    export.write_hf(
        Weights(rank, order),
        tmp_path / "out",
        like=model,
        model=read_model_config(model),
        place=SimpleNamespace(rank=rank),
    )
    wanted = "w0 w1 w2 meet w3 w4 w5 meet w6 w7 w8 meet w9 meet"
    assert order == wanted.split()
    assert len(list(tmp_path.glob("out/*.safetensors"))) == (4 if rank == 0 else 0)
