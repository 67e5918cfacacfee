"""Judges what the hosts of a cluster have against what a run needs of them, host by host. Pure.

``doctor.host`` looks at one host, and the driver asks all of them at once (``driver.hosts``). What a host has is
compared with the driver's process, which read the settings, the model and the data.

The hosts of a run are those with GPUs, or on CPU with CPUs, that Ray distributes, and the driver's; others of the
cluster need nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Literal

from async_rl.config.schema import RunConfig
from async_rl.doctor.check import Check
from async_rl.doctor.host_report import GB, HostReport, Needs, room_of, used_hosts
from async_rl.doctor.placement import counted, filled, listed, misfit, plan_on, processes, too_large
from async_rl.errors import ConfigError
from async_rl.rollout.environments.named import environments_of
from async_rl.rollout.rewards.named import rewards_of

_DRIVER_ONLY = "data."
"""Settings whose files the driver alone reads."""


def device_of(config: RunConfig, hosts: Sequence[HostReport]) -> Literal["cpu", "cuda"]:
    """Return the device of engines and trainer: for auto, cuda if a host has GPUs, whatever the driver's has."""
    if config.resources.device != "auto":
        return config.resources.device
    return "cuda" if any(host.gpus for host in hosts) else "cpu"


def user_modules(config: RunConfig) -> dict[str, str]:
    """Return the modules of the user that processes of a run import, and for each a setting that names it."""
    settings: dict[str, str | None] = {
        "trainer.loss.policy": config.trainer.loss.policy,
        "trainer.loss.advantage": config.trainer.loss.advantage,
    }
    for section, agent in config.rollout.agent_sections.items():
        settings[f"{section}.function"] = agent.function
        settings[f"{section}.environment"] = None if agent.python else agent.environment
    named = {value: key for key, value in settings.items() if value is not None and ":" in value}
    named |= {name: config.rollout.engine_setting for name in config.rollout.engine_names if ":" in name}
    named |= environments_of(config)
    found = {name.partition(":")[0]: key for name, key in named.items()}
    found |= {reward.module: reward.setting for reward in rewards_of(config.reward)}
    return {module: key for module, key in found.items() if not module.startswith("async_rl.")}


def judge(config: RunConfig, needs: Needs, hosts: Sequence[HostReport], own: HostReport) -> list[Check]:
    """Check the hosts of a run. ``own`` is what the driver's process sees."""
    used = used_hosts(needs, hosts, own)
    silent, answering = [host for host in used if host.fault], [host for host in used if not host.fault]
    found = [_answers(silent, answering)]
    for check in (*_OF_EACH_HOST, _backend, _copies):
        found.extend(check(config, answering, own))
    found.extend(_room(config, needs, answering))
    if needs.device == "cuda":
        found.extend(_gpus(config, needs, answering))
    else:
        found.extend(_processors(config, needs, answering))
    found.extend(_shared_memory(needs, answering))
    return found


def lack(config: RunConfig, host: HostReport, own: HostReport) -> Check | None:
    """Return what keeps one host from having processes of a run, whatever other hosts there are; None if nothing does.

    ``own`` is what the driver's process sees.
    """
    if host.fault:
        return _answers([host], [])
    found = (result for check in _OF_EACH_HOST for result in check(config, [own, host], own))
    return next((result for result in found if result.status == "FAIL"), None)


def _answers(silent: Sequence[HostReport], answering: Sequence[HostReport]) -> Check:
    if silent:
        return Check(
            "hosts",
            "FAIL",
            listed([f"{host.name}: {host.fault}" for host in silent]),
            "install the same code there and start Ray again, or take the host out of the cluster (ray stop)",
        )
    return Check("hosts", "ok", f"{len(answering)}: {listed([host.name for host in answering])}")


def _versions(_: RunConfig, hosts: Sequence[HostReport], own: HostReport) -> Iterator[Check]:
    """Check that code, Python and packages are those of the driver."""

    def version(package: str) -> Callable[[HostReport], str]:
        # The part after the plus sign names the build: a driver without a GPU may have another.
        return lambda host: host.packages.get(package, "not installed").partition("+")[0]

    compared = {
        "Python": lambda host: ".".join(host.python.split(".")[:2]),
        "async_rl": lambda host: host.code,
        **{package: version(package) for package in own.packages},
    }
    same = True
    for what, value in compared.items():
        others = [f"{host.name}: {value(host)}" for host in hosts if value(host) != value(own)]
        if others:
            same = False
            yield Check(
                what,
                "FAIL",
                f"the driver has {value(own)}, other hosts do not ({listed(others)})",
                "install the same on every host, and start Ray there again",
            )
    if same:
        packages = ", ".join(f"{name} {version(name)(own)}" for name in own.packages)
        yield Check("versions", "ok", f"the same everywhere: Python {own.python}, async_rl {own.code}, {packages}")


def _modules(config: RunConfig, hosts: Sequence[HostReport], own: HostReport) -> Iterator[Check]:
    """Check that the user's functions are the same code on every host."""
    for module, key in user_modules(config).items():
        absent = [host.name for host in hosts if host.modules.get(module) is None]
        others = [host.name for host in hosts if host.modules.get(module) not in (None, own.modules[module])]
        if absent:
            yield Check(
                key,
                "FAIL",
                f"the module {module} is not found on {listed(absent)}",
                "install it there, or set PYTHONPATH where `ray start` is called",
                ConfigError,
            )
        elif others:
            yield Check(
                key,
                "FAIL",
                f"the module {module} is another on {listed(others)} than where the driver is",
                "install the same on every host",
                ConfigError,
            )
        else:
            yield Check(key, "ok", f"{module}, the same everywhere")


def _paths(config: RunConfig, hosts: Sequence[HostReport], own: HostReport) -> Iterator[Check]:
    """Check that the files that settings name are the same on every host."""
    for key, mine in own.paths.items():
        if mine is None:
            continue  # ``inputs`` reports it
        absent = [host.name for host in hosts if host.paths.get(key) is None]
        differences = {host.name: _difference(mine, host.paths.get(key)) for host in hosts}
        others = [f"{name}: {difference}" for name, difference in differences.items() if difference]
        by_driver = key.startswith(_DRIVER_ONLY)
        if absent or others:
            fault = f"is not on {listed(absent)}" if absent else f"has other content on {listed(others)}"
            yield Check(
                key,
                "warn" if by_driver else "FAIL",
                f"the path exists where the driver is, but {fault}"
                + ("; only the driver reads it, so the run can start, but it can be resumed here only" * by_driver),
                "use a folder that all hosts share, or copy it to the same place on each"
                + " (cluster.shared_fs: false is for the run folder alone)" * (not config.cluster.shared_fs),
                ConfigError,
            )
        else:
            yield Check(key, "ok", "the same everywhere")


def _difference(mine: Mapping[str, str], other: Mapping[str, str] | None) -> str:
    """Return the names of files that differ; empty if none does, or the whole path is absent."""
    if other is None or other == mine:
        return ""
    names = [name for name in sorted({*mine, *other}) if mine.get(name) != other.get(name)]
    return listed([name or "the file" for name in names], most=3)


def _runs(config: RunConfig, hosts: Sequence[HostReport], own: HostReport) -> Iterator[Check]:
    """Check that the folder of the runs is one and the same on every host, and can be written to.

    With cluster.shared_fs false: that each host but the driver's can keep what is written there.
    """
    if not config.cluster.shared_fs:
        yield _spools(config, hosts, own)
        return
    for have, fault in (
        ([host.name for host in hosts if not host.shares_runs], "what the driver writes there is not on"),
        ([host.name for host in hosts if not host.writes_runs], "it cannot be written to on"),
    ):
        if have:
            yield Check(
                "runs",
                "FAIL",
                f"{config.runs} must be one folder for all hosts, but {fault} {listed(have)}",
                "set --runs to a folder on a file system that all hosts share, or cluster.shared_fs to false",
                ConfigError,
            )
            return
    yield Check("runs", "ok", f"{config.runs} is the same folder everywhere")


def _spools(config: RunConfig, hosts: Sequence[HostReport], own: HostReport) -> Check:
    faults = [f"{host.name}: {host.spool_fault}" for host in hosts if host.spool_fault and host.address != own.address]
    if faults:
        fix = "set cluster.local_dir to a folder that each host has, and where it can be written"
        return Check("cluster.local_dir", "FAIL", listed(faults, most=1), fix, ConfigError)
    return Check("runs", "ok", f"{config.runs} is on {own.name} alone, to which other hosts send what they write")


def _interface(config: RunConfig, hosts: Sequence[HostReport], _: HostReport) -> Iterator[Check]:
    """Check that cluster.interface is on every host, with an address by which others reach it."""
    name = config.cluster.interface
    if name is None:
        return
    without = [host for host in hosts if name not in with_address(host)]
    local = [host.name for host in hosts if any(_is_loopback(address) for address in host.interfaces.get(name, ()))]
    if without:
        there = [f"{host.name} has {', '.join(with_address(host))}" for host in without]
        fault = f"{name} is no interface with an address on every host: {listed(there, most=4)}"
    elif local and len({host.address for host in hosts}) > 1:
        fault = f"{name} is loopback on {listed(local)}, by which no other host is reached"
    else:
        yield Check("cluster.interface", "ok", f"{name} is on every host")
        return
    yield Check(
        "cluster.interface",
        "FAIL",
        fault,
        "set it to an interface that every host has, or to null for the one with the route to rank 0",
        ConfigError,
    )


def with_address(host: HostReport) -> list[str]:
    """Return the names of a host's interfaces that have an address to which other hosts can connect by itself."""

    def usable(address: str) -> bool:
        parsed = _parsed(address)
        return parsed is not None and not (parsed.version == 6 and parsed.is_link_local)

    return [name for name, addresses in host.interfaces.items() if any(map(usable, addresses))]


def _metrics(config: RunConfig, hosts: Sequence[HostReport], _: HostReport) -> Iterator[Check]:
    """Check that metrics.host is an address that each host has, and by which others reach it."""
    address = config.metrics.host
    if address is None or len({host.address for host in hosts}) == 1:
        return
    without = [host.name for host in hosts if not any(address in found for found in host.interfaces.values())]
    if _is_loopback(address):
        fault = "reaches no other host, so that Prometheus would read the metrics of another process"
    elif without and (parsed := _parsed(address)) is not None and not parsed.is_unspecified:
        fault = f"is no address of {listed(without)}"
    else:
        return
    yield Check(
        "metrics.host",
        "FAIL",
        f"{address} {fault}",
        "set it to null for the address of each host in the cluster's network, or to 0.0.0.0 for all its interfaces",
        ConfigError,
    )


def _is_loopback(address: str) -> bool:
    parsed = _parsed(address)
    return address == "localhost" if parsed is None else parsed.is_loopback


def _parsed(address: str) -> IPv4Address | IPv6Address | None:
    """Return an IP address; None for a name, which may mean another address on each host."""
    try:
        return ip_address(address)
    except ValueError:
        return None


def _backend(config: RunConfig, hosts: Sequence[HostReport], own: HostReport) -> Iterator[Check]:  # noqa: ARG001
    """Check that weights reach engines on other hosts than the trainer's."""
    if config.sync_backend == "shm" and len(hosts) > 1:
        yield Check(
            "sync.backend",
            "FAIL",
            f"shm reaches engines on the trainer's host alone, but the cluster has {len(hosts)} hosts",
            "set sync.backend to auto",
            ConfigError,
        )


def _copies(config: RunConfig, hosts: Sequence[HostReport], _: HostReport) -> Iterator[Check]:
    """Check that there is a second host for the copies of finished groups, and room for them in the object stores."""
    if config.queue.copies == 1:
        return
    store, needed = sum(host.store_bytes for host in hosts), config.queue.max_bytes * config.queue.copies
    detail = f"{config.queue.copies}: finished groups take up to {needed / GB:.1f} GB in the object stores of all hosts"
    if len(hosts) == 1:
        yield Check(
            "queue.copies",
            "warn",
            f"{config.queue.copies}, but the cluster has one host: groups have one copy until another host joins",
            "join another host, or set queue.copies to 1",
        )
    elif store < needed:
        yield Check(
            "queue.copies",
            "warn",
            f"{detail}, which have {store / GB:.1f} GB: Ray then writes groups to disk",
            "start Ray with a larger --object-store-memory, or lower queue.max_bytes",
        )
    else:
        yield Check("queue.copies", "ok", f"{detail}, which have {store / GB:.1f} GB")


def _room(config: RunConfig, needs: Needs, hosts: Sequence[HostReport]) -> Iterator[Check]:
    """Check that the run will place every process; on too few CPUs it does, and they slow each other."""
    room, replicas = room_of(needs, hosts), config.rollout.replica_range
    fault = misfit(config, room, needs.unit)
    if fault is None:
        needed = sum(need.units for need in processes(config))
        detail = f"{sum(room.values())} on {counted(len(hosts), 'host')}, {needed:g} needed"
        if config.rollout.elastic:
            parts = sum(load.engines for load in filled(config, room).values())
            fitting = parts // config.rollout.hosts_per_engine
            detail += (
                f" for {counted(replicas.min, 'engine')} (rollout.replicas.min) and the trainer; {fitting} fit of "
                f"{replicas.max} (max), the others wait for hosts"
            )
        yield Check(needs.unit, "ok", detail)
    elif config.rollout.elastic and not plan_on(config, room).fits and plan_on(config, room, engines=0).fits:
        detail = f"{fault}; the trainer fits, and the run waits for hosts, for watchdog.abort_s at most"
        yield Check(needs.unit, "warn", detail, "nothing, if an autoscaler or a scheduler adds hosts")
    else:
        fix = f"lower {', '.join(need.settings for need in processes(config))}, or join a larger cluster"
        yield Check(needs.unit, "warn" if plan_on(config, room).fits else "FAIL", fault, fix)


def _gpus(config: RunConfig, needs: Needs, hosts: Sequence[HostReport]) -> Iterator[Check]:
    """Check the builds for GPUs, and that GPUs are free."""
    room = room_of(needs, hosts)
    builds = [host.name for host in hosts if host.gpus and host.packages.get("torch", "").endswith("+cpu")]
    if builds:
        yield Check("torch build", "FAIL", f"a CPU build on {listed(builds)}", "install torch's CUDA build there")
    free = {host.name: host.free_gpus for host in hosts}
    if misfit(config, room, needs.unit) is None and (fault := misfit(config, free, "free GPUs")):
        yield Check("free GPUs", "warn", fault, "wait until others have ended (ray status)")


def _processors(config: RunConfig, needs: Needs, hosts: Sequence[HostReport]) -> Iterator[Check]:
    """Check what only runs on CPU need: cores, compilers and memory; and that nothing is asked of GPUs."""
    if config.sync.backend == "nccl":
        yield Check(
            "sync.backend",
            "FAIL",
            "nccl needs GPUs, and no host of the cluster has one",
            "set sync.backend to auto",
            ConfigError,
        )
    cores = {host.name: host.cores for host in hosts}
    if fault := too_large(config, cores, "cores"):
        yield Check("cores", "FAIL", fault, "lower resources.engine_threads or resources.trainer_threads")
    without = [host.name for host in hosts if not host.compiler]
    if needs.compiles and without:
        yield Check(
            "C++ compiler",
            "FAIL",
            f"none on {listed(without)}, and vLLM compiles the model on CPU",
            "install g++ there, or set rollout.enforce_eager to true",
        )
    available = sum(host.memory_bytes for host in hosts)
    detail = f"{available / GB:.1f} GB available in all, about {needs.memory_bytes / GB:.1f} GB needed"
    fix = "lower rollout.replicas, rollout.kv_cache_bytes or queue.max_bytes, or join a larger cluster"
    yield Check("memory", "FAIL" if available < needs.memory_bytes else "ok", detail, fix)


def _shared_memory(needs: Needs, hosts: Sequence[HostReport]) -> Iterator[Check]:
    """Check /dev/shm of the hosts, through which engines take the weights."""
    short = [f"{host.name}: {host.shm_bytes / GB:.1f} GB" for host in hosts if host.shm_bytes < needs.shm_bytes]
    if not short:
        yield Check("shared memory", "ok", f"{needs.shm_bytes / GB:.1f} GB for weights are free in /dev/shm everywhere")
        return
    yield Check(
        "shared memory",
        "FAIL" if len(short) == len(hosts) else "warn",
        f"less than the {needs.shm_bytes / GB:.1f} GB that weights take are free in /dev/shm of {listed(short)}",
        "mount a larger /dev/shm there (containers: --shm-size)",
    )


# What a host lacks whatever other hosts there are.
_OF_EACH_HOST = (_versions, _modules, _paths, _runs, _interface, _metrics)
