"""Writes the *.safetensors of a Hugging Face checkpoint folder, and their index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

# Size of one *.safetensors file, the same that transformers writes.
SHARD_BYTES = 5 * 10**9


class CheckpointFiles:
    """The *.safetensors of a checkpoint folder that is written, and its index.

    Files are numbered from 1; the usual names count all of them, but how many there will be is not known while weights
    stream. The index comes last, so that a folder with an index is complete.
    """

    def __init__(self, folder: Path) -> None:
        """Write into ``folder``, which is made with the first file if it is not there."""
        self._folder = folder
        self._files: dict[str, str] = {}
        self._bytes = 0
        self._count = 0

    def add(self, sizes: Mapping[str, int]) -> Path:
        """Return where the next file is, which has tensors of these names and bytes; it is written elsewhere."""
        self._count += 1
        file = f"model-{self._count:05d}.safetensors"
        self._files.update(dict.fromkeys(sizes, file))
        self._bytes += sum(sizes.values())
        return self._folder / file

    def write(self, weights: Iterable[tuple[str, torch.Tensor]], file_bytes: int) -> None:
        """Write weights as further files of at most ``file_bytes``, or of a single tensor, with one in memory."""
        taken: dict[str, torch.Tensor] = {}
        for name, tensor in weights:
            if taken and sum(map(_nbytes, taken.values())) + _nbytes(tensor) > file_bytes:
                self._write(taken)
                taken = {}
            taken[name] = on_host(tensor)
        if taken:
            self._write(taken)

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        write_tensors(tensors, self.add({name: _nbytes(tensor) for name, tensor in tensors.items()}))

    def write_index(self) -> None:
        """Write the index of all files."""
        self._folder.mkdir(parents=True, exist_ok=True)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": self._files}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in the host's memory, as a file has it."""
    return tensor.cpu().clone(memory_format=torch.contiguous_format)


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write one file of a checkpoint, whose folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})


def _nbytes(tensor: torch.Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())


def write_checkpoint(weights: Iterable[tuple[str, torch.Tensor]], folder: Path, *, shard_bytes: int) -> None:
    """Write weights as *.safetensors with an index, keeping at most one file in memory."""
    files = CheckpointFiles(folder)
    files.write(weights, shard_bytes)
    files.write_index()
