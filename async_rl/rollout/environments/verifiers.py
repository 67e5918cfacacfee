"""Environments of the library verifiers as ``rollout.agent.environment``, whichever version of it is installed.

The library makes the whole rollout: it asks the policy at the gateway, so that what was sampled is known token by token
as for any agent, and says what the rollout was worth. It runs in an environment host whose interpreter has verifiers,
and imports nothing else that a host has not. ``verifiers_v0`` has environments of version 0.3, ``verifiers_v1`` those
of 0.4.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

from async_rl.rollout.environments.instance import Failed
from async_rl.rollout.environments.interface import Context, PolicyAddress, Step, Task

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Loaded(Protocol):
    """An environment of one version of the library."""

    def check(self) -> None:
        """Refuse an environment that cannot be trained on. Raises Failed."""

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of "train" or "eval". Raises Failed."""

    async def play(self, task: Task, policy: PolicyAddress) -> Step:
        """Make the rollout of a row and return what it was worth. Raises Failed."""


class Verifiers:
    """One rollout with an environment of verifiers, of which all rollouts of a process have the same object."""

    _loaded: ClassVar[dict[str, Loaded]] = {}

    def __init__(
        self, environment: str, args: Mapping[str, Any] | None = None, select: Mapping[str, Any] | None = None
    ) -> None:
        """Take an environment's id, or module:function of one of your own, and the arguments that it is made with.

        select: which tasks of a taskset are the rows of "train" and "eval", from version 0.4 on.
        """
        self._environment = self._load(environment, args, select)
        self._task: Task | None = None

    @classmethod
    def prepare(
        cls, environment: str, args: Mapping[str, Any] | None = None, select: Mapping[str, Any] | None = None
    ) -> None:
        """Load the environment, once in a process. Raises Failed."""
        cls._load(environment, args, select).check()

    @classmethod
    def rows(
        cls,
        split: str,
        environment: str,
        args: Mapping[str, Any] | None = None,
        select: Mapping[str, Any] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows of its dataset for "train" or "eval". Raises Failed."""
        return cls._load(environment, args, select).rows(split)

    @classmethod
    def _load(cls, environment: str, args: Mapping[str, Any] | None, select: Mapping[str, Any] | None) -> Loaded:
        key = json.dumps([environment, args, select], sort_keys=True, default=str)
        if key not in cls._loaded:
            if threading.current_thread() is not threading.main_thread():
                # It sets handlers of signals, which only the main thread may.
                raise Failed("runs in environment hosts alone; leave rollout.agent.inline false")
            handlers = {each: signal.getsignal(each) for each in _SIGNALS}
            try:
                cls._loaded[key] = _made(environment, dict(args or {}), dict(select or {}))
            finally:
                for each, handler in handlers.items():
                    if handler is not None:
                        signal.signal(each, handler)  # Its own would run its teardown, and not end the host.
        return cls._loaded[key]

    def setup(self, task: Task, context: Context) -> None:
        """Take the row."""
        del context
        self._task = task

    async def rollout(self, policy: PolicyAddress) -> Step:
        """Have the library make the rollout and score it. Raises Failed."""
        assert self._task is not None, "setup comes first"
        return await self._environment.play(self._task, policy)


def _made(environment: str, args: dict[str, Any], select: dict[str, Any]) -> Loaded:
    """Return the environment in the form of the version that is installed. Raises Failed."""
    try:
        import verifiers
    except ModuleNotFoundError as error:
        if error.name != "verifiers":
            raise
        raise Failed(f"{sys.executable} has no module verifiers; name one that has it (rollout.agent.python)") from None
    if hasattr(verifiers, "load_environment"):
        from async_rl.rollout.environments import verifiers_v0

        if select:
            raise Failed("arguments.select is for tasksets, which verifiers has from 0.4 on; leave it out")
        return verifiers_v0.load(environment, args)
    try:
        from async_rl.rollout.environments import verifiers_v1
    except ModuleNotFoundError as error:
        if error.name != "verifiers.v1":
            raise
        raise Failed(
            f"has no form for verifiers {verifiers.__version__}; install requirements/verifiers-v1.txt (0.4) or "
            "requirements/verifiers.txt (0.3)"
        ) from None
    return verifiers_v1.load(environment, args, select)
