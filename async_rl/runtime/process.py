"""Requests of a process to the kernel: its cores, its signals, what happens to its descendants. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import secrets
import signal
from collections.abc import Iterable, Iterator
from multiprocessing import shared_memory
from pathlib import Path
from signal import Signals

DUMP_STACKS = Signals.SIGUSR1
CHECKPOINT = Signals.SIGUSR2
INTERRUPTS = (Signals.SIGINT, Signals.SIGTERM)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36

_SEMAPHORES = Path("/dev/shm")
_RUN_TOKEN = "ASYNC_RL_RUN_TOKEN"


def pin(cores: Iterable[int]) -> None:
    """Bind every thread of this process, and all threads and processes that it starts later, to ``cores``."""
    chosen = tuple(cores)
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), chosen)
        except ProcessLookupError:
            continue  # the thread ended meanwhile


@contextlib.contextmanager
def starting_on(cores: Iterable[int] | None) -> Iterator[None]:
    """Run what is started within the block on ``cores``; this process returns to its own cores after the block.

    None changes nothing.
    """
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    pin(cores)
    try:
        yield
    finally:
        pin(before)


def signal_on_parent_death(number: Signals) -> None:
    """Have the kernel send ``number`` to this process when the *thread* that started it ends.

    The parent may have died before this call. To find out, compare os.getppid() afterwards.
    """
    _prctl(_PR_SET_PDEATHSIG, number)


def interrupt_once() -> None:
    """Have the first SIGINT or SIGTERM raise KeyboardInterrupt in the main thread, and all later ones do nothing.

    A second one would interrupt what the first one has begun to end, and libraries in C++ abort the process then.
    """

    def interrupt(_number: int, _frame: object) -> None:
        ignore_interrupts()
        raise KeyboardInterrupt

    for number in INTERRUPTS:
        signal.signal(number, interrupt)


def ignore_interrupts() -> None:
    """Have SIGINT and SIGTERM do nothing from now on: this process ends already."""
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, instead of init."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def dump_stacks_to(path: Path) -> None:
    """Have this process append the stacks of its threads to ``path`` when it gets DUMP_STACKS, even if it hangs."""
    faulthandler.register(DUMP_STACKS, path.open("a"), all_threads=True)


def release_freed_memory() -> None:
    """Return freed memory to the system: glibc keeps all that lies below a block in use."""
    ctypes.CDLL(None).malloc_trim(0)


def begin_run() -> None:
    """Give this process and its descendants a token that marks what they leave in shared memory."""
    os.environ[_RUN_TOKEN] = f"async_rl-{os.getpid()}-{secrets.token_hex(4)}"


def run_token() -> dict[str, str]:
    """Return the run's token as environment of processes that another host starts; empty outside a run."""
    return {_RUN_TOKEN: token} if (token := os.environ.get(_RUN_TOKEN)) is not None else {}


def mark_semaphores(role: str) -> None:
    """Name the semaphores that multiprocessing makes in this process and its children after the run and ``role``.

    They are files in shared memory. Python unlinks them in a helper process, which a kill of the run ends too; those of
    an earlier process of this role are unlinked here.
    """
    if (token := os.environ.get(_RUN_TOKEN)) is not None:
        remove_semaphores(role)
        # There is no public way; Python itself names them by this entry.
        multiprocessing.current_process()._config["semprefix"] = f"/{token}-{role}"  # type: ignore[attr-defined]


def mark_shared_memory() -> str | None:
    """Name the shared memory that Python makes in this process as its semaphores: one that is killed cannot unlink it.

    Returns what such names begin with, for files that are made otherwise. None, and nothing is changed, if
    ``mark_semaphores`` was called neither here nor in a process that started this one.
    """
    prefix = multiprocessing.current_process()._config["semprefix"]  # type: ignore[attr-defined]
    if prefix == "/mp":  # Python's own
        return None
    mark = f"sem.{prefix[1:]}"
    shared_memory._make_filename = lambda: f"/{mark}-{secrets.token_hex(4)}"  # type: ignore[attr-defined]
    return mark


def marked_file(role: str, what: str) -> Path | None:
    """Return a path in shared memory for a library's file, which is removed as the semaphores of ``role`` are.

    None outside a run.
    """
    token = os.environ.get(_RUN_TOKEN)
    return None if token is None else _SEMAPHORES / f"sem.{token}-{role}-{what}"


def remove_semaphores(role: str = "*") -> None:
    """Unlink the semaphores that marked processes of this run left on this host; call it when they have ended."""
    if (token := os.environ.get(_RUN_TOKEN)) is not None:
        for path in _SEMAPHORES.glob(f"sem.{token}-{role}-*"):
            path.unlink(missing_ok=True)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")
