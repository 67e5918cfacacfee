"""One attempt at a weight sync: takes replicas through pause, transfer, canary and resume, each by itself.

``sync`` decides which replicas are to be synced, and what follows an attempt that failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from async_rl.errors import ReplicaFailed, TrainerDied, WeightSyncError, WeightSyncMismatch
from async_rl.runtime.failures import brief
from async_rl.weights.canary_check import CanaryCheck, Expected, Verdict
from async_rl.weights.sides import Replica, Trainer

T = TypeVar("T")

Paused = Callable[[int], Awaitable[None]]
"""Called with each replica while it is paused under its new weights, before it is resumed."""

AllPaused = Callable[[], Awaitable[None]]
"""Called once no replica generates under the old weights any more."""


@dataclass(slots=True)
class Progress:
    """What replicas have reached of one version."""

    version: int | None = None
    agreed: dict[int, Replica] = field(default_factory=dict)
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    phases: dict[int, dict[str, float]] = field(default_factory=dict)
    """Seconds of each phase, by replica."""
    retries: Counter[str] = field(default_factory=Counter)
    """Why an attempt was repeated."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a sync is to do."""

    progress: Progress
    version: int
    peers: Mapping[int, Replica]
    """The replicas that the trainer is connected to."""
    end_calls: bool = False
    held: bool = False
    paused: Paused | None = None
    all_paused: AllPaused | None = None


@dataclass(frozen=True, slots=True)
class _Staged:
    """The trainer's part of a sync, done while the engines generate."""

    updates: Mapping[int, Mapping[str, Any]] | None
    """What each connected replica needs in order to take the weights by itself; None where the trainer sends them."""
    expected: Expected


class Members(Protocol):
    """The replicas; ``sync.WeightSync`` is the real one."""

    async def on(self, replica: int, call: Callable[[Replica], Awaitable[T]]) -> T: ...
    def require(self, replicas: Sequence[int]) -> list[Replica]: ...
    async def raise_failed(self) -> None: ...


class Attempts:
    """Makes attempts, and remembers to which replicas the trainer is connected.

    ``frozen``: generations are frozen at a pause and continue with the canary.
    """

    def __init__(self, trainer: Trainer, canary: CanaryCheck, members: Members, *, frozen: bool) -> None:
        self._trainer = trainer
        self._canary = canary
        self._members = members
        self._frozen = frozen
        self._connected: dict[int, Replica] = {}
        self.trainer_sends = False
        """Whether the trainer itself transfers the weights to all replicas at once, as of the latest attempt."""

    def reconnect(self) -> None:
        """Connect the trainer again at the next attempt."""
        self._connected = {}

    async def make(self, order: Order, replicas: list[int]) -> dict[int, WeightSyncError]:
        """Sync these replicas once. Returns the faults that may be tried again, by replica; raises the others.

        Returns when none of the replicas moves any more, so that the caller finds each either resumed or paused.
        """
        self._members.require(replicas)
        try:
            staged = await self._stage(order.peers) if replicas else None
        except ReplicaFailed:
            raise
        except WeightSyncError as error:
            return dict.fromkeys(replicas, error)
        self._members.require(replicas)
        pausing = {replica: asyncio.ensure_future(self._pause(order, replica)) for replica in replicas}
        opening = self._when_all_paused(order, pausing.values())
        if staged is None:
            await opening
            return {}
        sending = None
        if staged.updates is None:
            sending = asyncio.ensure_future(self._send(order, replicas, pausing))
        every = [self._bring(order, replica, pausing[replica], staged, sending) for replica in replicas]
        others = [opening] if sending is None else [opening, sending]
        results = await asyncio.gather(*every, *others, return_exceptions=True)
        _raise_final([result for result in results if result is not None], frozen=self._frozen)
        failed = {
            replica: result
            for replica, result in zip(replicas, results, strict=False)
            if isinstance(result, WeightSyncError)
        }
        if failed and sending is not None:
            return dict.fromkeys(replicas, next(iter(failed.values())))  # its second broadcast reaches all of them
        return failed

    async def _stage(self, peers: Mapping[int, Replica]) -> _Staged:
        """Have the trainer do its part, connected to ``peers``."""
        if self._connected != peers:
            await self._of_trainer("connect", self._trainer.connect(list(peers.values())))
            self._connected = dict(peers)
        found = await self._of_trainer("stage_weights", self._trainer.stage_weights())
        self.trainer_sends = found is None
        updates = None if found is None else dict(zip(self._connected, found, strict=True))
        return _Staged(updates, await self._canary.expect())

    async def _pause(self, order: Order, replica: int) -> None:
        with _timed(order.progress.phases.setdefault(replica, {}), "pause"):
            await self._members.on(replica, lambda worker: worker.pause(end_calls=order.end_calls))

    async def _when_all_paused(self, order: Order, pausing: Iterable[asyncio.Future[None]]) -> None:
        """Tell the caller when all have paused; not if one failed to, which ends this attempt."""
        if order.all_paused is None:
            return
        if waited := list(pausing):
            await asyncio.wait(waited)
        if all(not pause.cancelled() and pause.exception() is None for pause in waited):
            await order.all_paused()

    async def _send(self, order: Order, replicas: Sequence[int], pausing: Mapping[int, asyncio.Future[None]]) -> None:
        """Have the trainer send the weights to these replicas, of which all must be paused."""
        await asyncio.wait(pausing.values())
        for pause in pausing.values():
            pause.result()
        only = None if len(replicas) == len(self._connected) else list(self._connected).index(replicas[0])
        await self._of_trainer("send_weights", self._trainer.send_weights(order.version, only))

    async def _bring(
        self,
        order: Order,
        replica: int,
        pausing: asyncio.Future[None],
        staged: _Staged,
        sending: asyncio.Future[None] | None,
    ) -> None:
        """Take one replica through the sync, from its pause on."""
        await pausing
        phases = order.progress.phases[replica]
        with _timed(phases, "transfer"):
            if sending is not None:
                await sending
            elif staged.updates is not None:
                await self._receive(replica, staged.updates[replica], order.version)
        with _timed(phases, "canary"):
            verdict = await self._canary.compare(replica, staged.expected, paused=True)
        if order.paused is not None:
            await order.paused(replica)
        order.progress.verdicts[replica] = verdict
        order.progress.agreed[replica] = self._members.require([replica])[0]
        if not order.held:
            await self._members.on(replica, lambda worker: worker.resume())

    async def _receive(self, replica: int, update: Mapping[str, Any], version: int) -> None:
        """Have one replica take the staged weights. Raises WeightSyncError, ReplicaFailed."""
        try:
            await self._members.on(replica, lambda worker: worker.receive(update, version))
        except WeightSyncError:
            raise
        except Exception as error:
            raise WeightSyncError(f"rollout-{replica}: receive: {brief(error)}") from error

    async def _of_trainer(self, what: str, call: Awaitable[T]) -> T:
        """Await a call of the trainer in which it calls the engines. Raises ReplicaFailed if one of them failed."""
        try:
            return await call
        except TrainerDied:
            raise
        except Exception as error:
            await self._members.raise_failed()
            if isinstance(error, WeightSyncError):
                raise
            raise WeightSyncError(f"{what}: {brief(error)}") from error


def _raise_final(errors: Sequence[BaseException], *, frozen: bool) -> None:
    """Raise the first and worst of what ended an attempt, unless all of it may be tried once more.

    ``frozen``: whether frozen generations resumed with the canary, under weights that are unknown if it disagreed.
    """
    order: tuple[Callable[[BaseException], bool], ...] = (
        lambda error: not isinstance(error, WeightSyncError),
        lambda error: frozen and isinstance(error, WeightSyncMismatch),
        lambda error: isinstance(error, ReplicaFailed),
    )
    for is_final in order:
        for error in errors:
            if is_final(error):
                raise error


@contextlib.contextmanager
def _timed(phases: dict[str, float], phase: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    phases[phase] = phases.get(phase, 0.0) + time.monotonic() - start
