"""The NUMA node that the GPUs of this process hang on, and its cores. Knows NVML and /sys; ``process`` binds to them.

Memory follows the cores: Linux takes a page from the node of the core that first touches it, while that has any left.

Source: nvmlDeviceGetPciInfo in NVIDIA's NVML; numa_node and cpulist in the kernel's Documentation/ABI.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from async_rl.config.operation import ResourcesSection
from async_rl.runtime.cores import CoreShare

log = structlog.get_logger(__name__)

# The thread that launches kernels, autograd's, NCCL's and one that copies: a process that finds fewer cores near its
# GPUs is better off on all that its container has.
LEAST_CORES = 4


@dataclass(frozen=True, slots=True)
class NearGpus:
    """What of this host is near the GPUs of this process."""

    nodes: tuple[int, ...]
    """The NUMA node of each GPU, in the order in which this process counts them."""
    cores: tuple[int, ...]
    """The cores of these nodes that this process may use."""


def own_cores(share: CoreShare | None, resources: ResourcesSection) -> tuple[int, ...] | None:
    """Return the cores that this process, or the engine that it starts, computes on; None for any.

    On CPU those are of its ``share``, on GPUs those near its GPUs.
    """
    if share is not None:
        return share.of(sorted(os.sched_getaffinity(0)))
    near = near_gpus(resources)
    return None if near is None else near.cores


def near_gpus(resources: ResourcesSection) -> NearGpus | None:
    """Return what is near the GPUs of this process; None on CPU, if resources.numa_bind is off, and where unknown."""
    return _near_own_gpus() if resources.device == "cuda" and resources.numa_bind else None


@functools.cache  # what it warns of, it warns of once
def _near_own_gpus() -> NearGpus | None:
    return near(lambda: pci_addresses(os.environ.get("CUDA_VISIBLE_DEVICES")), os.sched_getaffinity(0))


def near(gpus: Callable[[], Sequence[str]], allowed: Collection[int], sysfs: Path = Path("/sys")) -> NearGpus | None:
    """Return what is near GPUs, for a process that may use the ``allowed`` cores.

    gpus: returns their PCI addresses, for example ``0000:1b:00.0``; asked only where there are several nodes with
    cores. None where there are not, where the node of a GPU is unknown (virtual machines hide it), and where too few
    of its cores are allowed.
    """
    of_node = dict(_cores_by_node(sysfs))
    if len(of_node) < 2:
        return None
    try:
        addresses = gpus()
        nodes = tuple(int((sysfs / "bus/pci/devices" / address / "numa_node").read_text()) for address in addresses)
    except (RuntimeError, OSError, ValueError) as error:
        log.warning("numa_unknown", reason=str(error))
        return None
    if not nodes or not set(nodes) <= set(of_node):
        log.info("numa_unknown", reason=f"the GPUs' nodes are {nodes}, those with cores {tuple(of_node)}")
        return None
    cores = tuple(sorted({core for node in nodes for core in of_node[node]}.intersection(allowed)))
    if len(cores) < min(LEAST_CORES, len(allowed)):
        log.warning("numa_not_bound", nodes=nodes, cores=cores, allowed=len(allowed), needed=LEAST_CORES)
        return None
    log.info("numa_bound", nodes=nodes, cores=len(cores))
    return NearGpus(nodes, cores)


def pci_addresses(visible: str | None, nvml: Any = None) -> list[str]:
    """Return the PCI addresses of the GPUs that CUDA_VISIBLE_DEVICES names, in its order, or of all.

    nvml: the module ``pynvml``, or what stands in for it. Raises RuntimeError where NVML is missing or fails.
    """
    nvml = _pynvml() if nvml is None else nvml
    try:
        nvml.nvmlInit()
        try:
            return [_pci_address(nvml.nvmlDeviceGetPciInfo(handle)) for handle in _handles(visible, nvml)]
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        raise RuntimeError(f"NVML: {error}") from error


def _pynvml() -> Any:
    try:
        import pynvml
    except ImportError:
        raise RuntimeError("nvidia-ml-py is not installed; run make setup DEVICE=cuda") from None
    return pynvml


def _handles(visible: str | None, nvml: Any) -> Iterator[Any]:
    if visible is None:
        yield from map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        return
    for name in filter(None, (name.strip() for name in visible.split(","))):
        if name.isdecimal():
            yield nvml.nvmlDeviceGetHandleByIndex(int(name))
        else:
            yield nvml.nvmlDeviceGetHandleByUUID(name)


def _pci_address(info: Any) -> str:
    """Return an address as the kernel writes it: domain:bus:device.function."""
    return f"{info.domain:04x}:{info.bus:02x}:{info.device:02x}.0"


def _cores_by_node(sysfs: Path) -> Iterator[tuple[int, set[int]]]:
    """Yield the cores of each NUMA node that has some: memory of some GPUs and of CXL devices is a node without."""
    for folder in sorted((sysfs / "devices/system/node").glob("node[0-9]*")):
        try:
            cores = set(_numbers((folder / "cpulist").read_text()))
        except (OSError, ValueError):
            continue
        if cores:
            yield int(folder.name.removeprefix("node")), cores


def _numbers(text: str) -> Iterator[int]:
    """Yield the numbers of a list such as ``0-3,8-11``."""
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)
