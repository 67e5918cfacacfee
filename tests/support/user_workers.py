"""Worker processes of users' functions: which there are, and that they end."""

import time

import psutil


def workers() -> list[psutil.Process]:
    """The worker processes of this process, and what they have forked."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "loky.backend.popen_loky_posix" in process.cmdline():  # A zombie has no command line.
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def wait_for_no_workers(seconds: float = 60.0) -> None:
    """Wait until there are none; those that remain are killed, and the test fails."""
    end = time.monotonic() + seconds
    while (left := workers()) and time.monotonic() < end:
        time.sleep(0.01)
    for process in left:
        process.kill()
    assert not left, f"these were left behind: {left}"
