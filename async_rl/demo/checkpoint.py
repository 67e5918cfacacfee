"""The demo's warmed-up model as this package ships it: a Hugging Face folder with its weights in half precision.

Owns the shipped folder and its two conversions. A run gets float32 weights, the type that it computes in. Half
precision halves what every clone downloads and rounds each weight by a 2000th at most, which changes neither the reward
that the demo starts from nor how it learns. ``warmup`` makes what is packed here. Knows numpy and safetensors.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

FOLDER = Path(__file__).parent / "assets"
"""The folder that the package ships."""

MADE_BY = "made_by.json"
"""In the shipped folder: the settings of the warm-up that made it, and how many steps it took."""

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def pack(model: Path, folder: Path, record: dict[str, Any]) -> None:
    """Write the float32 Hugging Face folder ``model`` as the package ships it; ``folder`` is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    _convert(model, folder, np.float16)
    (folder / MADE_BY).write_text(json.dumps(record, indent=2) + "\n")


def unpack(folder: Path) -> None:
    """Write the shipped checkpoint with float32 weights to ``folder``, which exists.

    Raises OSError when the package has no checkpoint, and SafetensorError when it is damaged.
    """
    _convert(FOLDER, folder, np.float32)


def made_by() -> dict[str, Any]:
    """Return what the shipped checkpoint was made with."""
    found: dict[str, Any] = json.loads((FOLDER / MADE_BY).read_text())
    return found


def _convert(source: Path, target: Path, dtype: type[np.floating[Any]]) -> None:
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"{source} has no *.safetensors file")
    weights = {name: tensor.astype(dtype) for shard in shards for name, tensor in load_file(shard).items()}
    save_file(weights, target / _WEIGHTS, metadata={"format": "pt"})  # transformers refuses a file without a format.
    (target / _WEIGHTS).chmod(0o644)  # safetensors lets only its owner read it, which a wheel would keep.
    for file in source.glob("*.json"):
        if file.name not in (MADE_BY, _INDEX):
            shutil.copyfile(file, target / file.name)
