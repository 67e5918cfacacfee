"""What the Python that runs SGLang's server must have, asked of it before the server is started.

``python versions.py`` writes as JSON what there is, so that any Python can be asked: this file is the only one of ours
that it reads, and imports the standard library alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

SGLANG_VERSION = "0.5.23"

SETTING = "rollout.sglang.python"

# How long a Python may take to say what it has: it reads a few small files, which a network file system may have.
_ANSWER_S = 60.0


def found() -> dict[str, Any]:
    """Return the versions of this Python, of SGLang and of NCCL; None for what is not installed."""
    return {
        "python": list(sys.version_info[:2]),
        "sglang": _version("sglang"),
        "nccl": _version("nvidia-nccl-cu13") or _version("nvidia-nccl-cu12"),
    }


def fault(python: Path | None, *, nccl: bool) -> str | None:
    """Return in one line why the server cannot run under ``python``, None for this one; None if it can.

    ``nccl``: whether it is to share a communicator of NCCL with the trainer, whose packages are this Python's.
    """
    try:
        has = found() if python is None else _ask(python)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return f"{SETTING} is {python}, which is no Python that runs here ({_reason(error)}); set it to one that does"
    whose = "the run's Python" if python is None else f"{python} of {SETTING}"
    where = f"rollout.engine is sglang, but {whose}"
    if tuple(has["python"]) < (3, 11):
        version = ".".join(map(str, has["python"]))
        return f"{where} is Python {version}, and the server needs 3.11; make a virtual environment with that"
    if has["sglang"] is None:
        remedy = "install it there" if python is not None else f"run make setup ENGINE=sglang, or set {SETTING}"
        return f"{where} has no sglang; {remedy}"
    if has["sglang"] != SGLANG_VERSION:
        return (
            f"{where} has sglang {has['sglang']}, and this package was written for {SGLANG_VERSION}; "
            f"pip install sglang=={SGLANG_VERSION} there"
        )
    own = found()["nccl"]
    if nccl and has["nccl"] != own:
        return (
            f"sync.backend is nccl, but {whose} has NCCL {has['nccl']} and the trainer {own}, and NCCL connects equal "
            "versions only; install one version of nvidia-nccl-cu13 in both environments, or set sync.backend to auto"
        )
    return None


def _ask(python: Path) -> dict[str, Any]:
    """Return what ``found`` says in another Python. Raises OSError, SubprocessError and ValueError."""
    command = [str(python), "-I", str(Path(__file__).resolve())]
    asked = subprocess.run(command, capture_output=True, check=True, text=True, timeout=_ANSWER_S)
    has: dict[str, Any] = json.loads(asked.stdout)
    return has


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.strip().splitlines() or ["it said nothing"]
        return f"exit code {error.returncode}: {lines[-1]}"
    return "it did not say what it has" if isinstance(error, ValueError) else str(error)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.stdout.write(json.dumps(found()))
