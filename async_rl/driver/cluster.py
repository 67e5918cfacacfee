"""The Ray cluster of a run: one that it joins, or one of its own on this host. Knows no actor of the run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray._common.network_utils import parse_address
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # not in its stubs
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from async_rl.config.schema import RunConfig
from async_rl.doctor.sizes import object_store_bytes
from async_rl.driver import local_ray
from async_rl.errors import ConfigError, ResourceError
from async_rl.runtime import timeouts
from async_rl.runtime.addresses import with_port
from async_rl.runtime.process import ignore_interrupts, interrupt_once

# Set in every process of the run, before its libraries are imported.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",  # checkpoints come from folders; a typo must not become a download
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# What Ray's own processes read, on a cluster that the run starts.
_DAEMON_ENVIRONMENT = {
    # Finished calls that Ray's control process remembers: about 3 KiB each, a hundred a second. By default it grows by
    # 300 MiB before it forgets the first, and then keeps the ids of a million that it has forgotten.
    "RAY_task_events_max_num_task_in_gcs": "5000",
    "RAY_task_events_max_dropped_task_attempts_tracked_per_job_in_gcs": "1000",
    # Ray starts its two daemons on jemalloc, which by default has four arenas per core. Each keeps freed pages: the
    # raylet would grow by a tenth within half an hour.
    "RAY_JEMALLOC_PROFILE": "raylet,gcs_server",
    "RAY_JEMALLOC_CONF": "narenas:1,dirty_decay_ms:0,muzzy_decay_ms:0",
}

# Of the messages of Ray that the user gets to see.
_REASON_CHARACTERS = 300

# The actor by which a run has its name on a cluster that it joined.
_HOLDER = "run"

# Within which a host of the cluster accepts a connection.
_REACHED_S = 10.0

# A run that has just ended, or was killed, has its name for this long at most: Ray takes a moment to see the end.
_NAME_HELD_S = 10.0

# And this long if its driver's host was lost, of which Ray is sure after 65 s. Nothing responds for that run then.
_LOST_NAME_HELD_S = 120.0


@contextlib.contextmanager
def ray_cluster(config: RunConfig) -> Iterator[None]:
    """Join the Ray cluster at cluster.address or RAY_ADDRESS, or start one on this host that ends with the block.

    Raises ResourceError if that fails, ConfigError for a cluster that has a run of this name already.
    """
    os.environ.update(_ENVIRONMENT | _DAEMON_ENVIRONMENT)
    address = config.cluster.joined_address
    try:
        if address is None:
            _start(config)
        else:
            _join(config, address)
    except SystemExit:  # the answer to SIGTERM of a handler that Ray has installed
        ignore_interrupts()
        raise KeyboardInterrupt from None
    interrupt_once()
    try:
        # The handle is kept: without one Ray ends the actor.
        _holder = None if address is None else _hold_name(config.name, address)
        yield
    finally:
        # A second signal, within Ray's libraries, would abort the process before it has written how the run ended.
        ignore_interrupts()
        ray.shutdown()


def _start(config: RunConfig) -> None:
    """Start a cluster on this host alone."""
    try:
        local_ray.start(
            address="local",  # also where RAY_ADDRESS is empty, or another cluster was started on this host
            num_cpus=os.cpu_count(),
            object_store_memory=object_store_bytes(config.queue.max_bytes, shutil.disk_usage("/dev/shm").free),
            include_dashboard=False,
            log_to_driver=False,
            namespace=config.name,
            logging_level="warning",
        )
    except Exception as error:  # a plain Exception when a daemon of Ray has not answered in time
        raise ResourceError(
            f"Ray did not start: {error} (logs: session_latest/logs in /tmp/ray or RAY_TMPDIR); if the machine is "
            "busy, start the run again when it is less so"
        ) from error


def _join(config: RunConfig, address: str) -> None:
    """Connect to a cluster that runs already."""
    if "://" in address:
        raise ConfigError(f"cluster.address {address} is not host:port; the driver runs on a host of the cluster")
    try:
        _reach(address)
        ray.init(
            address=address,
            log_to_driver=False,
            namespace=config.name,
            logging_level="warning",
            # Its processes inherit their environment from the daemons of their hosts, not from the driver.
            runtime_env={"env_vars": _job_environment()},
        )
    except Exception as error:
        raise ResourceError(f"the Ray cluster at {address} cannot be joined: {why_not_joined(error)}") from error


def _reach(address: str) -> None:
    """Raise OSError at once where nothing listens at ``address``, and what Ray raises where the token is wrong.

    Ray itself tries for minutes, and for 20 s with a wrong token.
    """
    found = parse_address(canonicalize_bootstrap_address(address) or "")
    if found is None:
        raise ConnectionError("it is not host:port")
    host, port = found[0], int(found[1])
    with socket.create_connection((host, port), timeout=_REACHED_S):
        pass
    GcsClient(address=with_port(host, port)).get_all_node_info(timeout=_REACHED_S)


def why_not_joined(error: BaseException) -> str:
    """Return in one line why Ray did not connect, with what to do."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    reason = " ".join(str(causes[-1]).split())[:_REASON_CHARACTERS]
    if any(word in str(cause) for cause in causes for word in ("uthenticat", "token")):
        reason = reason.partition(". ")[0]  # the next sentences of Ray's say where else a token may be
        return f"{reason}; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
    if isinstance(error, OSError):
        return f"{reason}; set cluster.address to host:port of its head, which `ray status` must reach from this host"
    return f"{reason}; the driver needs a host of the cluster (`ray start --address`) and the cluster's version of Ray"


def _job_environment() -> dict[str, str]:
    """Return the environment of the run's processes, without what ``ray job submit`` sets in them already."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    given = (submitted.get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in _ENVIRONMENT.items() if name not in given}


class _NameHolder:
    """Has the run's name on the cluster while its driver lives: Ray ends it with the driver, however that ends."""

    def is_mine(self) -> bool:
        return True


def _hold_name(name: str, address: str) -> Any:
    """Claim ``name``, the namespace, for this run. Returns what holds it. Raises ConfigError if another run has it.

    A run whose host was lost has its name until Ray knows of the loss, and is waited for.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": _HOLDER, "num_cpus": 0, "scheduling_strategy": here}
    began = time.monotonic()
    while True:
        try:
            holder = ray.remote(_NameHolder).options(**options).remote()
            ray.get(holder.is_mine.remote())  # of two at the same time, Ray lets the one start that came first
            return holder
        except (ValueError, RayActorError) as error:
            waited = time.monotonic() - began
            if waited > (_NAME_HELD_S if _holder_responds() else _LOST_NAME_HELD_S):
                raise ConfigError(
                    f"a run named {name} is under way on the Ray cluster at {address}; give this run another --name, "
                    "or end that one"
                ) from error
            time.sleep(0.5)


def _holder_responds() -> bool:
    """Return whether the process that has the run's name is there, and its host with it."""
    try:
        return bool(ray.get(ray.get_actor(_HOLDER).is_mine.remote(), timeout=timeouts.ANSWER_S))
    except (ValueError, RayError):  # none has the name any more; it is dead, or silent
        return False


def ray_exporters() -> list[str]:
    """Return host:port of each node on which Ray serves its own metrics, which needs the packages of ray[default]."""
    # Without those packages the port is -1.
    nodes = (node for node in ray.nodes() if node["Alive"] and node.get("MetricsExportPort", -1) > 0)
    return [with_port(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in nodes]
