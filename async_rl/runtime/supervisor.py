"""A small parent process that ends every process of a run, however the driver ends, so that nothing outlives the run.

The driver runs in a forked child. This parent is a "child subreaper" (prctl(2)): descendants whose own parent died,
which would otherwise go to init and stay alive (Ray's agents do, for minutes), become its children. When the driver has
ended for any reason, all remaining descendants are ended too. If this parent is killed, the driver gets SIGTERM, shuts
down in order and ends its descendants by the same means. Knows nothing of what the processes do.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable

import psutil

from async_rl.runtime.process import (
    CHECKPOINT,
    INTERRUPTS,
    adopt_orphans,
    begin_run,
    ignore_interrupts,
    interrupt_once,
    remove_semaphores,
    signal_on_parent_death,
)

# Processes that are left after the driver's own shutdown get this long after SIGTERM before they are killed.
_GRACE_S = 3.0
_AWAITED = {*INTERRUPTS, CHECKPOINT, signal.SIGCHLD}


def supervise(body: Callable[[], int]) -> int:
    """Run ``body`` in a child process and return its exit code, 128 + n when signal n killed it.

    Call it before threads are started: it forks. SIGTERM, SIGINT and SIGUSR2 sent here are passed on; Ctrl-C reaches
    the child by the terminal's process group.
    """
    adopt_orphans()
    begin_run()
    sys.stdout.flush()
    sys.stderr.flush()
    # Blocked, not handled: only sigwaitinfo(2) says how a signal was sent.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    driver = os.fork()
    if driver == 0:
        _run_driver(body, before)
    try:
        status = _wait(driver)
    finally:
        _end_descendants()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        sys.stderr.write(f"async-rl: the driver was killed by {signal.Signals(-code).name}; every process was ended\n")
    return code if code >= 0 else 128 - code


def _wait(driver: int) -> int:
    """Pass signals on to the driver until it ends; return its status as of waitpid(2)."""
    while True:
        found = signal.sigwaitinfo(_AWAITED)
        if found.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(driver, os.WNOHANG)
            if ended:
                return status
        elif found.si_signo != signal.SIGINT or found.si_code <= 0:
            # A positive code is the kernel's: the terminal has sent SIGINT to the driver, too.
            os.kill(driver, found.si_signo)


def _run_driver(body: Callable[[], int], mask: Iterable[int]) -> None:
    """Run ``body`` in the child process, with the signals of ``mask`` blocked. Never returns."""
    parent = os.getppid()
    interrupt_once()
    signal.signal(CHECKPOINT, signal.SIG_IGN)  # until training begins
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    signal_on_parent_death(signal.SIGTERM)
    adopt_orphans()
    code = 1
    try:
        if os.getppid() == parent:  # the parent may have died before the call above took effect
            code = body()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001 - this process ends here with the trace of any exception
        sys.excepthook(*sys.exc_info())
    finally:
        ignore_interrupts()
        _end_descendants()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: atexit handlers and the frames above belong to the parent's copy.
        os._exit(code)


def _end_descendants() -> None:
    """Send SIGTERM, then SIGKILL, to the descendants of this process until there are none."""
    _, alive = psutil.wait_procs(_signal_all(psutil.Process.terminate), timeout=_GRACE_S)
    while alive:
        # The children of an ended process become children of this one, so repeat until the tree is empty.
        psutil.wait_procs(_signal_all(psutil.Process.kill), timeout=_GRACE_S)
        alive = psutil.Process().children(recursive=True)
    _reap()
    remove_semaphores()


def _signal_all(send: Callable[[psutil.Process], None]) -> list[psutil.Process]:
    processes = psutil.Process().children(recursive=True)
    for process in processes:
        try:
            send(process)
        except psutil.NoSuchProcess:
            continue
    return processes


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        return
