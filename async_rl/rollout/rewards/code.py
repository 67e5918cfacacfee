"""Rewards that run code which a model wrote, each time in a process of its own.

Knows only ``types`` and ``errors``, and of ``user_function`` how to say that a function limits its own time.

Always limited: time, memory of a process, size of a file, output kept, environment and open files inherited; the code
has the standard library only, and its folder goes in the end. Where the kernel grants new namespaces (``isolation``
tells), it has no network, can neither signal nor trace other processes nor read their environment, writes to its own
folder only, and whatever it started ends with it. Elsewhere, as in most containers, the limits stop accidents but no
intent: code may then do to network and processes what this user may, for example kill the worker, outlive its
supervisor or, if the user is root, start processes after all.

Where the kernel has Landlock (5.13 or newer, also in containers), code opens its own folder, Python and the system's
libraries and programs, and nothing else: neither the dataset with the outputs that are expected of it, nor keys and
passwords, nor the environment of other processes. Elsewhere it reads what this user may read.

Nowhere prevented: connecting to Unix sockets by path, and filling the disk with many small files while it runs. Against
code that is hostile, put a virtual machine around the worker.
"""

from __future__ import annotations

import asyncio
import functools
import math
import os
import re
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import psutil

from async_rl.errors import RewardError
from async_rl.rollout.user_function import limits_own_time
from async_rl.types import Prompt

# Programs at one time, unless reward.workers says. Each may keep a core busy: with more than there are cores, the time
# of one would run out because of its neighbours. Eight take 4 GiB at their default memory.
MAX_SANDBOXES = min(8, len(os.sched_getaffinity(0)))

_sandboxes = MAX_SANDBOXES
_places: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

# Seconds for Python to start, 0.05 on an idle machine; they do not count as the code's. Seconds for what was killed to
# end; only what escaped its supervisor, or hangs in the kernel, takes them all.
STARTUP_S, END_S = 10.0, 2.0

# CLONE_NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET: in one call, hence all or none.
_NAMESPACES = 0x20000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000
# landlock_create_ruleset; the two numbers after it are landlock_add_rule and landlock_restrict_self.
_LANDLOCK = 444
# Exit status after MemoryError. Code that exits with it of its own accord passes for such: it is wrong either way.
_NO_MEMORY = 247

# Sets limits on itself; a preexec_fn would run in a copy of this process, with the locks of its threads. Then forks,
# because a new process namespace begins with the child: the parent supervises, the child becomes the code.
_BOOTSTRAP = """
import ctypes, os, resource, signal, sys

worker, namespaces, cpu, memory, file, processes, no_memory, landlock = map(int, sys.argv[1:])
libc, folder = ctypes.CDLL(None), os.getcwd().encode()

def limit(what, amount):
    amount = min(amount, resource.getrlimit(what)[1] % 2**64)  # Unlimited is -1.
    resource.setrlimit(what, (amount, amount))

def hide_other_files():
    version = libc.syscall(landlock, None, 0, 1)
    if version < 1:
        return  # This kernel has no Landlock.
    # All rights to files and folders that its version knows: 13 at first, then moving between folders, then truncation.
    handled = (1 << 13 + min(version - 1, 2)) - 1
    ruleset = libc.syscall(landlock, (ctypes.c_uint64 * 1)(handled), 8, 0)
    def allow(path, rights):
        try:
            there = os.open(path, os.O_PATH)
        except OSError:
            return  # Not every system has it.
        rule = rights.to_bytes(8, sys.byteorder) + there.to_bytes(4, sys.byteorder)
        libc.syscall(landlock + 1, ruleset, 1, rule, 0)
        os.close(there)
    allow(".", handled)
    for path in (
        *(sys.base_prefix + "/" + name for name in ("bin", "lib", "lib64")),
        *("/bin", "/usr/bin", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/proc/self"),
        "/sys/devices/system/cpu",
    ):
        allow(path, 13)  # Execute, read files and folders.
    # Without it, Python does not start.
    configuration = os.path.dirname(os.path.dirname(sys.executable)) + "/pyvenv.cfg"
    for path in (
        *(sys.executable, configuration, "/etc/ld.so.cache", "/etc/localtime"),
        *("/proc/cpuinfo", "/proc/meminfo", "/proc/stat"),
    ):
        allow(path, 5)  # Execute, read.
    for name in "null", "zero", "full", "random", "urandom":
        allow("/dev/" + name, 6)  # Write, read.
    if libc.syscall(landlock + 2, ruleset, 0):
        os._exit(1)
    os.close(ruleset)

limit(resource.RLIMIT_CORE, 0)
limit(resource.RLIMIT_CPU, cpu)
limit(resource.RLIMIT_AS, memory)
limit(resource.RLIMIT_FSIZE, file)
limit(resource.RLIMIT_NOFILE, 64)
if os.getuid() == 0:  # RLIMIT_NPROC does not hold for the real user 0; access to files goes by the effective one.
    try:
        os.setresuid(65534, 0, 0)
    except OSError:
        pass
apart = libc.unshare(namespaces) == 0
if apart:  # All mounts read-only (mount_setattr), then the own folder, as a mount, writable again.
    libc.mount(folder, folder, None, 4096, None)
    libc.syscall(442, -100, b"/", 0x8000, (ctypes.c_uint64 * 4)(1), 32)
    libc.syscall(442, -100, folder, 0, (ctypes.c_uint64 * 4)(0, 1), 32)
    os.chdir(folder)
libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())  # With none, no limit can be raised again.
libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
libc.prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL; after the change of credentials, which clears it.
libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: without a namespace, what the code leaves behind comes to the supervisor.
if os.getppid() != worker or not os.read(0, 1):  # Until the worker has this process in hand, no code runs.
    os._exit(1)
child = os.fork()
if child:
    _, status, usage = os.wait4(child, 0)
    try:
        while True:
            for pid in open(f"/proc/self/task/{os.getpid()}/children").read().split():
                os.kill(int(pid), 9)
            os.wait()
    except OSError:
        pass  # There are none left.
    if os.WIFEXITED(status):
        os._exit(os.WEXITSTATUS(status))
    number = os.WTERMSIG(status)
    if number == 9 and usage.ru_utime + usage.ru_stime > cpu - 0.1:
        number = signal.SIGXCPU  # A namespace's first process ignores it, so that RLIMIT_CPU ends in SIGKILL.
    if number != 9:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(255)

libc.prctl(1, 9)
os.setpgid(0, 0)  # A signal to one's own group would reach the supervisor, in whatever namespace.
if apart and processes:  # Supervisor and code count. Without a namespace, so would all else that the user runs.
    limit(resource.RLIMIT_NPROC, processes + 2)
elif not processes:
    limit(resource.RLIMIT_NPROC, 0)
hide_other_files()
os.write(1, b"!")
sys.argv = ["program.py"]
main = sys.modules["__main__"] = type(sys)("__main__")
try:
    exec(compile(open("program.py", "rb").read(), "program.py", "exec"), vars(main))
except MemoryError:
    os.write(2, b"MemoryError\\n")
    sys.exit(no_memory)
"""

_PROBE = """
import os
apart, read_only = os.getpid() == 1, os.statvfs("/").f_flag & os.ST_RDONLY
try:
    hidden = not os.listdir("/")
except PermissionError:
    hidden = True
print("namespaces: no network, no hold on other processes" if apart else "no namespaces: network, processes in reach")
if hidden:
    print("other files can be neither read nor written")
else:
    print("other files read-only" if apart and read_only else "other files as readable and writable as for this user")
try:
    os.fork() or os._exit(0)
    print("can start processes")
except OSError:
    print("cannot start processes")
"""

HIDDEN = "neither read nor written"
"""Part of what ``isolation`` returns where code opens its own folder and Python's libraries only."""

# Any line that begins with a fence closes a block: else many unclosed ones would take quadratic time.
_BLOCK = re.compile(r"^[ \t]*```python[^\n]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)

Status = Literal["ok", "error", "timeout", "memory", "killed"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use.

    wall_s: seconds from the start of the code. cpu_s: seconds of one process, rounded up to whole ones. memory_bytes:
    address space of one process, of which the interpreter takes some 30 MB. file_bytes: size of one written file.
    output_bytes: what is kept of stdout and stderr together; the rest is read and dropped. processes: how many
    processes and threads the code may start; without namespaces, 0 or any number.
    """

    wall_s: float = 5.0
    cpu_s: float = 5.0
    memory_bytes: int = 512 * 2**20
    file_bytes: int = 2**20
    output_bytes: int = 64 * 2**10
    processes: int = 0


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended.

    status: ok, exit status 0; error, another one; timeout, wall_s or cpu_s; memory, a MemoryError that it did not
    catch; killed, by a signal. returncode: the exit status, or minus the signal. stdout, stderr: what was kept, U+FFFD
    for what is not UTF-8. truncated: there was more.
    """

    status: Status
    returncode: int | None
    stdout: str
    stderr: str
    truncated: bool = False


def limit_sandboxes(number: int | None) -> None:
    """Let this many programs run at one time per event loop, of which a process has one as a rule; None: MAX_SANDBOXES.

    It does not count programs that have begun before.
    """
    global _sandboxes
    _sandboxes = number or MAX_SANDBOXES
    _places.clear()


async def run_python(code: str, stdin: str = "", limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Run ``code`` as a program, after a wait for a place; ends it when cancelled.

    Raises RewardError, with the reason, if a sandbox cannot be set up; never because of the code.
    """
    async with _places.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(_sandboxes)):
        folder = tempfile.TemporaryDirectory(prefix="async_rl_code_", ignore_cleanup_errors=True)
        try:
            program = code.encode("utf-8", "surrogatepass")
            Path(folder.name, "program.py").write_bytes(program)  # noqa: ASYNC240 - a few KiB
            return await _run(folder.name, stdin.encode("utf-8", "surrogatepass"), limits)
        finally:
            await asyncio.to_thread(folder.cleanup)  # The code may have left any number of files.


async def passes_tests(code: str, tests: Sequence[tuple[str, str]], limits: Limits = DEFAULT_LIMITS) -> float:
    """Return the share of the pairs (stdin, expected stdout) for which ``code`` exits with 0 and prints as expected.

    White space at the end of each line and of the whole is ignored. Raises ValueError when there are no pairs, and
    RewardError as ``run_python`` does.
    """
    if not tests:
        raise ValueError("there are no tests to pass")
    outcomes = await asyncio.gather(*(run_python(code, stdin, limits) for stdin, _ in tests))
    passed = [
        outcome.status == "ok" and not outcome.truncated and _lines(outcome.stdout) == _lines(expected)
        for outcome, (_, expected) in zip(outcomes, tests, strict=True)
    ]
    return sum(passed) / len(passed)


@limits_own_time
async def unit_tests(prompt: Prompt, response: str) -> float:
    """Return the share of the row's ``tests``, a list of {"stdin", "stdout"}, that the response's program passes.

    The program is the last ```python block, or the whole response if there is none. Each run has the time of
    ``Limits``, which begins after the wait for a place; ``reward.timeout_s`` does not hold, so that programs that loop
    cost time but end nothing. Raises ValueError if the row has no such field, RewardError as ``run_python``.
    """
    tests = prompt.fields.get("tests")
    if not (isinstance(tests, Sequence) and tests and all(map(_is_test, tests))):
        raise ValueError(
            "the dataset row needs a field 'tests' for this reward, a list of {'stdin': text, 'stdout': text}; "
            + (f"row {prompt.row} has {tests!r:.200}" if "tests" in prompt.fields else f"row {prompt.row} has none")
        )
    blocks = _BLOCK.findall(response)
    return await passes_tests(blocks[-1] if blocks else response, [(test["stdin"], test["stdout"]) for test in tests])


@functools.cache
def isolation() -> str:
    """Describe the isolation that this host grants a program in a sandbox. Blocks for some 0.2 s the first time.

    Raises RewardError as ``run_python``, or if that program fails.
    """
    with ThreadPoolExecutor(1) as thread:  # An event loop may be running in this one.
        outcome = thread.submit(lambda: asyncio.run(run_python(_PROBE))).result()
    if outcome.status != "ok":
        raise RewardError(f"a sandbox for code does not work here: {outcome}")
    return "; ".join(outcome.stdout.splitlines())


async def _run(folder: str, stdin: bytes, limits: Limits) -> Outcome:
    cpu_s = math.ceil(limits.cpu_s)
    caps = (limits.memory_bytes, limits.file_bytes, limits.processes)
    numbers = (os.getpid(), _NAMESPACES, cpu_s, *caps, _NO_MEMORY, _LANDLOCK)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _BOOTSTRAP, *map(str, numbers)),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        cwd=folder,
        env={"LANG": "C.UTF-8", "PATH": os.defpath},
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    stdout, stderr, room, timed_out = bytearray(), bytearray(), limits.output_bytes, False
    tasks: list[asyncio.Task[None]] = []

    async def keep(stream: asyncio.StreamReader, kept: bytearray) -> None:
        nonlocal room
        while chunk := await stream.read(2**16):
            kept += chunk[: max(0, room)]
            room -= len(chunk)
            if room < 0:  # An endless print would keep the event loop busy.
                await asyncio.sleep(0.001)

    try:
        # Cancelled any earlier, asyncio kills the process that it started, and no other: code that has taken back the
        # wish to end with its parent would live on.
        process.stdin.write(b"!")
        await _started(process.stdout, process.stderr)
        tasks += map(asyncio.create_task, (keep(process.stdout, stdout), keep(process.stderr, stderr)))
        tasks.append(asyncio.create_task(_feed(process.stdin, stdin)))
        try:
            async with asyncio.timeout(limits.wall_s):
                await process.wait()
        except TimeoutError:
            timed_out = True
    finally:
        await _end(process, tasks)
    status = "timeout" if timed_out else _status(process.returncode)
    printed, complained = (kept.decode(errors="replace") for kept in (stdout, stderr))
    return Outcome(status, process.returncode, printed, complained, truncated=room < 0)


async def _started(stdout: asyncio.StreamReader, stderr: asyncio.StreamReader) -> None:
    """Wait for the byte that precedes the code's own output: a sandbox that fails must not count as code that does."""
    try:
        async with asyncio.timeout(STARTUP_S):
            if await stdout.read(1):
                return
            why = (await stderr.read()).decode(errors="replace")
    except TimeoutError:
        why = f"Python did not start within {STARTUP_S:g} s"
    raise RewardError(f"cannot set up a sandbox for code: {why}")


async def _feed(stream: asyncio.StreamWriter, text: bytes) -> None:
    with suppress(ConnectionError):  # The code need not read it all.
        stream.write(text)
        await stream.drain()
    stream.close()


async def _end(process: asyncio.subprocess.Process, tasks: Sequence[asyncio.Task[None]]) -> None:
    """Kill what still runs and see it end. The tasks empty the pipes meanwhile, or asyncio would not see it."""
    ends = [asyncio.create_task(process.wait()), *tasks]
    if process.returncode is None:
        children: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children()
            for child in children:  # The code. The supervisor sees it end, clears up after it, and ends.
                child.kill()
        if children:
            await asyncio.wait(ends, timeout=END_S)
    if process.returncode is None:  # Not yet so far as to have a child, or stopped by it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    _, hanging = await asyncio.wait(ends, timeout=END_S)
    for task in hanging:
        task.cancel()


def _status(returncode: int | None) -> Status:
    known: dict[int | None, Status] = {0: "ok", -signal.SIGXCPU: "timeout", _NO_MEMORY: "memory"}
    return known.get(returncode) or ("error" if returncode is not None and returncode > 0 else "killed")


def _is_test(test: Any) -> bool:
    return isinstance(test, Mapping) and all(isinstance(test.get(key), str) for key in ("stdin", "stdout"))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
