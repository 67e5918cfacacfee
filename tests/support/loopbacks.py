"""The loopback addresses of this machine, and what a port there is: taken, or open to connections."""

from __future__ import annotations

import errno
import socket

import pytest


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


LOOPBACKS = ["127.0.0.1", pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here"))]
ELSEWHERE = "127.0.0.2"
"""Another address of this machine."""


def is_held(host: str, port: int) -> bool:
    """Whether another process cannot take the port."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as taker:
        try:
            taker.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def is_open(host: str, port: int) -> bool:
    """Whether a connection is accepted there."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True
