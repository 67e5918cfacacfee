"""The trainer's end of a weight transfer: vLLM's transfer backend, and the clients that reach the rollout actors.

Runs on every trainer rank; rank 0 sends, and with sync.senders stages the first rank of each further stage. Imports
vLLM, so only trainer processes import this module.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    WeightSource,
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from async_rl.config.schema import RunConfig
from async_rl.errors import WeightSyncError
from async_rl.runtime import timeouts
from async_rl.runtime.addresses import hold_port
from async_rl.weights import ray_store
from async_rl.weights.buckets import Publication
from async_rl.weights.delta_publisher import DeltaPublisher
from async_rl.weights.object_store import Publisher, Staged, Totals
from async_rl.weights.on_host import for_hosts
from async_rl.weights.shm_file import TensorMeta
from async_rl.weights.vllm.name_table import Rows, name_table
from async_rl.weights.vllm.nccl import Endpoint, TimedNCCLTrainerInitInfo
from async_rl.weights.vllm.object_store import ObjectStoreTrainerInitInfo
from async_rl.weights.vllm.plugin import register
from async_rl.weights.vllm.shm import ShmTrainerInitInfo

# Of sync.timeout_s, the most that one call may take in which processes wait for each other: so it ends with an error of
# its own, and a second attempt has as much.
_SHARE = 0.5


class SyncClient:
    """Calls rollout actors as vLLM's trainer engines want it (its ``VLLMWeightSyncClient``), all of them at once.

    Unlike vLLM's client for Ray it names the policy version when an update is finished: vLLM's trainer engines finish
    one without a version (``send_weights`` takes no argument), so that of the transfer in progress is kept here. And
    when a call fails it waits for the others, at most ``limit_s`` seconds: an engine that is loading has not failed.
    """

    def __init__(self, rollout_workers: Sequence[Any], limit_s: float) -> None:
        self.all_handles = list(rollout_workers)
        self.handles = self.all_handles
        """Those that the transfer in progress is for."""
        self.version = 0
        self.failed: Callable[[Exception], None] = lambda _: None
        """Called with the first failure, before the other calls have ended."""
        self._limit_s = limit_s

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        request = WeightTransferInitRequest(init_info=init_info)
        self._together([handle.init_weight_transfer_engine.remote(request) for handle in self.all_handles])

    def start_weight_update(self) -> None:
        self._together([handle.start_weight_update.remote() for handle in self.handles])

    def update_weights(self, update_info: dict[str, Any]) -> None:
        request = WeightTransferUpdateRequest(update_info=update_info)
        self._together([handle.update_weights.remote(request) for handle in self.handles])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._together([handle.finish_weight_update.remote() for handle in self.handles])
        version = weight_version or str(self.version)
        self._together([handle.update_weight_version.remote(version) for handle in self.handles])

    def by_worker(self, update_info: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what each of ``all_handles`` needs of an update, for the caller to send."""
        return [update_info] * len(self.all_handles)

    def _together(self, calls: list[Any], timeout_s: float | None = None) -> list[Any]:
        """Return the results of all calls. Raises what the first one raised that failed, and GetTimeoutError."""
        try:
            results: list[Any] = ray.get(calls, timeout=timeout_s)
        except Exception as error:
            self.failed(error)
            ray.wait(calls, num_returns=len(calls), timeout=self._limit_s + timeouts.ANSWER_S, fetch_local=False)
            raise
        return results


class NcclSyncClient(SyncClient):
    """The client for sync.backend nccl: the ranks of each replica follow those of the one connected before it."""

    def __init__(self, rollout_workers: Sequence[Any], limit_s: float, *, ranks: int) -> None:
        """Take the actors of replicas that have so many ranks each."""
        super().__init__(rollout_workers, limit_s)
        self._ranks = ranks

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        first = init_info["rank_offset"]
        requests = [
            WeightTransferInitRequest(init_info=init_info | {"rank_offset": first + place * self._ranks})
            for place in range(len(self.all_handles))
        ]
        pairs = zip(self.all_handles, requests, strict=True)
        self._together([handle.init_weight_transfer_engine.remote(request) for handle, request in pairs])


class HostsSyncClient(SyncClient):
    """The client for sync.backend object_store: one actor of each host fetches the weights for the engines there.

    That is the first of the host, among the rollout workers connected and the parts of engines that span hosts. If it
    dies, they are connected again without it, and another one is the first.
    """

    def __init__(self, rollout_workers: Sequence[Any], limit_s: float) -> None:
        super().__init__(rollout_workers, limit_s)
        self._hosts: dict[Any, list[str]] = {}  # of each of ``all_handles``
        self._first: dict[str, Any] = {}  # actor of each host

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        found = self._together([handle.weights_hosts.remote() for handle in self.all_handles])
        self._hosts, self._first, others = {}, {}, []
        for handle, parts in zip(self.all_handles, found, strict=True):
            self._hosts[handle] = [host for host, _ in parts]
            for host, part in parts:
                actor = part or handle
                if self._first.setdefault(host, actor) is not actor:
                    others.append(actor)
        # Those of a first actor stay: they are what its next weights can be a delta to.
        self._together([actor.free_weights.remote() for actor in others])
        super().init_weight_transfer_engine(init_info)

    def fetch_weights(self, offer: Callable[[int], Publication]) -> dict[str, Any]:
        """Have each host fetch what is offered for the round that it has.

        Returns the announcements of their files, for ``update_weights``. Raises WeightSyncError, and RayError for a
        worker that is gone.
        """
        # This host has the buckets already, and sends each of them to one of the others.
        here, limit_s = ray_store.host_id(), self._limit_s + timeouts.ANSWER_S
        try:
            rounds = self._together([actor.weights_round.remote() for actor in self._first.values()], limit_s)
            offered = {host: offer(round_) for host, round_ in zip(self._first, rounds, strict=True)}
            calls = []
            for host, actor in self._first.items():
                peers = [
                    each for other, each in self._first.items() if other != here and offered[other] is offered[host]
                ]
                if host == here or len(peers) == 1:
                    peers = []
                number = peers.index(actor) if peers else 0
                count = max(len(peers), 1)
                calls.append(actor.fetch_weights.remote(offered[host], number, count, self._limit_s, peers))
            announced = self._together(calls, limit_s)
        except GetTimeoutError:
            raise WeightSyncError(
                f"a host did not say within {self._limit_s:g} s that it has the weights; raise sync.timeout_s"
            ) from None
        return {"by_host": {host: asdict(file) for host, file in zip(self._first, announced, strict=True)}}

    def by_worker(self, update_info: dict[str, Any]) -> list[dict[str, Any]]:
        # To each its own host's file: those of all hosts for all workers would grow with the square of the hosts.
        return [for_hosts(update_info["by_host"], self._hosts[handle]) for handle in self.all_handles]


class WeightSender:
    """Transfers ``source`` to the connected rollout actors at each ``send``.

    Every trainer rank has one for its life, and calls it in step with the others. ``host`` returns the address of this
    host at which others reach it.
    """

    def __init__(self, config: RunConfig, rank: int, *, source: WeightSource, host: Callable[[], str]) -> None:
        register()
        self._config = config
        self._rank = rank
        self._host = host
        self._limit_s = _SHARE * config.sync.timeout_s
        self._source = source
        self._staged = Staged()
        self._publisher: Publisher | None = None
        if config.sync_backend == "object_store" and rank == 0:
            self._publisher = _publisher(config, name_table(source))
        self._client: SyncClient | None = None
        self._engine: Any = None

    def connect(self, rollout_workers: Sequence[Any]) -> None:
        """Set up the transfer to these rollout actors, in place of earlier ones."""
        self._disconnect()
        self._staged.connect(rollout_workers)
        self._client = self._make_client(rollout_workers)
        self._engine = WeightTransferTrainerFactory.trainer_init(
            self._init_info(len(rollout_workers)), client=self._client, source=self._source
        )

    def outdate(self) -> None:
        """Note that the weights change, so that those staged before are not sent again."""
        self._staged.outdate()

    def stage(self) -> list[dict[str, Any]] | None:
        """Do what of the next ``send`` needs no engine, so that engines generate meanwhile.

        Returns the update that each connected engine can take by itself; None if they need ``send``, and on ranks that
        do not send.
        """
        if self._engine is None or self._client is None:
            raise RuntimeError("connect() must be called before stage()")
        if self._config.sync_backend == "nccl":  # sends from the GPU's memory
            return None
        update: dict[str, Any] | None = self._engine.stage()
        return None if update is None else self._client.by_worker(update)

    def send(self, version: int, only: int | None = None) -> None:
        """Transfer the weights as ``version`` to every rollout actor, or to the one at index ``only`` alone."""
        if self._client is None:
            raise RuntimeError("connect() must be called before send()")
        handles = self._client.all_handles
        self._client.handles = handles if only is None else [handles[only]]
        self._client.version = version
        self._engine.send_weights()

    @property
    def published(self) -> Totals | None:
        """What has been put into the object store; None on ranks and with backends that put nothing there."""
        return None if self._publisher is None else self._publisher.totals

    def close(self) -> None:
        """Release what the backend holds, such as its shared memory and the weights in the object store."""
        self._disconnect()
        if self._publisher is not None:
            self._publisher.withdraw()

    def _disconnect(self) -> None:
        engine, self._engine, self._client = self._engine, None, None
        if engine is not None:
            engine.shutdown()

    def _make_client(self, rollout_workers: Sequence[Any]) -> SyncClient:
        if self._config.sync_backend == "shm":
            return SyncClient(rollout_workers, self._limit_s)
        if self._config.sync_backend == "object_store":
            return HostsSyncClient(rollout_workers, self._limit_s)
        ranks = self._config.rollout.engine_ranks
        return NcclSyncClient(rollout_workers, self._limit_s, ranks=ranks)

    def _init_info(self, replicas: int) -> TrainerInitInfo:
        if self._config.sync_backend == "shm":
            return ShmTrainerInitInfo(rank=self._rank)
        if self._config.sync_backend == "object_store":
            return ObjectStoreTrainerInitInfo(rank=self._rank, staged=self._staged, publisher=self._publisher)
        host = self._host()
        tables = {0: []} if self._config.sync.senders == "one" else self._source.tables()
        listening = hold_port(host) if self._rank in tables else None
        return TimedNCCLTrainerInitInfo(
            master_address=host,
            master_port=0 if listening is None else int(listening.getsockname()[1]),
            listening=listening,
            others=_other_senders(host, listening, tables),
            # The sender, and every GPU of every replica that is connected.
            world_size=1 + replicas * self._config.rollout.engine_ranks,
            rank=self._rank,
            timeout_s=self._limit_s,
            torch_backend="nccl" if self._config.rollout.engine_names == ("sglang",) else None,
        )


def _publisher(config: RunConfig, metas: Sequence[TensorMeta]) -> Publisher:
    delta = config.sync.delta
    if delta.full_every == 1:
        return Publisher(metas, ray_store.put)
    return DeltaPublisher(metas, ray_store.put, full_every=delta.full_every, max_ratio=delta.max_ratio)


def _other_senders(host: str, listening: socket.socket | None, tables: Mapping[int, Rows]) -> list[Endpoint]:
    """Return where the senders after rank 0 wait for engines. With several, all ranks call it together."""
    if len(tables) == 1:
        return []
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, None if listening is None else (host, listening.getsockname()[1]))
    return [Endpoint(found[rank][0], found[rank][1], table) for rank, table in tables.items() if rank != 0]
