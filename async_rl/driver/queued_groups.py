"""The finished groups of a checkpoint: messages that are written where they lie, and loaded without the driver.

The message of a group lies in the object store of the host whose worker finished it. There a task of Ray writes it to a
file and takes its checksum; the driver gets the checksum. When a run is restored, its rollout workers read the files,
and the driver gets references again. So messages, up to gigabytes of them, cross neither the driver's process nor its
links.

Knows Ray, workers and files; neither the queue nor what a message holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import ray
import structlog
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from async_rl.queue.fetcher import hosts_with
from async_rl.rollout.moments import SavedGroup
from async_rl.runtime.failures import brief, unwrap_ray_error
from async_rl.runtime.manifest import FileEntry, write_file

log = structlog.get_logger(__name__)

# Files that a host writes at one time: network file systems give one stream a fraction of what they have.
_STREAMS = 4


async def write(
    folder: Path, payloads: Mapping[str, Sequence[Any]], *, everywhere: bool = True
) -> dict[str, SavedGroup]:
    """Write the messages of groups to new files of ``folder``; return the files by group id.

    Each message is given by references to its copies, of which one is written: the first that is not lost. All hosts
    write at once, each the messages that it has; or the driver's host all of them, which come to it one after the
    other, where not ``everywhere`` is that folder. A message that is lost with its hosts is logged and left out. Raises
    OSError if a file cannot be written.
    """
    if not payloads:
        return {}
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    files = {group_id: f"{number:06}" for number, group_id in enumerate(payloads)}
    written: dict[str, FileEntry | str] = {}
    for number in range(max(map(len, payloads.values()))):
        left = [i for i, file in files.items() if not isinstance(written.get(file), FileEntry)]
        copies = {files[i]: payloads[i][number] for i in left if number < len(payloads[i])}
        written |= await _write_once(folder, copies, everywhere=everywhere)
    saved: dict[str, SavedGroup] = {}
    for group_id, file in files.items():
        if isinstance(entry := written[file], FileEntry):
            saved[group_id] = SavedGroup(file, entry)
        else:
            # A restored run issues its prompt again. In this run, the reader of the group finds the loss.
            log.warning("queued_group_not_saved", group=group_id, reason=entry)
    return saved


class Reader(Protocol):
    """What reads a message from a file: a rollout worker, or where those do not have the file, ``RemoteFiles``."""

    def read_message(self, path: Path) -> Sequence[Any]:
        """Return references to the message, and to its size in bytes."""


async def load(files: Mapping[str, Path], workers: Sequence[Reader]) -> dict[str, Any]:
    """Have the workers read messages from files, by group id; return references to them.

    Each worker reads a share, one file at a time, into the object store of its host. A file that cannot be read is
    logged and left out.
    """
    items = list(files.items())
    shares = (items[number :: len(workers)] for number in range(len(workers)))
    loaded: dict[str, Any] = {}
    for share in await asyncio.gather(*map(_load_on, workers, shares)):
        loaded |= share
    return {group_id: loaded[group_id] for group_id in files if group_id in loaded}


async def _write_once(folder: Path, references: Mapping[str, Any], *, everywhere: bool) -> dict[str, FileEntry | str]:
    """Have each host write the messages that it has, by file; return the entry of each file, or why there is none."""
    if not references:
        return {}
    hosts = await asyncio.to_thread(_by_host, references, everywhere=everywhere)
    answers = await asyncio.gather(
        *(_write_on(host, folder, {file: references[file] for file in files}) for host, files in hosts.items())
    )
    return {file: answer for each in answers for file, answer in each.items()}


def _by_host(references: Mapping[str, Any], *, everywhere: bool) -> dict[str, list[str]]:
    """Return the files by the host that writes them: ``everywhere``, each where its message is."""
    here = ray.get_runtime_context().get_node_id()
    if not everywhere:
        return {here: list(references)}
    found = hosts_with(list(references.values()))
    hosts: dict[str, list[str]] = {}
    for file, reference in references.items():
        # None for a small message, which the driver's process has, and for one that Ray has moved to a disk.
        places = found[reference] or [here]
        hosts.setdefault(here if here in places else places[0], []).append(file)
    return hosts


async def _write_on(host: str, folder: Path, references: dict[str, Any]) -> dict[str, FileEntry | str]:
    """Have a host write messages, by file; return the entry of each file, or why there is none."""
    try:
        there = _WRITE_FILES.options(scheduling_strategy=NodeAffinitySchedulingStrategy(host, soft=False))
        written: dict[str, FileEntry | str] = await there.remote(folder, references)
    except RayError as error:
        if isinstance(error, RayTaskError):
            raise unwrap_ray_error(error) from None
        return dict.fromkeys(references, brief(error))
    return written


def _write_files(folder: Path, references: dict[str, Any]) -> dict[str, FileEntry | str]:
    def write_one(file: str) -> FileEntry | str:
        try:
            message = ray.get(references[file])
        except RayError as error:  # its host died
            return brief(error)
        return write_file(folder / file, memoryview(message))

    with ThreadPoolExecutor(_STREAMS) as streams:
        return dict(zip(references, streams.map(write_one, references), strict=True))


async def _load_on(worker: Reader, files: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    loaded: dict[str, Any] = {}
    for group_id, path in files:
        message, size = worker.read_message(path)
        try:
            await size
        except RayError as error:
            log.warning("queued_group_not_loaded", group=group_id, reason=brief(error))
        else:
            loaded[group_id] = message
    return loaded


# Made once: Ray keeps every remote function that is ever called.
_WRITE_FILES = ray.remote(num_cpus=0)(_write_files)
