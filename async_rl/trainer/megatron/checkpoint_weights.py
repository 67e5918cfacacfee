"""Reads the weights of a distributed checkpoint from its files under Hugging Face names, one parameter at a time.

No model is built, and neither Megatron nor a GPU is needed: the names under which Megatron-core 0.16.1 writes tensors
(``sharded_state_dict`` of its modules) follow from the tables in ``models.names``, for its own layers and for
Transformer Engine's. Memory: one Megatron parameter. Knows torch's distributed checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from async_rl.errors import CheckpointError
from async_rl.models import names
from async_rl.models.config import ModelConfig

_COMMON = "common.pt"
"""What Megatron writes beside the tensors: the values that all ranks have alike."""
_FLOAT32 = "router.expert_bias"
"""What a trainer has in float32 whatever its parameters' type (``platform.keep_float32``)."""


class CheckpointWeights:
    """The weights in the folder of a checkpoint, which must be of ``model``, as a trainer of ``dtype`` gathers them.

    Raises CheckpointError if the checkpoint is of another model.
    """

    def __init__(self, folder: Path, model: ModelConfig, dtype: str) -> None:
        self._folder = folder
        self._model = model
        self._dtype: torch.dtype = getattr(torch, dtype)
        # Both are pickles, as torch and Megatron read them.
        saved = torch.load(folder / _COMMON, map_location="cpu", weights_only=False)["model"]
        if differing := differences(saved, model):
            raise CheckpointError(
                f"checkpoint {folder} is of a model with another {differing}; set model.path to its own"
            )
        self._reader = FileSystemReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=False)
        self._saved = metadata.state_dict_metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor. Raises CheckpointError where the files lack one, or have one of another shape."""
        layouts = (names.entries(self._model, layout) for layout in ("local", "transformer_engine"))
        for local, transformer_engine in zip(*layouts, strict=True):
            parameter = self._read(local, transformer_engine)
            if not local.pattern.endswith(_FLOAT32):
                parameter = parameter.to(self._dtype)
            yield from zip(local.hf, names.to_hf(self._model, local.kind, parameter), strict=True)

    def _read(self, local: names.Entry, transformer_engine: names.Entry) -> torch.Tensor:
        """Return the Megatron parameter of an entry, given in both layouts."""
        for key, index in _keys(local, transformer_engine):
            saved = self._saved.get(key)
            if isinstance(saved, TensorStorageMetadata):
                return self._read_slice(key, saved, index)
        raise CheckpointError(f"checkpoint {self._folder} has no weights for {', '.join(local.hf)}")

    def _read_slice(self, key: str, saved: TensorStorageMetadata, index: tuple[int, ...]) -> torch.Tensor:
        """Read ``tensor[index]`` of a saved tensor, of which the files may have pieces."""
        shape = saved.size[len(index) :]
        result = torch.empty((*[1] * len(index), *shape), dtype=saved.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size([*index, *[0] * len(shape)]), result.shape)
        items = create_read_items_for_chunk_list(key, saved, [wanted])
        if sum(item.lengths.numel() for item in items) != result.numel():
            raise CheckpointError(f"checkpoint {self._folder} has only a part of {key}")
        self._reader.read_data(LoadPlan(items), _Into(result)).wait()
        return result.reshape(shape)


def differences(saved: dict[str, object], model: ModelConfig) -> str:
    """Name the fields in which a checkpoint's model is not ``model``, separated by commas; empty if there are none."""
    return ", ".join(key for key, value in asdict(model).items() if saved.get(key) != value)


def _keys(local: names.Entry, transformer_engine: names.Entry) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (key, index) of what may be a parameter in a checkpoint, which has one of them.

    The tensors of all experts of a layer are one there, and those of all layers too where all layers are alike.
    """
    # Megatron writes its own layers as Transformer Engine's where it has a rule for that: every norm before an MLP as
    # that of a dense one, whatever it is.
    patterns = (local.pattern, transformer_engine.pattern)
    for pattern in dict.fromkeys(
        [*patterns, local.pattern.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")]
    ):
        name = pattern.replace("experts.local_experts.{E}.", "experts.experts.").format(
            M=f"decoder.layers.{local.layer}", E=""
        )
        experts = () if local.expert is None else (local.expert,)
        yield name, experts
        yield name.replace(f"decoder.layers.{local.layer}.", "decoder.layers."), (local.layer, *experts)


class _Into(DefaultLoadPlanner):  # type: ignore[misc]  # torch has no types here
    """Has everything that is read written to its place in one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return narrow_tensor_by_index(self._tensor, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Do nothing: it is in its place."""
