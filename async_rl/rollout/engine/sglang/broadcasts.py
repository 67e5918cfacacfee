"""How an SGLang server receives weights that the trainer broadcasts (sync.backend nccl), by endpoints of its own.

The server's scheduler takes part in each call itself, and has no time limit: one whose sender is gone answers when its
connection to it breaks, or not at all. A call that stays without an answer tells the weight sync that the replica has
failed. Knows the endpoints, and no module of SGLang.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from async_rl.errors import EngineError, WeightSyncError
from async_rl.rollout.engine.sglang.answers import Json
from async_rl.weights.sglang_group import group_name, packs
from async_rl.weights.shm_file import TensorMeta

Post = Callable[[str, Json], Awaitable[Any]]
"""Calls an endpoint of the server. Raises EngineError when it refuses."""


@dataclass(frozen=True, slots=True)
class _Group:
    """What the server has joined of one of the trainer's senders."""

    name: str
    table: list[TensorMeta]


class Broadcasts:
    """The groups in which a server receives, one for each of the trainer's senders."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._groups: list[_Group] = []
        self._pack_bytes = 0

    async def join(self, info: Mapping[str, Any], table: list[TensorMeta]) -> None:
        """Join the groups of ``info``, whose senders have the tensors of ``table``, in place of earlier ones.

        Raises EngineError.
        """
        await self.leave()
        self._pack_bytes = info["packed_buffer_size_bytes"]
        senders = [{"address": info["master_address"], "port": info["master_port"], "table": info["table"]}]
        senders += info["others"]
        metas = iter(table)
        for sender in senders:
            name = group_name(sender["port"])
            # Before it is joined: what was joined by halves is left, too.
            self._groups.append(_Group(name, list(itertools.islice(metas, len(sender["table"])))))
            body = {
                "master_address": sender["address"],
                "master_port": sender["port"],
                "rank_offset": info["rank_offset"],
                "world_size": info["world_size"],
                "group_name": name,
                "backend": info["torch_backend"],
            }
            await self._post("/init_weights_update_group", body)

    async def leave(self) -> None:
        """Leave all groups."""
        groups, self._groups = self._groups, []
        for group in groups:
            with contextlib.suppress(EngineError):  # not joined, or its sender is gone
                await self._post("/destroy_weights_update_group", {"group_name": group.name})

    async def receive(self, update: Mapping[str, Any]) -> None:
        """Receive and load what one sender broadcasts. Raises EngineError, and WeightSyncError for other tensors."""
        if not self._groups:
            raise WeightSyncError("update_weights was called before init_weight_transfer_engine")
        group = self._groups[update.get("sender", 0)]
        rows = zip(update["names"], update["dtype_names"], update["shapes"], strict=True)
        given = [TensorMeta(name, dtype, tuple(shape)) for name, dtype, shape in rows]
        for one, other in itertools.zip_longest(given, group.table):
            if one != other:
                raise WeightSyncError(f"the update has {one} where the name table has {other}; nothing was loaded")
        for pack in packs(group.table, self._pack_bytes):
            body = {
                "names": [meta.name for meta in pack],
                "dtypes": [meta.dtype for meta in pack],
                "shapes": [list(meta.shape) for meta in pack],
                "group_name": group.name,
                "load_format": "flattened_bucket",
                "flush_cache": False,
            }
            await self._post("/update_weights_from_distributed", body)
