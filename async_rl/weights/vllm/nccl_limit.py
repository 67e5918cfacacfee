"""Time limits for NCCL, which has none: ranks meet in a thread that can be left behind, and transfers are aborted.

Knows communicators as vLLM makes them (``PyNcclCommunicator``), and imports nothing of vLLM.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import torch

from async_rl.errors import WeightSyncError


class Limit:
    """Aborts a communicator, from another thread, when a transfer takes too long."""

    def __init__(self, communicator: Any, timeout_s: float) -> None:
        self._communicator = communicator
        self._timeout_s = timeout_s
        self._aborted = False
        self._because: Exception | None = None
        self._lock = threading.Lock()

    def abort(self, because: Exception | None = None) -> None:
        """End calls under way, in whichever thread, for good; ``because`` is None when the time limit is over."""
        with self._lock:
            if self._aborted:
                return
            self._aborted, self._because = True, because
        self._communicator.destroy()

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Abort when this block takes longer. Raises the reason if it was aborted, also if no call has noticed.

        With its communicator aborted, vLLM skips every broadcast, and would load what is in its buffers.
        """
        timer = threading.Timer(self._timeout_s, self.abort)
        timer.daemon = True
        timer.start()
        try:
            yield
        except Exception:
            self._raise_if_aborted(what)
            raise
        finally:
            timer.cancel()
        self._raise_if_aborted(what)

    def _raise_if_aborted(self, what: str) -> None:
        if self._aborted:
            raise self._because or WeightSyncError(
                f"{what} over NCCL took longer than {self._timeout_s:g} s, half of sync.timeout_s; raise it, or see "
                "the logs of engines and trainer"
            )


class Meeting:
    """Waits for the other ranks of a communicator in a thread, which has no end if they do not come.

    ``make`` opens this rank's end and returns the communicator, on the device of the thread that calls this.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._future: Future[Any] = Future()
        self._lock = threading.Lock()
        self._given_up = False
        device = torch.accelerator.current_device_index()

        def meet() -> None:
            try:
                with torch.accelerator.device_index(device):
                    communicator = make()
            except BaseException as error:  # noqa: BLE001 - ``result`` raises it
                self._future.set_exception(error)
                return
            with self._lock:
                if not self._given_up:
                    self._future.set_result(communicator)
                    return
            communicator.destroy()

        threading.Thread(target=meet, daemon=True).start()

    def result(self, timeout_s: float) -> Any:
        """Return the communicator. Raises WeightSyncError after that long, and what ``make`` raised."""
        try:
            return self._future.result(timeout_s)
        except TimeoutError:
            self.give_up()
            raise WeightSyncError(
                f"trainer and engines did not meet for NCCL within {timeout_s:g} s, half of sync.timeout_s; see the "
                "logs of the engines, and check that they reach the trainer's host"
            ) from None

    def give_up(self) -> None:
        """Destroy the communicator if the others do come."""
        with self._lock:
            self._given_up = True
            made = self._future.done() and self._future.exception() is None
        if made:
            self._future.result().destroy()
