"""Network addresses as text, this host's own address in a cluster's network, and ports held there.

Does not know Ray.
"""

from __future__ import annotations

import socket

from async_rl.errors import ResourceError

WILDCARDS = ("", "0.0.0.0", "::")
"""Addresses to listen on that mean every interface of the host."""


def with_port(host: str, port: int) -> str:
    """Return ``host:port``, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_port(address: str) -> tuple[str, int] | None:
    """Return host and port of ``host:port`` or ``[host]:port``; None for anything else, such as ``auto``."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal()):
        return None
    return host.removeprefix("[").removesuffix("]"), int(port)


def hold_port(
    host: str,
    who: str = "trainer rank 0",
    remedy: str = "set cluster.interface to a network interface of its host",
) -> socket.socket:
    """Listen at ``host``, an address of this host, and at no other, on a free port; return the socket.

    The port stays taken from the moment at which the kernel chose it. Raises ResourceError if ``host`` is no address of
    this host, with ``who`` listens and the ``remedy``.
    """
    family, where = resolve(host)
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.bind(where)
        listening.listen()
    except OSError as error:
        listening.close()
        raise ResourceError(f"{who} cannot listen at {host} ({error.strerror}); {remedy}") from error
    return listening


def resolve(host: str) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Return the address family of ``host`` and what to bind there for a port that the kernel chooses.

    Raises ResourceError for a name that means no address.
    """
    try:
        family, _, _, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ResourceError(f"{host} is no address of a host ({error})") from error
    return family, (str(where[0]), int(where[1]))


def address_towards(peer: str) -> str | None:
    """Return the address of this host on the route to ``peer`` (``host:port``), by which that host reaches this one.

    None if ``peer`` names no host and port, or there is no route. Sends nothing.
    """
    target = split_port(peer)
    if target is None:
        return None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(*target, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # of a datagram socket: chooses the route
            return str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return None
