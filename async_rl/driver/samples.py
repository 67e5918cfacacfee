"""Writes down what is kept of a step's groups to be looked at: some responses, and messages for debugging.

The driver reads nothing else of a group than its metadata. What this reads of messages is read in a thread, once the
engines have resumed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import structlog
from ray.exceptions import RayError

from async_rl.config.schema import RunConfig
from async_rl.driver import transcripts
from async_rl.errors import PayloadLost
from async_rl.queue.client import Payload
from async_rl.queue.fetcher import Fetcher
from async_rl.queue.records import Excerpt, GroupMeta
from async_rl.rollout.evaluation import ScoredResponse
from async_rl.runtime.runfolder import RunFolder
from async_rl.types import Prompt

log = structlog.get_logger(__name__)

Leased = Sequence[tuple[GroupMeta, Payload]]


class Samples(NamedTuple):
    """What was read of a step's groups."""

    excerpts: list[Excerpt]
    messages: dict[str, Any]
    """{group id: encoded group} of those that debug.dump_trajectories keeps."""


class SampleWriter:
    """Writes samples.jsonl and trajectories/ of one run."""

    def __init__(self, config: RunConfig, folder: RunFolder, fetcher: Fetcher, decode: Callable[[Any], str]) -> None:
        """``decode``: token ids to text."""
        self._config = config
        self._folder = folder
        self._fetcher = fetcher
        self._decode = decode
        self._read_early: Samples | None = None
        self._writing: asyncio.Future[None] | None = None

    async def before_ack(self, leased: Leased) -> None:
        """Read what the store forgets when the groups are acknowledged. Groups in memory live as long as ``leased``."""
        if self._config.queue.backend == "redis":
            self._read_early = await asyncio.to_thread(self._read_if_there, leased)

    async def begin(self, step: int, version: int, leased: Leased) -> None:
        """Begin to write the samples of a step; those of the step before are written first."""
        await self.finished()
        early, self._read_early = self._read_early, None
        self._writing = asyncio.ensure_future(asyncio.to_thread(self._read_and_write, step, version, leased, early))

    async def finished(self) -> None:
        """Return once everything is written that was begun."""
        if self._writing is not None:
            await self._writing

    def read(self, leased: Leased) -> Samples:
        """Read the samples of a step's groups."""
        number = self._config.metrics.samples_per_step
        responses = [
            (meta.group_id, payload, index) for meta, payload in leased for index in range(meta.num_trajectories)
        ]
        # Spread over the step's groups, so that n samples show n prompts.
        stride = max(1, len(responses) // max(1, number))
        dumped = leased[max(0, len(leased) - self._config.debug.dump_trajectories) :]
        messages = self._fetcher.messages({meta.group_id: payload for meta, payload in dumped})
        return Samples(self._fetcher.excerpts(responses[::stride][:number]), messages)

    def write(self, step: int, version: int, samples: Samples) -> None:
        """Write the samples of a step to the run folder."""
        # Of an agent's rollout one line has every trajectory.
        for excerpt in {excerpt.rollout_id or excerpt.trajectory_id: excerpt for excerpt in samples.excerpts}.values():
            self._folder.write_sample({"step": step, "policy_version": version, **self._readable(excerpt)})
        for group_id, message in samples.messages.items():
            self._folder.write_group(memoryview(message), group_id)

    def _read_and_write(self, step: int, version: int, leased: Leased, early: Samples | None) -> None:
        if (samples := early or self._read_if_there(leased)) is not None:
            self.write(step, version, samples)

    def _read_if_there(self, leased: Leased) -> Samples | None:
        try:
            return self.read(leased)
        except (RayError, PayloadLost) as error:  # their host died: the groups were trained all the same
            log.warning("samples_not_read", reason=str(error).partition("\n")[0])
            return None

    def _readable(self, excerpt: Excerpt) -> Mapping[str, Any]:
        return transcripts.sample(excerpt, self._decode, self._config.metrics.sample_characters)


def readable_answer(
    prompt: Prompt, name: str, response: ScoredResponse, decode: Callable[[Any], str], most: int
) -> dict[str, Any]:
    """Return a response of the evaluation set ``name`` with at most ``most`` characters, and of its prompt as many.

    The further trajectories of an agent's rollout have as many each.
    """
    return {
        "set": name,
        "problem": prompt.prompt_id,
        "row": prompt.row,
        "prompt": transcripts.shortened(prompt.text, most),
        "response": transcripts.readable(response.response_ids, decode, most),
        **(
            {"branches": [transcripts.readable(each, decode, most) for each in response.branches]}
            if response.branches
            else {}
        ),
        "reward": response.reward,
        "finish_reason": response.finish_reason,
    }
