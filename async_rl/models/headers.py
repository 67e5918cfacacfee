"""The headers of safetensors files: which tensors a checkpoint has, of which types and shapes, without their data.

Light on purpose: no torch and no safetensors. Knows ``errors`` alone.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from async_rl.errors import ModelError

# The types, in the words of safetensors, of weights that are what they say: others need scales, or tables, beside them.
PLAIN = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Header:
    """What a file's header says of one tensor."""

    file: Path
    dtype: str
    """In the words of safetensors: ``BF16``, ``F8_E4M3``."""
    shape: tuple[int, ...]
    nbytes: int


def read_header(file: Path) -> dict[str, Header]:
    """Return the tensors of one file by name. Raises ValueError where it is cut short, or is not in the format."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError("its header is longer than the file")
            entries = json.loads(stream.read(length))
            found = {
                name: Header(
                    file, entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0]
                )
                for name, entry in entries.items()
                if name != "__metadata__"
            }
        except (struct.error, ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not in safetensors format: {error}") from None
    expected = 8 + length + sum(header.nbytes for header in found.values())
    if size != expected:
        raise ValueError(f"{file} has {size} bytes, and its header describes {expected}: copy or download it again")
    return found


def read_headers(shards: Iterable[Path]) -> dict[str, Header]:
    """Return the tensors of a checkpoint's files by name. Raises ModelError naming a file that is damaged."""
    found: dict[str, Header] = {}
    for shard in shards:
        try:
            found |= read_header(shard)
        except (OSError, ValueError) as error:
            raise ModelError(str(error)) from None
    return found


def check_plain(path: Path, headers: Mapping[str, Header]) -> None:
    """Raise ModelError naming a tensor of a checkpoint in folder ``path`` whose values are quantized."""
    quantized = [f"{name} is {header.dtype}" for name, header in headers.items() if header.dtype not in PLAIN]
    if quantized:
        raise ModelError(
            f"model.path {path}: {listed(quantized)}, but config.json has no quantization_config that says how to read "
            "it; use the config.json that was published with these weights"
        )


def listed(faults: list[str]) -> str:
    """Return faults as one line, which names five of them at most."""
    return "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
