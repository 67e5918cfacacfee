"""The groups in flight of one worker at one moment: taken as references, encoded and written later, and adopted.

Taking them costs as much as copying lists. What a partial rollout is made of never changes, so the engine resumes
meanwhile. Encoding and writing happen in threads, group by group, so that memory holds one encoded group at a time.
Knows ``in_flight`` and files; neither the worker nor Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import structlog

from async_rl.config.schema import RunConfig
from async_rl.errors import WireError
from async_rl.queue.wire import Buffer
from async_rl.rollout import in_flight
from async_rl.rollout.in_flight import InFlight
from async_rl.rollout.partial import PartialRollout
from async_rl.runtime.manifest import FileEntry, write_file
from async_rl.types import Prompt, source_of

log = structlog.get_logger(__name__)

Source = Path | Buffer
"""A message of ``Moment.messages``: the file that has it, or its bytes."""


class SavedGroup(NamedTuple):
    """A group in flight in a file."""

    file: str
    """Name of the file in its folder."""
    entry: FileEntry


class Moment:
    """The groups of a worker as they are when this is made."""

    def __init__(
        self,
        groups: Iterable[InFlight],
        merging: Mapping[str, asyncio.Future[PartialRollout]] | None = None,
        *,
        of_agents: Callable[[Prompt], bool] = lambda _: False,
    ) -> None:
        """Take ``groups``. ``merging`` has, by trajectory id, what answers of the engine will have made of some.

        of_agents: whether an agent makes the rollouts of a prompt, of which a trajectory has the id of a response.
        """
        self._groups = [group.copy() for group in groups]
        self._merging = dict(merging or {})
        self._of_agents = of_agents

    async def messages(self) -> AsyncIterator[tuple[str, npt.NDArray[np.uint8]]]:
        """Yield id and message of each group, those first whose answers are merged."""
        for group in sorted(self._groups, key=self._waits):
            await self._settle(group)
            yield group.group_id, await asyncio.to_thread(in_flight.encode, group)

    async def write(self, folder: Path, prefix: str) -> dict[str, SavedGroup]:
        """Write each group to a file of ``folder`` whose name begins with ``prefix``; return them by group id.

        Raises OSError if a file cannot be written.
        """
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        saved: dict[str, SavedGroup] = {}
        async for group_id, message in self.messages():
            file = f"{prefix}-{len(saved):06}"
            saved[group_id] = SavedGroup(file, await asyncio.to_thread(write_file, folder / file, message.data))
        return saved

    def _waits(self, group: InFlight) -> bool:
        """Return whether an answer for this group was still being merged at the moment, and is now."""
        futures = (self._merging.get(name) for name in self._under_way(group))
        return any(future is not None and not future.done() for future in futures)

    async def _settle(self, group: InFlight) -> None:
        """Add the answers that were being merged at the moment. One that could not be merged is left out."""
        for index in () if self._of_agents(group.ticket.prompt) else range(len(group.partials)):
            if (partial := await self._merged(group.trajectory_id(index))) is not None:
                group.partials[index] = partial
        for index, parked in group.parked.items():
            for name in parked.session.under_way:
                if (partial := await self._merged(name)) is not None:
                    group.parked[index] = parked.after(partial)

    async def _merged(self, name: str) -> PartialRollout | None:
        merged = self._merging.get(name)
        if merged is None:
            return None
        await asyncio.wait([merged])
        return None if merged.cancelled() or merged.exception() is not None else merged.result()

    def _under_way(self, group: InFlight) -> Iterator[str]:
        """Yield the trajectory ids of which engine calls may be under way."""
        if not self._of_agents(group.ticket.prompt):
            yield from (group.trajectory_id(index) for index in range(len(group.partials)))
        for parked in group.parked.values():
            yield from parked.session.under_way


def load(config: RunConfig, stop_token_ids: frozenset[int], sources: Iterable[Source]) -> list[InFlight]:
    """Return the groups of these messages that fit the present settings; the others are logged and left out."""
    groups = []
    for source in sources:
        try:
            groups.append(
                in_flight.decode(
                    source.read_bytes() if isinstance(source, Path) else source,
                    n=config.rollout.n,
                    terms=lambda prompt: config.terms(source_of(prompt.prompt_id), prompt.fields),
                    stop_token_ids=stop_token_ids,
                    routing_policy=config.async_training.partial_rollout.routing,
                )
            )
        except (WireError, OSError) as error:
            log.warning("in_flight_group_refused", reason=str(error))
    return groups
