"""A checkpoint's files are written by threads of the trainer, not by forks of it.

Megatron-core 0.16.1 forks a process for each file and waits for it without looking at it. A process with threads, which
Ray's and Gloo's are, must not be forked: the child may inherit a lock that nobody will ever release, and then the save
waits for ever (seen once in some hundred saves). So does one whose writer is killed, when memory runs out for example.
And a fork that outlives the trainer holds its sockets, so that Ray takes the trainer for alive. Writing releases the
interpreter lock, so threads are no slower.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


@contextlib.contextmanager
def threads_write() -> Iterator[None]:
    """Within it, Megatron's file writer uses threads, and no other process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer = filesystem_async.FileSystemWriterAsync
    forking = writer.__dict__["write_preloaded_data_multiproc"]
    writer.write_preloaded_data_multiproc = staticmethod(_write)
    # Else its results travel through a process of their own, of 270 MiB, which lives on as long as the trainer does,
    # and longer where that is killed.
    filesystem_async._results_queue = queue.SimpleQueue()
    try:
        yield
    finally:
        writer.write_preloaded_data_multiproc = forking
        filesystem_async._results_queue = None


def _write(transforms: Any, use_msc: bool, rank: int, buckets: Sequence[Any], results: Any) -> None:
    """As FileSystemWriterAsync.write_preloaded_data_multiproc: one result for all ``buckets`` into ``results``: a map
    from the number of each to what was written, or the first exception."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    written: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    counted: queue.Queue[int] = queue.Queue()
    for number in range(len(buckets)):
        counted.put(number)
    options = {"use_msc": True} if use_msc else {}
    with ThreadPoolExecutor(len(buckets), thread_name_prefix="checkpoint") as pool:
        calls = [
            pool.submit(
                FileSystemWriterAsync.write_preloaded_data,
                transforms, number, bucket, written, counted, use_fsync=True, **options,
            )
            for number, bucket in enumerate(buckets)
        ]  # fmt: skip
    for call in calls:
        call.result()
    by_number = dict(written.get() for _ in buckets)
    failed = [found for found in by_number.values() if isinstance(found, Exception)]
    results.put(failed[0] if failed else by_number)
