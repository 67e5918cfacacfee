"""Has the trainer's ranks read the groups of a training step before any of them computes.

Ranks compute together: one that found within a step that it cannot read a group would leave its peers waiting. So all
read first, and keep what they have read. Groups whose message was lost with its host are then known before any of their
gradients is computed. Their prompts go back to the dataset, the step takes other groups in their place, and what it has
accumulated stays right. A lost group is noticed here, once it is leased; until then it is in the queue like any other.

Does not know the training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog

from async_rl.driver.actors import Shares, TrainerRanks
from async_rl.driver.recorder import Recorder
from async_rl.queue.broker import PAYLOAD_LOST
from async_rl.queue.client import Payload, QueueClient
from async_rl.queue.records import GroupMeta

log = structlog.get_logger(__name__)

Leased = list[tuple[GroupMeta, Payload]]

# Groups that one line of the log names.
_NAMED = 5


class LeasedGroups:
    """The leased groups of one run, as the trainer's ranks get to read them."""

    def __init__(self, queue: QueueClient, trainers: TrainerRanks, recorder: Recorder) -> None:
        self._queue = queue
        self._trainers = trainers
        self._recorder = recorder

    async def read(self, leased: Leased, divide: Callable[[Leased], Shares], since: int = 0) -> Shares:
        """Have every rank read its share of ``leased[since:]``. Returns the shares, which ``divide`` makes.

        Groups that are lost are taken out of ``leased`` and returned to the dataset. The shares are those of the
        others: none if all are lost. Raises TrainerDied.
        """
        while groups := leased[since:]:
            shares = divide(groups)
            lost = await self._trainers.fetch(shares)
            if not lost:
                return shares
            await self._give_back(leased, lost)
        return []

    async def _give_back(self, leased: Leased, lost: Sequence[str]) -> None:
        log.warning("payloads_lost", groups=len(lost), named=" ".join(lost[:_NAMED]))
        self._recorder.event("payloads_lost", groups=len(lost))
        for group_id in lost:
            await self._queue.return_group(group_id, PAYLOAD_LOST)
            # At once: what is in ``leased`` is released when the step fails.
            leased[:] = [group for group in leased if group[0].group_id != group_id]
