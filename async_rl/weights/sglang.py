"""How an SGLang server receives weights: from the file that the trainer, or a worker of the host, has announced.

``load`` runs in the server's scheduler processes, which find it by its name (--custom-weight-loader); it verifies all
of a file before it touches the model. It may not raise, for an exception ends the server: what became of it is written
to a file, which ``outcome`` reads in the worker's process. Knows ``shm_file`` and no module of SGLang.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from async_rl.errors import WeightSyncError
from async_rl.weights.shm_file import Announcement, TensorMeta, read

_table: list[TensorMeta] | None = None  # of this process's model, once the worker has sent it


def load(model: Any, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Load the weights that an order announces, which is JSON in a tensor of bytes."""
    global _table
    order = json.loads(bytes(named_tensors[0][1].cpu().numpy()))
    announcement = Announcement(**order["announcement"])
    if "table" in order:
        _table = [TensorMeta(name, dtype, tuple(shape)) for name, dtype, shape in order["table"]]
    fault = None
    try:
        if _table is None:
            raise WeightSyncError("this process of the server has no name table yet")
        tensors = read(announcement, _table)
    except WeightSyncError as error:
        fault = str(error)
    else:
        # The views are of memory that the next round overwrites; the model copies what it loads.
        model.load_weights(iter(tensors))
    folder = Path(os.environ["ASYNC_RL_SGLANG_FOLDER"])
    unfinished = folder / f"loaded-{os.getpid()}.tmp"
    unfinished.write_text(json.dumps({"round": announcement.round, "fault": fault}))
    unfinished.rename(unfinished.with_suffix(".json"))


def forget_outcome(folder: Path) -> None:
    """Remove what became of the last order: rounds begin again with each sender."""
    for path in folder.glob("loaded-*.json"):
        path.unlink()


def outcome(folder: Path, round_: int, ranks: int) -> str | None:
    """Return why a round could not be loaded by all of so many processes of a server; None if it was."""
    said = [json.loads(path.read_text()) for path in sorted(folder.glob("loaded-*.json"))]
    of_round = [each for each in said if each["round"] == round_]
    if fault := next((each["fault"] for each in of_round if each["fault"] is not None), None):
        return str(fault)
    if len(of_round) != ranks:
        return f"{len(of_round)} of {ranks} processes of the server have loaded the weights"
    return None
