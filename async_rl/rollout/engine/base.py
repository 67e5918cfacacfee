"""What the built-in engines share: what a run tells them, and the order of a weight sync."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from typing import Any

from async_rl.config.schema import RunConfig
from async_rl.data.tokenizer import stop_token_ids
from async_rl.errors import EngineError, WeightSyncError
from async_rl.models.config import read_model_config
from async_rl.types import RoutingSpec


class BuiltInEngine(ABC):
    """The part of a ``RolloutEngine`` that knows no library. An engine adds its own, and ``check_alive``.

    A weight sync is refused out of order, and once one has failed the engine does not resume before another succeeds.
    """

    def __init__(self, config: RunConfig, replica: int) -> None:
        self._config = config
        self._replica = replica
        self._model = read_model_config(config.model.path)
        own = stop_token_ids(config.model.path)
        self._stop_token_ids = own + [token for token in config.rollout.stop_token_ids if token not in own]
        self._version = 0
        self._running = asyncio.Event()  # clear while paused: calls begun then wait here
        self._sync_failed: str | None = None
        self._update_begun = False

    @property
    def routing_spec(self) -> RoutingSpec | None:
        return self._model.routing_spec if self._config.rollout.return_routed_experts else None

    @property
    def stop_token_ids(self) -> frozenset[int]:
        return frozenset(self._stop_token_ids)

    @property
    def version(self) -> int:
        return self._version

    @abstractmethod
    def check_alive(self) -> None:
        """Raise EngineDied as ``RolloutEngine`` says."""

    def _check_can_resume(self) -> None:
        if self._sync_failed is not None:
            raise WeightSyncError(
                f"replica {self._replica}: the last weight sync failed, so the weights are unknown: {self._sync_failed}"
            )

    def _check_can_score(self) -> None:
        if not self._running.is_set():
            raise EngineError(f"replica {self._replica}: score: the engine is paused, and would never answer")

    def _check_can_begin_update(self) -> None:
        if self._running.is_set():
            raise WeightSyncError(f"replica {self._replica}: pause the engine before a weight sync")

    def _check_can_finish_update(self) -> None:
        if not self._update_begun:
            raise WeightSyncError(
                f"replica {self._replica}: a weight transfer was finished, but no weights were received"
            )

    def _check_can_change_version(self) -> None:
        if self._running.is_set():
            raise WeightSyncError(f"replica {self._replica}: the version changed while the engine was not paused")

    async def _transfer(self, step: Awaitable[Any]) -> None:
        """Wait for a step of a weight sync. Raises WeightSyncError, and EngineDied if the engine is gone."""
        try:
            await step
        except Exception as error:
            # vLLM hands the engine core's exception over as text.
            self._sync_failed = str(error)
            self.check_alive()
            raise WeightSyncError(f"replica {self._replica}: {error}") from error
