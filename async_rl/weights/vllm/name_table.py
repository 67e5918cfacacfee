"""The name table of a weight transfer, which both ends agree on when they connect: every tensor, its dtype and shape.

vLLM loads the tensors that it is given and keeps the old values of the others, so that an engine compares the table
with its own checkpoint before it takes anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm.distributed.weight_transfer.base import WeightSource

from async_rl.models import names
from async_rl.models.config import read_model_config
from async_rl.weights.shm_file import TensorMeta, check_against_checkpoint

Rows = list[list[Any]]
"""A name table as it travels: [name, dtype, shape] of each tensor."""


def name_table(source: WeightSource) -> list[TensorMeta]:
    """Return the name table of the tensors that ``source`` yields."""
    return [TensorMeta.of(meta.name, meta) for meta in source.metadata()]


def rows(table: Iterable[TensorMeta]) -> Rows:
    """Return a name table in the form in which it travels."""
    return [[meta.name, meta.dtype, list(meta.shape)] for meta in table]


def checked(table: Iterable[Sequence[Any]], model_config: Any) -> list[TensorMeta]:
    """Return a name table that an engine was sent, once it agrees with the engine's checkpoint.

    ``model_config`` is vLLM's, of an engine that was loaded from a folder. Raises WeightSyncError when they differ.
    """
    metas = [TensorMeta(name, dtype, tuple(shape)) for name, dtype, shape in table]
    folder = Path(model_config.model)
    model = read_model_config(folder)
    check_against_checkpoint(metas, folder, ignored=lambda name: names.ignored(model, name))
    return metas
