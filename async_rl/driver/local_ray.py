"""Starts a Ray cluster of this host alone, which no other host can reach and no other user can enter.

A process that reaches the ports of a Ray cluster can run code as its user, if it has the token that the cluster asks
for, or if that asks for none. Ray 2.60 listens on every interface of the host, also where no other host is to join. It
would listen on loopback alone if 127.0.0.1 were the host's address, but replaces that address by one of a network
interface, except on Windows and macOS. While Ray starts, this module patches the constant that says so.

Ray asks for a token unless the environment says otherwise. By default it keeps one in the home folder, in a file that
every user of the host may read. A cluster started here has a token of its own, which only its processes have.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import Any

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # not in its stubs

ADDRESS = "127.0.0.1"

# The trainer's process groups. Their libraries would listen at the address of the host's name, or of its first network.
_LIBRARIES = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}

_MODE, _TOKEN, _TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def start(**arguments: Any) -> None:
    """Call ``ray.init`` with these arguments for a new cluster on loopback that asks for a token.

    The environment, which the cluster's processes inherit, keeps the trainer's process groups on loopback as well.

    The token is that of RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH where one of them is set, so that Ray's own programs can
    be used on the cluster. Raises what ``ray.init`` raises.
    """
    for name, interface in _LIBRARIES.items():
        os.environ.setdefault(name, interface)
    _ask_for_token()
    with loopback():
        ray.init(_node_ip_address=ADDRESS, **arguments)


@contextlib.contextmanager
def loopback() -> Iterator[None]:
    """Let Ray accept 127.0.0.1 as the address of this host."""
    accepts_networks = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = accepts_networks


def _ask_for_token() -> None:
    os.environ[_MODE] = "token"  # inherited by every process of the cluster
    if not os.environ.get(_TOKEN) and not os.environ.get(_TOKEN_FILE):
        os.environ[_TOKEN] = secrets.token_hex(32)
    # Ray has read both when it was imported.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
