"""The gateway: an endpoint as of OpenAI's API for the agents of one rollout worker, in its process and loop.

Each attempt at a rollout has a key of its own: a client that comes with that of an attempt that has ended gets 401,
and can write nothing. Knows policies and where it listens; neither groups nor how an engine is called.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import structlog
import uvicorn

from async_rl.rollout.gateway.app import Application, Dialect
from async_rl.rollout.gateway.endpoint import Endpoint
from async_rl.rollout.policy import Address, Policy
from async_rl.runtime.addresses import WILDCARDS, hold_port, with_port

# Clients keep a connection for the next turn, which comes when their tools have answered.
_IDLE_S = 75

log = structlog.get_logger(__name__)


class Gateway:
    """Serves the policies of rollouts, from the first that asks for it on."""

    def __init__(
        self,
        host: str,
        reached_at: str | None,
        model: str,
        max_model_len: int,
        tokenizer: Any,
        setting: str = "rollout.agent.gateway_host",
    ) -> None:
        """Take the address to listen at; nothing listens yet.

        reached_at: this host's address for programs elsewhere, where ``host`` means all interfaces; None for its name.
        model: its name in answers. max_model_len: tokens of a context. tokenizer: one of transformers. setting: that
        of ``host``.
        """
        self._host = host
        self._setting = setting
        self._reached_at = reached_at
        self._model = model
        self._endpoints: dict[str, Endpoint] = {}
        self._application = Application(self._endpoints.get, Dialect(model, max_model_len, tokenizer))
        self._url: str | None = None
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def requests(self) -> Counter[tuple[str, int]]:
        """Requests answered, by endpoint and status code."""
        return self._application.requests

    @property
    def ignored(self) -> Counter[str]:
        """Fields of sampling in requests that had no effect, by field."""
        return self._application.ignored

    @property
    def joined(self) -> int:
        """Requests that repeated one and got its answer."""
        return self._application.joined

    def open(self, policy: Policy, failed: asyncio.Future[Exception]) -> Address:
        """Make a policy reachable until ``end``; must be called on the event loop. Raises ResourceError.

        ``failed`` gets the exception of a turn for which the rollout must fail, and which its client sees as 503.
        """
        url, key = self._listening(), secrets.token_urlsafe(24)
        self._endpoints[key] = Endpoint(policy, failed)
        return Address(f"{url}/r/{key}/v1", key, self._model)

    async def end(self, key: str) -> None:
        """Refuse a key from now on, and give up the turns that its clients wait for."""
        endpoint = self._endpoints.pop(key, None)
        if endpoint is not None:
            await endpoint.close()

    async def close(self) -> None:
        """End every request, and listen no longer."""
        for key in list(self._endpoints):
            await self.end(key)
        if self._server is not None and self._serving is not None:
            self._server.should_exit = self._server.force_exit = True
            await self._serving
            self._server = self._serving = self._url = None

    def _listening(self) -> str:
        """Return the address at which the gateway listens, which begins with the first call."""
        if self._url is not None:
            return self._url
        listening = hold_port(
            self._host,
            who="the gateway of agents",
            remedy=f"set {self._setting} to an address of each host with engines, or 0.0.0.0 for all",
        )
        reachable = self._reached_at or socket.gethostname() if self._host in WILDCARDS else self._host
        self._url = f"http://{with_port(reachable, listening.getsockname()[1])}"
        settings = uvicorn.Config(
            self._application.app,
            lifespan="off",
            ws="none",
            log_config=None,
            log_level="critical",  # what ends a connection is not an error of ours
            access_log=False,
            timeout_keep_alive=_IDLE_S,
        )
        self._server = _Server(settings)
        # Who connects before it has started waits in the socket.
        self._serving = asyncio.get_running_loop().create_task(self._server.serve(sockets=[listening]))
        log.info("gateway_listens", url=self._url)
        return self._url


class _Server(uvicorn.Server):
    """A server that leaves the signals of the process alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
