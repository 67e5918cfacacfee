"""A trainer ends with the processes that write its checkpoint.

Megatron-core 0.16.1 forks writers and waits for their results without looking at them: one that is killed, by the
system when memory runs out for example, makes it wait for ever, and with it every other rank. Here its death becomes
that of the trainer, which is started again from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator

import psutil

log = logging.getLogger(__name__)

_LOOK_S = 0.5


@contextlib.contextmanager
def end_with_writers() -> Iterator[None]:
    """Within it, this process ends at once when a child of it is killed."""
    over = threading.Event()
    before = {child.pid for child in psutil.Process().children()}

    def watch() -> None:
        while not over.wait(_LOOK_S):
            for child in psutil.Process().children():
                if child.pid not in before and _was_killed(child.pid):
                    log.error("a process that wrote the checkpoint was killed, so this trainer rank ends")
                    os._exit(1)

    watcher = threading.Thread(target=watch, name="writers", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _was_killed(pid: int) -> bool:
    """Without taking note of it: whoever started the child still can."""
    try:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return found is not None and found.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
