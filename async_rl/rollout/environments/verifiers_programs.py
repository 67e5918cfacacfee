"""A change to verifiers 0.4, for machines without uv: its chat programs run under this interpreter.

The harnesses ``null`` and ``bash`` are a program that the library has uv run, in an environment made of packages from
an index; where there is no uv, it fetches that first. All packages of the program are verifiers' own, so that this
interpreter has them. The test that a rollout needs no uv fails where the library does so itself.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

_DONE = "_async_rl_runs_chat_programs"


def run_chat_programs_here() -> None:
    """Have runtimes on this machine run chat programs under this interpreter; all else is as before."""
    from verifiers.v1.harnesses.utils.launch import CHAT_PROGRAM_SOURCE
    from verifiers.v1.runtimes import SubprocessRuntime

    if hasattr(SubprocessRuntime, _DONE):
        return
    setattr(SubprocessRuntime, _DONE, True)
    before = SubprocessRuntime.prepare_uv_script

    async def prepare_uv_script(self: Any, script: str | bytes, *args: Any, **named: Any) -> list[str]:
        if script != CHAT_PROGRAM_SOURCE:
            prepared: list[str] = await before(self, script, *args, **named)
            return prepared
        return [sys.executable, str(_written(Path(self.scripts_dir), CHAT_PROGRAM_SOURCE))]

    SubprocessRuntime.prepare_uv_script = prepare_uv_script


def _written(folder: Path, source: str) -> Path:
    """Return the file of a program, in the folder in which the library has them, whole whoever writes it as well."""
    path = folder / f"{hashlib.sha256(source.encode()).hexdigest()}.py"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        building = path.with_suffix(f".{os.getpid()}")
        building.write_text(source)
        building.replace(path)
    return path
