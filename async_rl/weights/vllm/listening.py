"""Where the ranks of an engine meet: at the address that they were given, and at no other of the host.

vLLM 0.30 has torch open the stores in which ranks find each other, and torch listens on all interfaces of the host
whatever the address. Who reaches such a store can write what ranks read there.
"""

from __future__ import annotations

import errno
import importlib
import socket
from typing import Any

from torch.distributed import DistNetworkError

from async_rl.runtime.addresses import resolve

# By its name, for torch.distributed has a function of the same name.
rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")

_TCPStore = rendezvous.TCPStore


def listen_at_own_address() -> None:
    """Have the stores that torch opens in this process from now on listen at their own address. Idempotent."""
    rendezvous.TCPStore = _store


def _store(*, host_name: str, port: int, is_master: bool, **arguments: Any) -> Any:
    """Open a store, or connect to one, as ``torch.distributed.rendezvous`` asks."""
    if is_master:
        family, (address, _) = resolve(host_name)
        try:
            with socket.create_server((address, port), family=family, backlog=1024) as listening:
                arguments["master_listen_fd"] = listening.detach()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # As torch says it: vLLM then tries other ports.
            raise DistNetworkError(f"EADDRINUSE: {host_name}:{port}") from error
    return _TCPStore(host_name=host_name, port=port, is_master=is_master, **arguments)
