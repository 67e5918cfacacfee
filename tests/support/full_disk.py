"""A full disk for this process: files that cannot grow."""

import contextlib
import resource


@contextlib.contextmanager
def room_for(nbytes):
    """Let no file grow beyond this size: the kernel takes a part of a write, then refuses, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
