"""Changes to verifiers 0.4 for programs on this machine: a rollout needs neither uv nor a process, and leaves no file.

The harnesses ``null`` and ``bash`` are a program that the library has uv run, in an environment made of packages from
an index, and fetches uv first where there is none. All packages of the program are verifiers' own: here it runs under
this interpreter. As ``null`` it runs nothing but a conversation, which takes place in this process, since a new one
takes a second of a core for each turn of an environment that answers the policy. Tools write down their port in /tmp,
where the library leaves it. ``test_verifiers_v1.py`` says which of these it does without.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import traceback
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

from verifiers.v1.harnesses.utils.launch import CHAT_PROGRAM_SOURCE
from verifiers.v1.mcp import launch
from verifiers.v1.runtimes import ProgramResult, SubprocessRuntime

# With which the program runs commands of the policy, in the folder of its process.
_EXECUTES = "--bash"

_FILE = "--initial-messages-file="

_arguments: ContextVar[Sequence[str]] = ContextVar("arguments")


@functools.cache
def run_chat_programs_here() -> None:
    """Have the runtimes on this machine run chat programs so; all other programs run as before."""
    prepare, run = SubprocessRuntime.prepare_uv_script, SubprocessRuntime.run_program

    async def prepare_uv_script(self: Any, script: str | bytes, *args: Any, **named: Any) -> list[str]:
        if script != CHAT_PROGRAM_SOURCE:
            prepared: list[str] = await prepare(self, script, *args, **named)
            return prepared
        return [sys.executable, str(_written(Path(self.scripts_dir)))]

    async def run_program(self: Any, argv: list[str], env: dict[str, str]) -> Any:
        chat = argv[:2] == [sys.executable, str(_written(Path(self.scripts_dir)))]
        if not chat or env or _EXECUTES in argv:
            return await run(self, argv, env)
        here = f"{_FILE}{self.workdir}/"
        return await _talk([here + each.removeprefix(_FILE) if each.startswith(_FILE) else each for each in argv[2:]])

    read_port = launch._read_back_port

    async def read_back_port(runtime: Any, path: str) -> int:
        try:
            return int(await read_port(runtime, path))
        finally:
            if isinstance(runtime, SubprocessRuntime):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    SubprocessRuntime.prepare_uv_script, SubprocessRuntime.run_program = prepare_uv_script, run_program
    launch._read_back_port = read_back_port


def _written(folder: Path) -> Path:
    """Return the program's file, in the folder in which the library has such."""
    path = folder / f"{hashlib.sha256(CHAT_PROGRAM_SOURCE.encode()).hexdigest()}.py"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        building = path.with_suffix(f".{os.getpid()}")
        building.write_text(CHAT_PROGRAM_SOURCE)
        building.replace(path)
    return path


@functools.cache
def _program() -> ModuleType:
    """Return the program as a module, which does nothing until its ``main`` is called."""
    module = ModuleType("chat_program")
    exec(compile(CHAT_PROGRAM_SOURCE, module.__name__, "exec"), module.__dict__)
    parse = module.parse_args

    def parse_args() -> Any:
        before, sys.argv = sys.argv, [module.__name__, *_arguments.get()]
        try:
            return parse()
        finally:
            sys.argv = before

    module.parse_args = parse_args  # type: ignore[attr-defined]
    # It asks on loopback, without TLS; certificates would take as long to load each time as all else that it does.
    client = module.DefaultAsyncHttpxClient
    module.DefaultAsyncHttpxClient = lambda **_: client(verify=False)  # type: ignore[attr-defined]
    return module


async def _talk(arguments: Sequence[str]) -> Any:
    """Run the program with arguments in this task, and return what a process of it would have ended with."""
    _arguments.set(arguments)
    try:
        await _program().main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        return ProgramResult(status, "", traceback.format_exc())
    except Exception:  # noqa: BLE001 - the process would write it down and have failed
        return ProgramResult(1, "", traceback.format_exc())
    return ProgramResult(0, "", "")
