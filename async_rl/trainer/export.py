"""Writes the trainer's weights as a Hugging Face checkpoint folder.

Knows the tables in ``models.names``; knows neither Megatron nor which rank holds which part.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch

from async_rl.models import names
from async_rl.models.config import ModelConfig, checkpoint_shards
from async_rl.trainer.parallel import Place


def write_hf(
    weights: Iterable[tuple[str, torch.Tensor | None]], folder: Path, *, like: Path, model: ModelConfig, place: Place
) -> None:
    """Write gathered ``weights`` with ``write_folder``. Every rank calls it, and rank 0 writes."""
    if place.rank == 0:
        write_folder(weights, folder, like=like, model=model)
    else:
        for _ in weights:  # gathering a parameter is a collective: take part in it
            pass
    torch.distributed.barrier()


def write_folder(weights: Iterable[tuple[str, torch.Tensor]], folder: Path, *, like: Path, model: ModelConfig) -> None:
    """Write ``weights`` as a checkpoint folder like the folder ``like``, with its config and tokenizer files.

    Layers that predict further tokens are not trained, and are copied from ``like``.
    """
    extra = names.extra_layers(model, checkpoint_shards(like))
    names.write_checkpoint(chain(weights, extra), folder, shard_bytes=names.SHARD_BYTES)
    for file in like.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copy2(file, folder / file.name)
