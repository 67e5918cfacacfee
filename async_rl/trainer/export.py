"""Writes the trainer's weights as a Hugging Face checkpoint folder.

Knows the tables in ``models.names``; knows neither Megatron nor which rank holds which part.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from async_rl.models import names
from async_rl.models.checkpoint_files import SHARD_BYTES, CheckpointFiles, on_host, write_tensors
from async_rl.models.config import ModelConfig, checkpoint_shards


class WeightsInFiles(Protocol):
    """Weights that are gathered file by file, the tensors of each in the order of their metadata."""

    def files(self) -> list[tuple[int, list[names.Meta]]]:
        """Return the rank that gathers each file, and its tensors."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor | None]]: ...


def write_hf(weights: WeightsInFiles, folder: Path, like: Path, model: ModelConfig, rank: int) -> None:
    """Write ``weights`` as ``write_folder`` does, each file on the rank that gathers it; every rank calls it.

    One file is written while others are gathered, and each rank keeps one in memory at most.
    """
    files, tensors = CheckpointFiles(folder), iter(weights)
    with ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None
        for owner, metas in weights.files():
            path = files.add({meta.name: _nbytes(meta) for meta in metas})
            if owner == rank and writing is not None:
                writing.result()
            gathered = (next(tensors) for _ in metas)
            # One by one: a whole file might not fit beside the model on a GPU.
            copies = {name: on_host(tensor) for name, tensor in gathered if tensor is not None}
            if owner == rank:
                writing = writer.submit(write_tensors, copies, path)
            del copies
            # A rank without a part of what follows must not wait longer than a collective may take: a checkpoint of
            # 1.3 TB takes longer.
            torch.distributed.barrier()
        if writing is not None:
            writing.result()
    torch.distributed.barrier()
    if rank == 0:
        _complete(files, folder, like, model)
    torch.distributed.barrier()


def write_folder(
    weights: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    *,
    like: Path,
    model: ModelConfig,
    file_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``weights`` as a checkpoint folder like the folder ``like``, with its config and tokenizer files.

    Layers that predict further tokens are not trained, and are copied from ``like``.
    """
    files = CheckpointFiles(folder)
    files.write(weights, file_bytes)
    _complete(files, folder, like, model)


def _complete(files: CheckpointFiles, folder: Path, like: Path, model: ModelConfig) -> None:
    files.write(names.extra_layers(model, checkpoint_shards(like)), SHARD_BYTES)
    files.write_index()
    for file in like.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copy2(file, folder / file.name)


def _nbytes(meta: names.Meta) -> int:
    return math.prod(meta.shape) * int(meta.dtype.itemsize)
