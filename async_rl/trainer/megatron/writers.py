"""Writes a checkpoint's files in threads of the trainer while it trains on, and takes their checksums meanwhile.

Megatron-core 0.16.1 forks a process for each file and waits for its result without checking that it is alive. A process
with threads, such as Ray's and Gloo's, must not be forked: the child may inherit a lock that no thread of it will ever
release, and then the save hangs (seen once in some hundred saves). It also hangs if a writer is killed, for example
when memory runs out. And a fork that outlives the trainer keeps its sockets open, so that Ray takes the trainer for
alive. Writing releases the interpreter lock, so threads are no slower.

A forked process would also have a copy of the state as it was. Here it is copied to host memory before training
continues.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from async_rl.runtime.manifest import ChecksummedFile, Entries

# One file to be written, as Megatron plans it: (path, name, (items of bytes, items of tensors)).
Bucket = tuple[str, str, tuple[list[Any], list[Any]]]


class FileWriter:
    """Writes the files of one rank and one save."""

    def __init__(self) -> None:
        self.entries: Entries = {}
        """Those of the files that are written."""
        self.error: Exception | None = None
        """Why a file could not be written."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    @contextlib.contextmanager
    def in_place_of_forks(self) -> Iterator[None]:
        """Make saves that Megatron plans in this block use this writer's threads, and no other process."""
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        writer = filesystem_async.FileSystemWriterAsync
        forking = writer.__dict__["write_preloaded_data_multiproc"]
        writer.write_preloaded_data_multiproc = staticmethod(self._write)
        # Otherwise its results pass through a separate process of 270 MiB, which lives as long as the trainer does, and
        # longer if the trainer is killed.
        filesystem_async._results_queue = queue.SimpleQueue()
        try:
            yield
        finally:
            writer.write_preloaded_data_multiproc = forking
            filesystem_async._results_queue = None

    def begin(self, request: Any) -> None:
        """Copy what Megatron's ``AsyncRequest`` is to write, and write it in the background."""
        if request.async_fn is None:
            return  # Megatron has planned no file for this rank
        rank, buckets, results = request.async_fn_args
        copies = [_copied(bucket) for bucket in buckets]
        self._writing = self._pool.submit(request.async_fn, rank, copies, results)
        self._pool.shutdown(wait=False)

    def done(self) -> bool:
        """Return whether all files of this rank are written, or one could not be."""
        return self._writing is None or self._writing.done()

    def wait(self) -> None:
        """Return once all files of this rank are written, or one could not be."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, transforms: Any, _use_msc: Any, _rank: Any, buckets: Sequence[Bucket], results: Any) -> None:
        """Stand in for FileSystemWriterAsync.write_preloaded_data_multiproc, which Megatron calls by position.

        Puts one result for all ``buckets`` into ``results``: the written items by the bucket's number, or the first
        exception.
        """

        def write(bucket: Bucket) -> list[Any]:
            return self._write_file(bucket, transforms)

        try:
            with ThreadPoolExecutor(len(buckets), thread_name_prefix="checkpoint") as pool:
                results.put(dict(enumerate(pool.map(write, buckets))))
        except Exception as error:  # noqa: BLE001 - whatever it is, the driver is told
            self.error = error
            results.put(error)

    def _write_file(self, bucket: Bucket, transforms: Sequence[Any]) -> list[Any]:
        """Write one file as FileSystemWriterAsync.write_preloaded_data does, with its checksum."""
        from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item

        path, name, (raw, tensors) = bucket
        with ChecksummedFile(Path(path)) as stream:
            written = [
                _write_item(*transforms, stream, data, item, name, SerializationFormat.TORCH_SAVE)
                for item, data in [*raw, *tensors]
            ]
        self.entries[name] = stream.entry
        return written


def _copied(bucket: Bucket) -> Bucket:
    """Return the bucket with tensors that training does not change; their bytes were copied when it was planned."""
    path, name, (raw, tensors) = bucket
    return path, name, (raw, [(item, tensor.detach().to("cpu", copy=True)) for item, tensor in tensors])


def all_ranks(value: object) -> list[Any]:
    """Return the value of each rank. Every rank must call it."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
