"""Network addresses as text, this host's interfaces, and its own address in a cluster's network. Does not know Ray."""

from __future__ import annotations

import socket

import psutil

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


def interfaces() -> dict[str, list[str]]:
    """Return the IP addresses of each network interface of this host by its name."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [entry.address.partition("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }


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
