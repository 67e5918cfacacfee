"""Environment variables that Ray reads when it is imported, which a driver sets before. Does not import Ray.

Ray's processes of a cluster that the driver starts inherit them; ``launch/`` sets on other clusters what they need.
"""

from __future__ import annotations

import os

VARIABLES = {
    # Ray prints a paragraph over the live view for each process that dies; the run's log has an event for it. Messages
    # that match this are not printed.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^",
    # A Ray server closes a connection on which an answer has not been acknowledged for so long, and every call on it
    # fails: 20 s by default, in which a network that parts for half a minute costs the workers behind it. Ray itself
    # takes their host for alive for 65 s. What was sent meanwhile is sent again up to half a minute after the network
    # is back, because TCP doubles its pauses; Ray's clients wait for 120 s already.
    "RAY_grpc_keepalive_timeout_ms": "120000",
}


def prepare() -> None:
    """Set what the user has not set."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
