"""What a process asks of the kernel for itself: its cores, and what becomes of it and its descendants. Linux only."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from signal import Signals

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36


def pin(cores: Iterable[int]) -> None:
    """Bind every thread of this process, and so whatever it starts later, to ``cores``."""
    chosen = tuple(cores)
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), chosen)
        except ProcessLookupError:
            continue  # the thread ended meanwhile


def signal_on_parent_death(number: Signals) -> None:
    """Have the kernel send ``number`` to this process when the *thread* that started it ends.

    The parent may have died before this call; whoever needs to know compares os.getppid() afterwards.
    """
    _prctl(_PR_SET_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, in place of init."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")
