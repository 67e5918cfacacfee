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
from collections.abc import Callable

import psutil

from async_rl.runtime.process import adopt_orphans, begin_run, remove_semaphores, signal_on_parent_death

# Processes that are left after the driver's own shutdown get this long after SIGTERM before they are killed.
_GRACE_S = 3.0


def supervise(body: Callable[[], int]) -> int:
    """Run ``body`` in a child process and return its exit code, 128 + n when signal n killed it.

    Call it before threads are started: it forks. Ctrl-C reaches the child by the terminal's process group; SIGTERM
    sent here is passed on.
    """
    adopt_orphans()
    begin_run()
    sys.stdout.flush()
    sys.stderr.flush()
    driver = os.fork()
    if driver == 0:
        _run_driver(body)
    handlers = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda _number, _frame: _forward(driver)),
    }
    try:
        _, status = os.waitpid(driver, 0)
    finally:
        _end_descendants()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        sys.stderr.write(f"async-rl: the driver was killed by {signal.Signals(-code).name}; every process was ended\n")
    return code if code >= 0 else 128 - code


def _run_driver(body: Callable[[], int]) -> None:
    """Run ``body`` in the child process. Never returns."""
    parent = os.getppid()
    signal_on_parent_death(signal.SIGTERM)
    adopt_orphans()
    code = 1
    try:
        if os.getppid() == parent:  # the parent may have died before the call above took effect
            code = body()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001 - this process ends here with the trace of any exception
        sys.excepthook(*sys.exc_info())
    finally:
        _end_descendants()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: atexit handlers and the frames above belong to the parent's copy.
        os._exit(code)


def _forward(driver: int) -> None:
    os.kill(driver, signal.SIGTERM)


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
