"""``async-rl dequantize``: writes a checkpoint in block-wise fp8 as one in bfloat16, for the trainer and the engines.

A weight is its float8_e4m3fn values as float32, times the float32 scale of their block, rounded to bfloat16 once: the
rule that came with DeepSeek-V3. Tensors in other types are copied. Memory: one file that is written, the
mapping of one that is read, and a strip of a weight. Knows torch and safetensors; no family of models.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from async_rl.errors import ConfigError, ModelError, ResourceError
from async_rl.models.checkpoint_files import SHARD_BYTES, write_checkpoint
from async_rl.models.config import checkpoint_shards, read_json
from async_rl.models.headers import PLAIN, Header, check_plain, listed, read_headers
from async_rl.models.quantization import KEYS, Blocks, read_blocks

_QUANTIZED = "F8_E4M3"
# DeepSeek's scales are float32, Qwen3's bfloat16; both are exact in float32.
_SCALES = ("F32", "BF16")
_SUFFIX = "_scale_inv"


@dataclass(frozen=True, slots=True)
class Plan:
    """A checkpoint whose headers were found to be complete."""

    source: Path
    config: Mapping[str, Any]
    """The contents of config.json."""
    blocks: Blocks
    tensors: Mapping[str, Header]
    """The tensors of all files, scales among them, by name."""

    @property
    def quantized(self) -> int:
        """The number of weights in fp8."""
        return sum(header.dtype == _QUANTIZED for header in self.tensors.values())

    @property
    def copied(self) -> int:
        """The number of weights in other types."""
        return sum(header.dtype != _QUANTIZED and not self.is_scale(name) for name, header in self.tensors.items())

    @property
    def bytes_written(self) -> int:
        """The bytes of all weights that are written."""
        return sum(
            2 * math.prod(header.shape) if header.dtype == _QUANTIZED else header.nbytes
            for name, header in self.tensors.items()
            if not self.is_scale(name)
        )

    def is_scale(self, name: str) -> bool:
        """Return whether a tensor is the scales of another."""
        return name.endswith(_SUFFIX) and name.removesuffix(_SUFFIX) in self.tensors


def read_plan(source: Path) -> Plan:
    """Read the headers of the checkpoint in folder ``source``.

    Raises ModelError naming the field of config.json, or the tensors, for which it cannot be converted.
    """
    config = read_json(source)
    blocks = read_blocks(source, config)
    tensors = read_headers(checkpoint_shards(source))
    if blocks is None:
        check_plain(source, tensors)
        raise ModelError(
            f"{source} is not quantized: config.json has no quantization_config; set model.path to it as it is"
        )
    if faults := [fault for name in sorted(tensors) for fault in _faults(name, tensors, blocks)]:
        raise ModelError(f"{source}: its weights are not in the fp8 of its config.json: {listed(faults)}")
    return Plan(source, config, blocks, tensors)


def _faults(name: str, tensors: Mapping[str, Header], blocks: Blocks) -> Iterator[str]:
    """Yield what is wrong with one tensor."""
    header = tensors[name]
    if name.endswith(_SUFFIX):
        weight = tensors.get(name.removesuffix(_SUFFIX))
        if weight is None or weight.dtype != _QUANTIZED:
            found = "is missing" if weight is None else f"is {weight.dtype}"
            yield f"{name} is surplus: {name.removesuffix(_SUFFIX)} {found}"
        return
    if header.dtype in PLAIN:
        return
    if header.dtype != _QUANTIZED:
        yield f"{name} is {header.dtype}, expected {_QUANTIZED} or one of {', '.join(PLAIN)}"
        return
    if len(header.shape) != 2:
        yield f"{name} is {list(header.shape)}, expected two dimensions"
        return
    scales, grid = tensors.get(name + _SUFFIX), blocks.grid(header.shape)
    if scales is None:
        yield f"{name}{_SUFFIX} is missing"
    elif scales.shape != grid:
        yield f"{name}{_SUFFIX} is {list(scales.shape)}, expected {list(grid)}"
    elif scales.dtype not in _SCALES:
        yield f"{name}{_SUFFIX} is {scales.dtype}, expected {' or '.join(_SCALES)}"


def dequantize(
    source: Path, out: Path, *, shard_bytes: int = SHARD_BYTES, report: Callable[[str], None] = lambda _: None
) -> Plan:
    """Write the checkpoint in folder ``source`` to ``out`` in bfloat16, with its other files; return what it was.

    config.json comes last, without quantization_config: no program takes an unfinished folder for a checkpoint. Calls
    ``report`` with a line for each file that is read. Raises ModelError where ``source`` cannot be converted,
    ConfigError unless ``out`` is empty or absent, and ResourceError, with what was written removed, where it cannot be
    written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; name another one")
    plan = read_plan(source)
    _check_room(out, plan.bytes_written)
    created = not out.exists()
    try:
        write_checkpoint(_weights(plan, report), out, shard_bytes=shard_bytes)
        _copy_others(plan, out)
    except BaseException as error:
        left = _remove(out, created=created)
        if isinstance(error, OSError | SafetensorError):
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise ResourceError(f"cannot write {source} to {out}: {reason}; {left}") from None
        raise
    return plan


def dequantized(weight: torch.Tensor, scales: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Return a weight float8_e4m3fn[out, in] in bfloat16, from its scales [ceil(out/rows), ceil(in/columns)].

    Computes in strips as high as a block, so that nothing as large as the weight exists in float32.
    """
    result = torch.empty(weight.shape, dtype=torch.bfloat16)
    strips = zip(weight.split(blocks.rows), result.split(blocks.rows), scales.float(), strict=True)
    for quantized, target, row in strips:
        target.copy_(quantized.float() * row.repeat_interleave(blocks.columns)[: weight.shape[1]])
    return result


def _weights(plan: Plan, report: Callable[[str], None]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight, file by file. One file is mapped at a time, and that of a scale which is in another."""
    files = sorted({header.file for header in plan.tensors.values()})
    for number, path in enumerate(files, start=1):
        report(f"reading {path.name}, {number} of {len(files)}")
        names = sorted(name for name, header in plan.tensors.items() if header.file == path and not plan.is_scale(name))
        with safe_open(path, framework="pt") as file:
            for name in names:
                tensor = file.get_tensor(name)
                if plan.tensors[name].dtype == _QUANTIZED:
                    tensor = dequantized(tensor, _read(plan.tensors[name + _SUFFIX].file, name + _SUFFIX), plan.blocks)
                yield name, tensor


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _copy_others(plan: Plan, out: Path) -> None:
    for file in plan.source.iterdir():
        if file.is_file() and ".safetensors" not in file.name and file.name != "config.json":
            shutil.copy2(file, out / file.name)
    config = {key: value for key, value in plan.config.items() if key not in KEYS}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _check_room(out: Path, nbytes: int) -> None:
    """Raise ResourceError if the disk of ``out`` has no room for so many bytes."""
    place = out.absolute()
    existing = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise ResourceError(
            f"{out} takes {nbytes / 10**9:.1f} GB, and {existing} has {free / 10**9:.1f} GB free; name a folder on "
            "another disk"
        )


def _remove(out: Path, *, created: bool) -> str:
    """Remove what was written to ``out``, and ``out`` itself if it is new; return what has become of it."""
    try:
        for path in out.iterdir() if out.is_dir() else ():
            path.unlink()
        if created and out.is_dir():
            out.rmdir()
    except OSError as error:
        return f"what was written is left in {out}, because it cannot be removed ({error.strerror}); remove it"
    return "what was written has been removed"
