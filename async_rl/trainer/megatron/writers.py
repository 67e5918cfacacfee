"""Writes a checkpoint's files in threads of the trainer instead of forks of it.

Megatron-core 0.16.1 forks a process for each file and waits for its result without checking that it is alive. A process
with threads, such as Ray's and Gloo's, must not be forked: the child may inherit a lock that no thread of it will ever
release, and then the save hangs (seen once in some hundred saves). It also hangs if a writer is killed, for example
when memory runs out. And a fork that outlives the trainer keeps its sockets open, so that Ray takes the trainer for
alive. Writing releases the interpreter lock, so threads are no slower.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


@contextlib.contextmanager
def threads_write() -> Iterator[None]:
    """Make Megatron's file writer use threads, and no other process, until the block ends."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer = filesystem_async.FileSystemWriterAsync
    forking = writer.__dict__["write_preloaded_data_multiproc"]
    writer.write_preloaded_data_multiproc = staticmethod(_write)
    # Otherwise its results pass through a separate process of 270 MiB, which lives as long as the trainer does, and
    # longer if the trainer is killed.
    filesystem_async._results_queue = queue.SimpleQueue()
    try:
        yield
    finally:
        writer.write_preloaded_data_multiproc = forking
        filesystem_async._results_queue = None


def _write(transforms: Any, use_msc: Any, rank: Any, buckets: Sequence[Any], results: Any) -> None:
    """Stand in for FileSystemWriterAsync.write_preloaded_data_multiproc, which Megatron calls by position.

    Puts one result for all ``buckets`` into ``results``: the written files by the bucket's number, or the first
    exception.
    """
    del rank  # Megatron names its processes by it
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
