"""Where the trainer's ranks meet: a key-value store that rank 0 serves.

Rank 0 holds the store's port from the moment at which the kernel chose it, so no other process can take it. Knows
torch.distributed; neither Ray nor Megatron.

Source: torch.distributed.TCPStore.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import TYPE_CHECKING

from async_rl.errors import ResourceError
from async_rl.runtime.addresses import hold_port, split_port, with_port

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

    host, port = host_and_port(address)
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


def host_and_port(address: str) -> tuple[str, int]:
    """Return host and port of a store's address. Raises ResourceError for what is no such address."""
    parts = split_port(address)
    if parts is None:
        raise ResourceError(f"{address} is no address of a store, which is host:port")
    return parts
