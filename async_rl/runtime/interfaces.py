"""The network interfaces of this host, and which of them a run's process groups use.

Source: the variables of Gloo and NCCL in torch's and NVIDIA's documentation.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from ipaddress import IPv6Address, ip_address

import psutil

from async_rl.errors import ConfigError
from async_rl.runtime.addresses import address_towards, resolve, with_port


def interfaces() -> dict[str, list[str]]:
    """Return the IP addresses of each network interface of this host by its name."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [entry.address.partition("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }


def use_interface(name: str | None, host: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Have Gloo and NCCL use interface ``name`` here, or without one that with the route to rank 0 at ``host``.

    Call it before the process groups are made. Where rank 0 is at the loopback address, all ranks are on its host, and
    the libraries choose for themselves. What ``environment`` has already wins over the route, not over ``name``.
    Raises ConfigError for an interface that this host does not have.
    """
    if name is not None:
        interface_address(name)
        environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"] = name, f"={name}"
    elif not ip_address(resolve(host)[1][0]).is_loopback and (route := interface_towards(host)) is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", route)
        environment.setdefault("NCCL_SOCKET_IFNAME", f"={route}")  # NCCL takes a name without = for a prefix


def interface_address(name: str, there: Mapping[str, Sequence[str]] | None = None) -> str:
    """Return the address of this host's interface ``name``: IPv4 if it has one, else IPv6.

    ``there`` has addresses by interface, by default those of this host. Raises ConfigError for an interface that
    does not exist, or has no address that other hosts can connect to.
    """
    there = interfaces() if there is None else there
    if name not in there:
        raise ConfigError(
            f"cluster.interface: {name} is no network interface of host {socket.gethostname()}, which has "
            f"{', '.join(sorted(there))}"
        )
    found = sorted((ip_address(text) for text in there[name] if "%" not in text), key=lambda one: one.version)
    usable = [one for one in found if not (isinstance(one, IPv6Address) and one.is_link_local)]
    if not usable:
        raise ConfigError(
            f"cluster.interface: {name} has no IP address on host {socket.gethostname()} that other hosts can connect "
            "to; name another interface"
        )
    return str(usable[0])


def interface_towards(host: str, there: Mapping[str, Sequence[str]] | None = None) -> str | None:
    """Return the interface of this host with the route to address ``host``; None if it cannot be found out."""
    own = address_towards(with_port(host, 9))  # any port: nothing is sent there
    there = interfaces() if there is None else there
    return next((name for name, found in there.items() if own in found), None)
