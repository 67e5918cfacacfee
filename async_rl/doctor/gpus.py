"""Checks of this machine's GPUs against what a trainer rank takes, and what its attention kernels need.

The driver's program nvidia-smi is asked: torch would take seconds, and a GPU's memory.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from async_rl.config.memory_checks import float32_over_contexts
from async_rl.config.schema import RunConfig
from async_rl.doctor.check import Check
from async_rl.doctor.installation import installed_version
from async_rl.doctor.machine import uses_gpu
from async_rl.doctor.memory_plan import ClusterSpec, engine_faults, engine_memory, rank_fault
from async_rl.errors import ConfigError, ModelError
from async_rl.models.config import ModelConfig, check_run, read_model_config

_QUERY = ("nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits")
# cuDNN's fused attention takes packed sequences from Hopper on; FlashAttention 2 takes them from Ampere on, but no
# latent attention, whose keys and values differ in size.
_PACKED_BY_CUDNN, _PACKED_BY_FLASH_ATTENTION = (9, 0), (8, 0)
# Ada. Before it vLLM converts weights back for each product, and has nothing for a scale of each channel.
_PRODUCTS_IN_FP8 = (8, 9)


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the driver says of a GPU."""

    name: str
    capability: tuple[int, int]
    """Compute capability."""
    memory: int
    """Bytes."""


def found() -> list[Gpu]:
    """Return this machine's GPUs; empty where the driver's program is absent or fails."""
    try:
        said = subprocess.run(_QUERY, capture_output=True, text=True, check=True, timeout=30).stdout
        return [_read(line) for line in said.splitlines() if line.strip()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def suitable(config: RunConfig) -> Iterator[Check]:
    """Check that the GPUs have layers and attention kernels that are made for them, and memory for a trainer rank."""
    if not uses_gpu(config):
        return
    has_layers = installed_version("transformer-engine") is not None
    if not has_layers:
        yield Check(
            "transformer-engine",
            "warn",
            "not installed: the trainer computes with Megatron's own layers, which are slower",
            "run make setup DEVICE=cuda",
        )
    if (fault := float32_over_contexts(config)) is not None:
        yield Check("trainer.parallel.cp", "FAIL", fault, "set cp to 1, or model.dtype to bfloat16", ConfigError)
    try:
        model = read_model_config(config.model.path)
        check_run(config, model)
    except ModelError:
        return  # ``inputs.model`` reports it
    gpus = found()
    if not gpus:
        return
    smallest, oldest = min(gpus, key=lambda gpu: gpu.memory), min(gpus, key=lambda gpu: gpu.capability)
    yield from _quantized(config, oldest)
    if has_layers:  # the other ones have torch's attention, which any GPU computes
        yield from _kernels(oldest, model)
    spec = ClusterSpec(1, len(gpus), smallest.name, smallest.memory // 10**9)
    faults = [rank_fault(config, model, spec)]
    if config.resources.share_gpu:
        engine = engine_memory(config, model, spec.gb)
        faults += [f"does not fit: {fault}" for fault in engine_faults(config, engine, spec)]
    for fault in filter(None, faults):
        yield Check("GPU memory", "warn", f"{spec.gb} GB: {fault}", "see async-rl plan memory")
    if not any(faults):
        beside = " beside the engine" if config.resources.share_gpu else ""
        yield Check("GPU memory", "ok", f"a trainer rank fits into {spec.gb} GB{beside} by estimate")


def _quantized(config: RunConfig, gpu: Gpu) -> Iterator[Check]:
    kind = config.rollout.quantization
    if kind is None or gpu.capability >= _PRODUCTS_IN_FP8:
        return
    major, minor = gpu.capability
    fault = f"{kind}, but {gpu.name} has compute capability {major}.{minor}, and products in fp8 need 8.9"
    if kind == "fp8_per_channel":
        yield Check("rollout.quantization", "FAIL", fault, "set it to fp8_per_block, or use later GPUs", ConfigError)
    else:
        slower = f"{fault}: weights take half the memory, and are converted back for each product"
        yield Check("rollout.quantization", "warn", slower, "nothing, if memory is what counts")


def _kernels(gpu: Gpu, model: ModelConfig) -> Iterator[Check]:
    major, minor = gpu.capability
    shown = f"{gpu.name} has compute capability {major}.{minor}"
    if gpu.capability >= _PACKED_BY_CUDNN:
        return
    if gpu.capability < _PACKED_BY_FLASH_ATTENTION or model.latent is not None:
        needed = "9.0" if model.latent is not None else "8.0"
        yield Check(
            "attention",
            "FAIL",
            f"{shown}, and attention over packed sequences{' (latent)' * (model.latent is not None)} needs {needed}",
            "use GPUs of a later generation for the trainer",
        )
    elif installed_version("flash-attn") is None:
        yield Check(
            "attention",
            "FAIL",
            f"{shown}, on which attention over packed sequences needs flash-attn, and it is not installed",
            "run make setup DEVICE=cuda, or pip install flash-attn",
        )


def _read(line: str) -> Gpu:
    name, capability, mebibytes = (part.strip() for part in line.rsplit(",", 2))
    major, _, minor = capability.partition(".")
    return Gpu(name, (int(major), int(minor)), int(mebibytes) * 2**20)
