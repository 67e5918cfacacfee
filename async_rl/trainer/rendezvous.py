"""Where the trainer's ranks meet: a key-value store that rank 0 serves, and the network interface of each rank.

Rank 0 holds the store's port from the moment at which the kernel chose it, so no other process can take it. Knows
torch.distributed and this host's interfaces; neither Ray nor Megatron.

Source: torch.distributed.TCPStore; the variables of Gloo and NCCL in torch's and NVIDIA's documentation.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from datetime import timedelta
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING

from async_rl.errors import ConfigError, ResourceError
from async_rl.runtime import addresses
from async_rl.runtime.addresses import address_towards, hold_port, resolve, split_port, with_port

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"

# After waiting this long, a rank considers the others dead: half of Megatron's own default, so that a dead peer
# surfaces as an error within minutes.
COLLECTIVE_TIMEOUT = timedelta(minutes=15)

# The port is open before another rank has its address: what takes longer is a network that does not let it through.
CONNECT_TIMEOUT = timedelta(minutes=2)


def open_store(host: str) -> tuple[TCPStore, str]:
    """Serve a store at ``host``, an address of this host, and at no other. Returns it with its address, host:port.

    It ends with the process or its last reference. Raises ResourceError if ``host`` is no address of this host.
    """
    from torch.distributed import TCPStore

    with hold_port(host) as listening:
        port = int(listening.getsockname()[1])
        store = TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=COLLECTIVE_TIMEOUT,
            master_listen_fd=listening.detach(),
        )
    return store, with_port(host, port)


def join_store(address: str) -> TCPStore:
    """Connect to the store that rank 0 serves at ``address``. Raises ResourceError if this host does not reach it."""
    from torch.distributed import DistError, TCPStore

    host, port = _parts(address)
    try:
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=CONNECT_TIMEOUT)
    except DistError as error:
        raise ResourceError(
            f"host {socket.gethostname()} does not reach trainer rank 0 at {address} within "
            f"{CONNECT_TIMEOUT.total_seconds():g} s; open the hosts' ports to each other, or set cluster.interface to "
            "a network that connects them"
        ) from error
    store.set_timeout(COLLECTIVE_TIMEOUT)
    return store


def use_interface(name: str | None, address: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Have Gloo and NCCL use interface ``name`` here, or without one that with the route to rank 0 at ``address``.

    Call it before the process groups are made. Where rank 0 is at the loopback address, all ranks are on its host, and
    the libraries choose for themselves. What ``environment`` has already wins over the route, not over ``name``.
    Raises ConfigError for an interface that this host does not have.
    """
    host, _ = _parts(address)
    if name is not None:
        interface_address(name)
        environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"] = name, f"={name}"
    elif not ip_address(resolve(host)[1][0]).is_loopback and (route := interface_towards(host)) is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", route)
        environment.setdefault("NCCL_SOCKET_IFNAME", f"={route}")  # NCCL takes a name without = for a prefix


def interface_address(name: str, interfaces: Mapping[str, Sequence[str]] | None = None) -> str:
    """Return the address of this host's interface ``name``: IPv4 if it has one, else IPv6.

    ``interfaces`` has addresses by interface, by default those of this host. Raises ConfigError for an interface that
    does not exist, or has no address that other hosts can connect to.
    """
    interfaces = addresses.interfaces() if interfaces is None else interfaces
    if name not in interfaces:
        raise ConfigError(
            f"cluster.interface: {name} is no network interface of host {socket.gethostname()}, which has "
            f"{', '.join(sorted(interfaces))}"
        )
    found = sorted((ip_address(text) for text in interfaces[name] if "%" not in text), key=lambda one: one.version)
    usable = [one for one in found if not (isinstance(one, IPv6Address) and one.is_link_local)]
    if not usable:
        raise ConfigError(
            f"cluster.interface: {name} has no IP address on host {socket.gethostname()} that other hosts can connect "
            "to; name another interface"
        )
    return str(usable[0])


def interface_towards(host: str, interfaces: Mapping[str, Sequence[str]] | None = None) -> str | None:
    """Return the interface of this host with the route to address ``host``; None if it cannot be found out."""
    own = address_towards(with_port(host, 9))  # any port: nothing is sent there
    interfaces = addresses.interfaces() if interfaces is None else interfaces
    return next((name for name, there in interfaces.items() if own in there), None)


def _parts(address: str) -> tuple[str, int]:
    """Return host and port of the store's address."""
    parts = split_port(address)
    if parts is None:
        raise ResourceError(f"{address} is no address of a store, which is host:port")
    return parts
