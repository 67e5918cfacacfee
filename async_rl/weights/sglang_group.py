"""sync.backend nccl with SGLang's engines: the trainer's end of a group of theirs, and what both ends agree on.

SGLang's ranks do not meet as vLLM's communicators do. They join a process group of torch.distributed by
``/init_weights_update_group``, in which rank 0 broadcasts packs of tensors that ``/update_weights_from_distributed``
receives. ``SenderGroup`` is that rank 0; it is used as vLLM's communicator is. Written for SGLang 0.5.23, and torch's
names for what its ranks look up in the store. Imports neither SGLang nor vLLM.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
from torch.distributed import BroadcastOptions, PrefixStore, TCPStore

from async_rl.errors import WeightSyncError
from async_rl.weights.shm_file import TensorMeta


def group_name(port: int) -> str:
    """Return the name of the group whose sender waits at ``port``; a server knows each of its groups by one."""
    return f"async_rl_{port}"


def packs(table: Iterable[TensorMeta], nbytes: int) -> Iterator[list[TensorMeta]]:
    """Yield the tensors of each broadcast, as vLLM's producer packs them: until they are more than so many bytes."""
    pack: list[TensorMeta] = []
    size = 0
    for meta in table:
        pack.append(meta)
        size += meta.nbytes
        if size > nbytes:
            yield pack
            pack, size = [], 0
    if pack:
        yield pack


class SenderGroup:
    """Rank 0 of a group of ``world_size`` ranks, for which it serves the store at ``host`` and ``listening``.

    ``backend`` is torch's: nccl, for tensors on this thread's GPU, or gloo, for tensors in the host's memory. With gloo
    all ranks meet here, within ``timeout_s`` seconds; with nccl at the first broadcast.
    """

    def __init__(self, host: str, listening: socket.socket, world_size: int, *, backend: str, timeout_s: float) -> None:
        self._group: Any = None
        port, timeout = listening.getsockname()[1], timedelta(seconds=timeout_s)
        name = group_name(port)
        store: Any = TCPStore(
            host,
            port,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
            use_libuv=False,  # it takes no socket
        )
        # Of sglang.srt.utils.init_custom_process_group, of torch's _new_process_group_helper, and by device.
        for prefix in (name, f"{name}/", "cpu/" if backend == "gloo" else "cuda/"):
            store = PrefixStore(prefix, store)
        fault = None
        try:
            self._group = (_gloo if backend == "gloo" else _nccl)(store, world_size, timeout)
        except RuntimeError as error:
            fault = str(error).partition("\n")[0]
        # It is closed with its last reference, also that of an exception's frames. Then those are free that wait there
        # for a rank that never comes.
        del store
        if fault is not None:
            raise WeightSyncError(f"not all ranks have joined the process group within {timeout_s:g} s: {fault}")

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """Send ``tensor`` from rank ``src``, which is 0, under the current stream. Raises RuntimeError."""
        group = self._group
        if group is None:
            raise RuntimeError("the group was destroyed")
        options = BroadcastOptions()
        options.rootRank = src
        group.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        """Leave the group, and abort what is under way in whichever thread, which gloo does at its time limit only.

        May be called twice.
        """
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def _gloo(store: PrefixStore, world_size: int, timeout: timedelta) -> Any:
    return torch.distributed.ProcessGroupGloo(store, 0, world_size, timeout)


def _nccl(store: PrefixStore, world_size: int, timeout: timedelta) -> Any:
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = 4 * timeout  # ``Limit`` aborts it before
    # Otherwise a communicator whose ranks do not all come could not be aborted while it is made.
    options.config.blocking = False
    # Torch would end this process when the group fails or is aborted; it reads the variable here.
    with mock.patch.dict(os.environ, {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}):
        return torch.distributed.ProcessGroupNCCL(store, 0, world_size, options)
