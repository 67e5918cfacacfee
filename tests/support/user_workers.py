"""Worker processes of users' functions: which there are, and that they end."""

import time

import psutil

from tests.support.processes import words


def workers() -> list[psutil.Process]:
    """The worker processes of this process, and what they have forked."""
    below = psutil.Process().children(recursive=True)
    return [each for each in below if "loky.backend.popen_loky_posix" in words(each)]  # A zombie has no command line.


def wait_for_no_workers(seconds: float = 60.0) -> None:
    """Wait until there are none; those that remain are killed, and the test fails."""
    end = time.monotonic() + seconds
    while (left := workers()) and time.monotonic() < end:
        time.sleep(0.01)
    for process in left:
        process.kill()
    assert not left, f"these were left behind: {left}"
