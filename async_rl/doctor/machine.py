"""Checks of this machine's devices, cores, memory and ports against the needs of a run."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from async_rl.config.memory_checks import first_for_gpus, refusal_on_cpu
from async_rl.config.schema import RunConfig
from async_rl.doctor import estimate
from async_rl.doctor.check import Check
from async_rl.doctor.host_report import Needs
from async_rl.doctor.parameters import Parameters
from async_rl.doctor.placement import Need, processes
from async_rl.doctor.sizes import worst_case
from async_rl.errors import ConfigError, ModelError
from async_rl.models.config import ModelConfig, read_model_config
from async_rl.trainer.parallel import world_size

GB = 10**9
# Ray refuses to start with less; a container's default /dev/shm is 64 MiB.
RAY_MINIMUM_SHM = 80 * 2**20


def present() -> Iterator[Check]:
    """Report the machine's resources without checking them against a config."""
    yield Check("device", "ok", f"{gpu_count()} GPUs" if gpu_count() else "CPU")
    yield Check("cores", "ok", f"{len(available_cores())} usable")
    yield Check("memory", "ok", f"{available_memory() / GB:.1f} GB available")
    yield Check("shared memory", "ok", f"{free_bytes('/dev/shm') / GB:.1f} GB free in /dev/shm")


def gpu_count() -> int:
    """Return the number of GPUs of this machine."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def uses_gpu(config: RunConfig) -> bool:
    """Return whether engines and trainer of this run compute on GPUs."""
    return config.resources.device == "cuda" or (config.resources.device == "auto" and gpu_count() > 0)


def sets_kv_cache(config: RunConfig) -> bool:
    """Return whether rollout.kv_cache_bytes is the size of an engine's cache of keys and values."""
    return config.resources.share_gpu or not uses_gpu(config)


def device_is_known(config: RunConfig) -> bool:
    """Return whether this host can tell the device: that of a run on a cluster may depend on the other hosts' GPUs."""
    return config.resources.device != "auto" or config.cluster.joined_address is None


def needs(config: RunConfig) -> Needs:
    """Return what a run whose device is known needs of a cluster's hosts, without the room for processes."""
    on_gpu = config.resources.device == "cuda"
    model, parameters = _model(config)
    return Needs(
        device="cuda" if on_gpu else "cpu",
        memory_bytes=0 if on_gpu else estimate.run_memory(config, model, parameters).fixed,
        shm_bytes=estimate.shared_weights(config, parameters),
        compiles=not (on_gpu or config.rollout.enforce_eager) and "vllm" in config.rollout.engine_names,
    )


def one_host(config: RunConfig) -> Iterator[Check]:
    """Check that nothing of the run needs a second host."""
    if (hosts := config.rollout.hosts_per_engine) > 1:
        yield Check(
            "rollout.hosts_per_engine",
            "FAIL",
            f"{hosts}, but the run has this host alone",
            "set it to 1, or cluster.address to a Ray cluster of several hosts",
            ConfigError,
        )
    if config.queue.copies > 1:
        yield Check(
            "queue.copies",
            "FAIL",
            f"{config.queue.copies}, but the run has this host alone, with which every copy would be lost",
            "set queue.copies to 1, or cluster.address to a Ray cluster of several hosts",
            ConfigError,
        )


def devices(config: RunConfig) -> Iterator[Check]:
    """Check that there are as many GPUs as the run needs."""
    count = gpu_count()
    if not uses_gpu(config):
        if config.sync.backend == "nccl":
            yield Check(
                "sync.backend",
                "FAIL",
                "nccl needs GPUs, and this machine has none",
                "set sync.backend to auto",
                ConfigError,
            )
        if (found := first_for_gpus(config)) is not None:
            key, _, instead = found
            yield Check(key, "FAIL", refusal_on_cpu(found), f"set it to {instead}", ConfigError)
        yield Check("device", "ok", "CPU")
        return
    needed = sum(need.units for need in _processes(config))
    each = "trainer and engine share it" if config.resources.share_gpu else "one per engine GPU and trainer rank"
    detail = f"{count} GPUs; {needed:g} needed ({each}){_elastic(config, count)}"
    if count < needed:
        alone = "set resources.share_gpu to true on a single GPU, " * (count == 1 and needed == 2)
        yield Check("device", "FAIL", detail, f"lower rollout.replicas, {alone}or set resources.device to cpu")
    else:
        yield Check("device", "ok", detail)


def _processes(config: RunConfig) -> tuple[Need, Need]:
    """Return what engines and trainer ranks need here, also of a run whose resources.device is auto."""
    resources = config.resources.model_copy(update={"device": "cuda" if uses_gpu(config) else "cpu"})
    return processes(config.model_copy(update={"resources": resources}))


def _engines_with_room(config: RunConfig, units: int) -> int:
    """Return how many engines a run with rollout.replicas.min begins with on ``units`` GPUs or cores of one host."""
    (engine, rank), replicas = _processes(config), config.rollout.replica_range
    return max(replicas.min, min(replicas.max, int((units - rank.units) // engine.size)))


def _elastic(config: RunConfig, units: int) -> str:
    """Return what becomes of rollout.replicas.min and max on this host, to be appended; empty without them."""
    replicas, here = config.rollout.replica_range, _engines_with_room(config, units)
    if not config.rollout.elastic:
        return ""
    return f"; {here} replicas run here (rollout.replicas.min {replicas.min}, max {replicas.max}), the others wait"


def compiler(config: RunConfig) -> Iterator[Check]:
    """Check for a C++ compiler, with which vLLM compiles the model on CPU unless rollout.enforce_eager is set."""
    if uses_gpu(config) or config.rollout.enforce_eager:
        return
    names = compilers()
    found = next((path for name in names if (path := shutil.which(name)) is not None), None)
    if found is not None:
        yield Check("C++ compiler", "ok", found)
    else:
        yield Check(
            "C++ compiler",
            "FAIL",
            f"none of {', '.join(names)} is on PATH, and vLLM compiles the model on CPU",
            "install g++, or set rollout.enforce_eager to true",
        )


def compilers() -> list[str]:
    """Return the names by which a C++ compiler is looked for, in their order."""
    return [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]


def processor_flags() -> frozenset[str]:
    """Return what the processor of this machine knows, by the names that Linux has for it; avx512f, for example."""
    return frozenset(Path("/proc/cpuinfo").read_text().split())


def available_cores() -> list[int]:
    """Return the cores that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def cores(config: RunConfig) -> Iterator[Check]:
    """Check that there are as many cores as the run's threads."""
    if uses_gpu(config):
        return
    count, resources = len(available_cores()), config.resources
    for key, threads in (
        ("engine_threads", resources.engine_threads),
        ("trainer_threads", resources.trainer_threads),
    ):
        if threads > count:
            yield Check(
                f"resources.{key}",
                "FAIL",
                f"{threads} threads for one process, but this machine has {count} usable cores",
                f"set it to at most {count}",
            )
    needed = sum(need.units for need in _processes(config))
    detail = f"{count} usable, {needed:g} wanted (replicas x engine_threads + ranks x trainer_threads)"
    detail += _elastic(config, count)
    if needed <= count:
        yield Check("cores", "ok", detail)
    else:
        yield Check(
            "cores",
            "warn",
            f"{detail}: no process is pinned, and engines and trainer slow each other down",
            "lower rollout.replicas, resources.engine_threads or resources.trainer_threads",
        )


def available_memory() -> int:
    """Return the bytes that this process may still take from the machine, or from its container if that is less."""
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free  # no cgroup v2 here
    if limit == "max":
        return free
    # Page cache counts as used but is given back under pressure.
    return min(free, int(limit) - used + int(statistics.get("inactive_file", 0)))


def memory(config: RunConfig) -> Iterator[Check]:
    """Check that the memory suffices for a run on CPU; on GPUs, say what a trainer rank takes."""
    model, parameters = _model(config)
    if uses_gpu(config):
        if model is not None:
            yield _memory_of_rank(estimate.trainer_memory(config, model, gpu=True))
        return
    engines = _engines_with_room(config, len(available_cores()))
    needed, free = estimate.run_memory(config, model, parameters, engines), available_memory()
    detail = f"{free / GB:.1f} GB available, about {needed.total / GB:.1f} GB needed"
    if model is None:
        detail += ", and what the model takes, which cannot be read yet"
    else:
        detail += (
            f" (engines {needed.engines / GB:.1f}, trainer {needed.trainer / GB:.1f} and "
            f"{needed.microbatch / GB:.1f} for its largest microbatch)"
        )
    fix = "lower rollout.replicas, rollout.kv_cache_bytes or queue.max_bytes, or use a larger machine"
    queue = config.queue.max_bytes
    if model is not None:
        queue = min(queue, worst_case(config, model).window_bytes)
    if needed.fixed > free:
        yield Check("memory", "FAIL", detail, fix)
    elif needed.total > free:
        yield Check(
            "memory",
            "warn",
            f"{detail}: long responses may end the trainer",
            f"lower trainer.tokens_per_microbatch or rollout.max_response_tokens, set trainer.recompute to full, {fix}",
        )
    elif needed.total + queue > free:
        yield Check("memory", "warn", f"{detail}, and queue.max_bytes may fill {queue / GB:.1f} more", fix)
    else:
        yield Check("memory", "ok", detail)


def _memory_of_rank(rank: estimate.TrainerMemory) -> Check:
    parts = (
        ("parameters", rank.parameters),
        ("gradients", rank.gradients),
        ("optimizer", rank.optimizer),
        ("activations", rank.activations),
        ("logits", rank.logits),
    )
    listed = ", ".join(f"{name} {amount / GB:.1f}" for name, amount in parts)
    return Check("trainer memory", "ok", f"about {rank.total / GB:.1f} GB of each rank's GPU ({listed})")


def _model(config: RunConfig) -> tuple[ModelConfig | None, Parameters]:
    """Return the model and how many parameters it has; none where it cannot be read yet (``inputs.model`` says so)."""
    try:
        model = read_model_config(config.model.path)
        return model, estimate.count_parameters(config.model.path, model)
    except (ModelError, ValueError, OSError):
        return None, Parameters()


def shared_memory(config: RunConfig) -> Iterator[Check]:
    """Check that /dev/shm has room for Ray's object store and, without nccl, for a copy of the weights."""
    _, parameters = _model(config)
    weights = estimate.shared_weights(config, parameters)
    free = free_bytes("/dev/shm")
    detail = f"{free / GB:.1f} GB free in /dev/shm"
    fix = "mount a larger /dev/shm (containers: --shm-size)"
    if free < weights + RAY_MINIMUM_SHM:
        needed = (weights + RAY_MINIMUM_SHM) / GB
        yield Check("shared memory", "FAIL", f"{detail}, {needed:.1f} GB needed for weights and Ray", fix)
    elif free < weights + config.queue.max_bytes:
        yield Check(
            "shared memory",
            "warn",
            f"{detail}, less than queue.max_bytes ({config.queue.max_bytes / GB:.1f} GB) and the weights",
            f"{fix}, or lower queue.max_bytes",
        )
    else:
        yield Check("shared memory", "ok", detail)


def ports(config: RunConfig) -> Iterator[Check]:
    """Check that the ports for /metrics of driver, replicas and ranks are free."""
    host, first = config.metrics.host or "127.0.0.1", config.metrics.port
    # On a cluster, only the driver is sure to be on this host.
    most = config.rollout.replica_range.max + world_size(config.trainer.parallel)
    others = 0 if config.cluster.joined_address else most
    wanted = range(first, first + 1 + others) if first else range(1)
    for port in wanted:
        try:
            with socket.create_server((host, port)):
                pass
        except (OSError, OverflowError) as error:
            yield Check(
                "metrics.port",
                "FAIL",
                f"cannot listen on {host}:{port} ({error})",
                "set metrics.port to 0 or to the first of enough free ports; metrics.host must be local",
            )
            return
    detail = f"{host}:{wanted[0]} to {wanted[-1]} are free" if first else f"free ports of {host} are chosen"
    yield Check("metrics.port", "ok", detail)


def free_bytes(path: str) -> int:
    """Return the free bytes of the file system that contains ``path``; 0 if there is none."""
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0
