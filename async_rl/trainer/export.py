"""Writes the trainer's weights as a Hugging Face checkpoint folder.

Knows the tables in ``models.names``; knows neither Megatron nor which rank holds which part.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch

from async_rl.models import names
from async_rl.models.config import ModelConfig, checkpoint_shards
from async_rl.trainer.parallel import Place


class NamedWeights(Protocol):
    """Weights that are gathered tensor by tensor, in the order of their metadata."""

    def metadata(self) -> list[names.Meta]: ...

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor | None]]: ...


def write_hf(weights: NamedWeights, folder: Path, *, like: Path, model: ModelConfig, place: Place) -> None:
    """Write gathered ``weights`` with ``write_folder``. Every rank calls it, and rank 0 writes."""
    if place.rank == 0:
        write_folder(_meeting(weights), folder, like=like, model=model)
    else:
        for _ in _meeting(weights):  # gathering a parameter is a collective: take part in it
            pass
    torch.distributed.barrier()


def _meeting(weights: NamedWeights) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield the weights; all ranks meet each time that as much has passed as one file has.

    A rank without a part of what follows would else wait for the end of all files, and give up after the time that a
    collective may take: a checkpoint of 1.3 TB takes longer.
    """
    passed = 0
    for meta, item in zip(weights.metadata(), weights, strict=True):
        yield item
        passed += math.prod(meta.shape) * meta.dtype.itemsize
        if passed >= names.SHARD_BYTES:
            torch.distributed.barrier()
            passed = 0


def write_folder(weights: Iterable[tuple[str, torch.Tensor]], folder: Path, *, like: Path, model: ModelConfig) -> None:
    """Write ``weights`` as a checkpoint folder like the folder ``like``, with its config and tokenizer files.

    Layers that predict further tokens are not trained, and are copied from ``like``.
    """
    extra = names.extra_layers(model, checkpoint_shards(like))
    names.write_checkpoint(chain(weights, extra), folder, shard_bytes=names.SHARD_BYTES)
    for file in like.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copy2(file, folder / file.name)
