"""What the trainer's ends of the weight-transfer backends share: gathering whole, and weights that are staged.

``shm`` and ``object_store`` copy the weights to where engines take them from (``stage``) before these are paused.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine

T = TypeVar("T")


@contextlib.contextmanager
def gathered(source: Iterable[T]) -> Iterator[Iterator[T]]:
    """Give out the tensors of ``source``, and take those that are left when the block ends, also if it failed.

    Gathering a parameter is a collective: a rank that left early would keep the others waiting.
    """
    tensors = iter(source)
    try:
        yield tensors
    finally:
        for _ in tensors:
            pass


class StagingTrainerEngine(TrainerWeightTransferEngine[Any]):  # type: ignore[misc]  # vLLM is not followed
    """A trainer's end that stages the weights; engines take them by an update, one by one or all at once."""

    _update: dict[str, Any] | None = None
    _is_staged = False

    def stage(self) -> dict[str, Any] | None:
        """Bring the weights of now to where engines take them from, for the next ``send_weights`` to announce.

        Returns what an engine takes as ``update_info``; None on ranks that do not send.
        """
        self._update = self._bring()
        self._is_staged = True
        return self._update

    @abstractmethod
    def _bring(self) -> dict[str, Any] | None:
        """Do what ``stage`` says, which is different for each backend."""

    def send_weights(self) -> None:
        if not self._is_staged:
            self.stage()
        self._is_staged = False
        if self._update is None:
            return
        self.client.start_weight_update()
        self.client.update_weights(self._update)
        self.client.finish_weight_update()
