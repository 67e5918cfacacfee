"""What SGLang 0.5.23 imports and never calls on a CPU, so that it starts where there is no GPU.

Installed by ``launcher`` in each process of the server, and only where torch finds no GPU: on one, SGLang has its real
dependencies, in a virtual environment of its own (rollout.sglang.python).
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

# The first prepares images. The second has kernels, and its build for CPUs is on no package index: of it, only
# functions for CPUs are imported without a fallback, whose names end so.
_MODULES = {
    "torchvision": "",
    "torchvision.transforms": "InterpolationMode",
    "torchvision.transforms.functional": "InterpolationMode",
    "sgl_kernel": "_cpu",
}
"""{module: how the names end that it seems to have}"""


def install() -> None:
    """Let the modules above be imported, with functions that refuse to be called, where they are not installed."""
    from transformers.utils import is_torchvision_available

    # Cached from now on: transformers has image processors that take torchvision, where it is, for the real one.
    is_torchvision_available()
    for name, ending in _MODULES.items():
        root = name.partition(".")[0]
        if not isinstance(sys.modules.get(root), _StandIn) and importlib.util.find_spec(root) is not None:
            continue
        sys.modules[name] = _StandIn(name, ending)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])


def allocate_host_memory() -> None:
    """Have SGLang's cache of routed experts in ordinary memory: by default it registers it with CUDA."""
    import torch
    from sglang.srt.mem_cache.pool_host import common

    def allocate(dims: tuple[int, ...], dtype: torch.dtype, device: str, **_: Any) -> torch.Tensor:
        return torch.empty(dims, dtype=dtype, device=device)

    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate


class _StandIn(ModuleType):
    """A module of functions that cannot be called."""

    def __init__(self, name: str, ending: str) -> None:
        super().__init__(name)
        self._ending = ending
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not self._ending or not name.endswith(self._ending):
            raise AttributeError(name)
        return functools.partial(_refuse, f"{self.__name__}.{name}")


def _refuse(name: str, *_: Any, **__: Any) -> Any:
    raise NotImplementedError(f"{name} is not installed, and SGLang was not expected to call it on a CPU")
