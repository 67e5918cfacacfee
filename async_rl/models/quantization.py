"""What the quantization_config of a config.json says: weights in block-wise fp8 can be converted, others are refused.

The form is that in which DeepSeek-V3 was published (README_WEIGHTS.md in deepseek-ai/DeepSeek-V3): float8_e4m3fn with
one scale for each block of a weight. Knows ``errors`` alone, and reads no file.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.errors import ModelError

# Older checkpoints of compressed-tensors have the second.
KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a weight [out, in] that have one scale each; those at its end may be smaller."""

    rows: int
    columns: int

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the shape of the scales of a weight of shape [out, in]."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.columns)


def read_blocks(path: Path, config: Mapping[str, Any]) -> Blocks | None:
    """Return the blocks of the checkpoint in folder ``path``, of whose config.json ``config`` is; None if it has none.

    Raises ModelError naming the field and its value for every other quantization.
    """
    key = next((key for key in KEYS if config.get(key) is not None), None)
    if key is None:
        return None

    def refused(what: str) -> ModelError:
        return ModelError(
            f"model.path {path}: config.json: {key}: {what}; use the checkpoint in bfloat16, or one in block-wise fp8 "
            "(quant_method fp8, fmt e4m3, weight_block_size)"
        )

    values = config[key]
    if not isinstance(values, Mapping):
        raise refused(f"{values!r} is not an object")
    supported = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    for name, wanted in supported.items():
        # The method alone has to be named: the others are what transformers assumes.
        found = values.get(name, None if name == "quant_method" else wanted)
        if found != wanted:
            raise refused(f"{name} is {found!r}, and only {wanted!r} can be converted")
    sizes = values.get("weight_block_size")
    if (
        not isinstance(sizes, list)
        or len(sizes) != 2
        or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
    ):
        raise refused(f"weight_block_size is {sizes!r}, expected two positive integers")
    return Blocks(*sizes)


def refuse_quantized(path: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError if the checkpoint in folder ``path`` is quantized, with the command that converts it."""
    if read_blocks(path, config) is None:
        return
    out = f"{path}-bf16"
    raise ModelError(
        f"model.path {path}: the weights are in block-wise fp8, in which they can neither be trained nor pushed to an "
        f"engine; run async-rl dequantize {shlex.quote(str(path))} {shlex.quote(out)} and set model.path to {out}"
    )
