"""The object store of sync.backend object_store, which is Ray's, as ``object_store`` and its users call it."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from async_rl.errors import WeightSyncError
from async_rl.weights.buckets import Array
from async_rl.weights.host_fetch import Peer


def put(array: Array) -> Any:
    """Store a copy of ``array`` on this host, and return a reference. Raises WeightSyncError when there is no room."""
    try:
        return ray.put(array)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise WeightSyncError(
            f"the object store of the trainer's host has no room for {array.nbytes} bytes of weights more; start Ray "
            "there with an --object-store-memory of at least the weights and queue.max_bytes"
        ) from error


def get(reference: Any) -> concurrent.futures.Future[Array]:
    """Begin to bring an array to this host, from any host that has it. The result is a view on this host's store."""
    future: concurrent.futures.Future[Array] = reference.future()
    return future


def peer(worker: Any, timeout_s: float) -> Peer:
    """Return how another host's ``worker``, an actor, is asked for a bucket, which it may wait for that long."""

    def ask(round_: int, start: int) -> concurrent.futures.Future[Array]:
        return get(worker.weights_bucket.remote(timeout_s, round_, start))

    return ask


def host_id() -> str:
    """Return the id of this process's host, Ray's node id: processes with one id share memory and the store."""
    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id
