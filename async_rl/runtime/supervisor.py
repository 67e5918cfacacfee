"""Nothing outlives a run: a small parent process that owns every process the run starts, whatever kills the driver.

The driver runs in a forked child. This parent is a "child subreaper" (prctl(2)): descendants whose own parent died,
which would otherwise go to init and live on (Ray's agents do, for minutes), become its children. When the driver has
ended, in whichever way, what is left below is ended too. If this parent is killed, the driver gets SIGTERM, shuts
down in good order and ends what is left by the same means.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import psutil

from async_rl.runtime.process import adopt_orphans, begin_run, remove_semaphores, signal_on_parent_death

# What is left after the driver's own shutdown gets this long to end by itself before it is killed.
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
    """The child: never returns."""
    parent = os.getppid()
    signal_on_parent_death(signal.SIGTERM)
    adopt_orphans()
    code = 1
    try:
        if os.getppid() == parent:  # the parent may have died before the call above took effect
            code = body()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001 - whatever it is, this process ends here with its trace
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
    """SIGTERM, then SIGKILL, whatever is left below this process, until nothing is."""
    _, alive = psutil.wait_procs(_signal_all(psutil.Process.terminate), timeout=_GRACE_S)
    while alive:
        # Ending a process hands its children to us, so look again until the tree is empty.
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
