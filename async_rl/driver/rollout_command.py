"""``async-rl rollout``: makes a few rollouts as a run would, and prints each as it went.

Owns which rows they are of, and what is printed. ``rollout.worker`` makes them, with the agent, environment and rewards
of the settings; ``transcripts`` makes text of them.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from async_rl.config.schema import RunConfig
from async_rl.data import reading
from async_rl.data.chat import CheckpointEncoder
from async_rl.data.dataset import BadRow, check_columns, read_row
from async_rl.driver import transcripts
from async_rl.driver.lone_worker import prepared, with_worker
from async_rl.errors import ConfigError, DatasetError, EngineDied
from async_rl.observe.transcripts import as_text
from async_rl.queue.records import BranchExcerpt, Ticket
from async_rl.rollout.in_flight import InFlight
from async_rl.rollout.responses import COST_THEIR_GROUP
from async_rl.rollout.rewards.runner import RewardRunner
from async_rl.rollout.worker import RolloutWorker
from async_rl.runtime.runfolder import to_json
from async_rl.types import Prompt, RolloutRecord, source_of


def run(
    config: RunConfig,
    *,
    n: int,
    row: str | None,
    as_json: bool,
    checkpoint: Path | None = None,
    moved: Path | None = None,
) -> int:
    """Make ``n`` rollouts of one row, or one of each of the first ``n``, and print them. Returns the exit code.

    row: its number, as "SOURCE/NUMBER" where there are sources. as_json: print one line of JSON for each.
    checkpoint, moved: as in ``eval_command.run``. Raises AsyncRLError.
    """
    if n < 1:
        raise ConfigError(f"--n is {n}; it must be at least 1")
    failed = 0

    def show(line: dict[str, Any]) -> None:
        nonlocal failed
        failed += "failed" in line
        sys.stdout.write(f"{to_json(line)}\n" if as_json else f"{as_text(line)}\n")
        sys.stdout.flush()

    with prepared(config, "rollout", checkpoint, moved) as settled:
        encoder = reading.encoder(settled)
        prompts = [_row(settled, row, encoder)] * n if row is not None else _first_rows(settled, n, encoder)
        # What is scored as a group is made as one; else one rollout that fails costs no other.
        source = source_of(prompts[0].prompt_id)
        together = row is not None and settled.terms(source).agent is None and _scores_groups(settled)
        size = n if together else 1
        settled = settled.model_copy(
            update={"rollout": settled.rollout.model_copy(update={"n": size, "min_group_size": None})}
        )
        sys.stderr.write(f"starting the engine of {settled.model.path}, then {len(prompts)} rollouts\n")
        most = settled.metrics.sample_characters

        async def work(worker: RolloutWorker) -> None:
            tickets = [Ticket(f"{prompt.prompt_id}.{at}", prompt, 0) for at, prompt in enumerate(prompts)]
            tasks = [asyncio.create_task(_made(worker, ticket, size)) for ticket in tickets[::size]]
            try:
                for made in asyncio.as_completed(tasks):
                    for line in _lines(*await made, encoder, most):
                        show(line)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        if not with_worker(settled, encoder.tokenizer, work):
            return 130
    if failed:
        sys.stderr.write(f"async-rl: {failed} of {len(prompts)} rollouts failed\n")
    return 1 if failed else 0


async def _made(
    worker: RolloutWorker, ticket: Ticket, size: int
) -> tuple[Ticket, dict[int, RolloutRecord] | str, float]:
    """Return the rollouts of a group by index, or why there are none, and how many seconds they took."""
    began = time.monotonic()
    made: dict[int, RolloutRecord] | str
    try:
        made = await worker.rollouts(InFlight.begin(ticket, size)) or "not finished within rollout.group_timeout_s"
    except EngineDied:
        raise
    except COST_THEIR_GROUP as error:
        made = str(error)
    return ticket, made, time.monotonic() - began


def _lines(
    ticket: Ticket, made: dict[int, RolloutRecord] | str, seconds: float, encoder: CheckpointEncoder, most: int
) -> Iterator[dict[str, Any]]:
    """Yield a line for each rollout of a group: as in samples.jsonl, and what only is known here."""
    prompt = {"row": ticket.prompt.row, "prompt": transcripts.shortened(ticket.prompt.text, most)}
    took = {"seconds": round(seconds, 3)}
    if isinstance(made, str):
        yield {"rollout": f"{ticket.group_id}/0", **prompt, "failed": made, **took}
        return
    for record in made.values():
        branches = transcripts.branches(BranchExcerpt.of(record), encoder.tokenizer.decode, most)
        yield {
            "rollout": record.rollout_id,
            **prompt,
            "reward": record.reward,
            **({"reward_parts": dict(record.reward_parts)} if record.reward_parts else {}),
            **({"metrics": dict(record.metrics)} if record.metrics else {}),
            "end": record.end,
            **({} if record.trainable else {"trainable": False}),
            "tokens": transcripts.tokens(branches),
            **took,
            "branches": branches,
        }


def _scores_groups(config: RunConfig) -> bool:
    rewards = RewardRunner(config.reward)
    rewards.close()
    return rewards.whole_groups


def _row(config: RunConfig, row: str, encoder: CheckpointEncoder) -> Prompt:
    """Return the prompt of one row. Raises ConfigError where there is none, and DatasetError for one that is bad."""
    source, _, number = row.rpartition("/")
    keys = reading.train_keys(config)
    if source not in keys:
        raise ConfigError(f"--row {row}: write {' or '.join(f'{name}/NUMBER'.lstrip('/') for name in keys)}")
    files, reader = reading.files(config, keys[source]), reading.row_reader(config, keys[source], encoder)
    if not number.isdecimal() or not 1 <= int(number) <= files.count:
        raise ConfigError(f"--row {row}: {keys[source]} has the rows 1 to {files.count}")
    check_columns(files, reader)
    found = read_row(files, int(number), reader)
    if isinstance(found, BadRow):
        raise DatasetError(f"{keys[source]}: {found}")
    return found.prompt(_prompt_id(source, found.line))


def _first_rows(config: RunConfig, count: int, encoder: CheckpointEncoder) -> list[Prompt]:
    """Return the first usable rows, of several sources in turn; fewer if there are no more. Raises DatasetError."""

    def usable(source: str, key: str) -> Iterator[Prompt]:
        files, reader = reading.files(config, key), reading.row_reader(config, key, encoder)
        check_columns(files, reader)
        for line in range(1, files.count + 1):
            found = read_row(files, line, reader)
            if not isinstance(found, BadRow):
                yield found.prompt(_prompt_id(source, found.line))

    keys = reading.train_keys(config)
    in_turn = itertools.zip_longest(*(usable(source, key) for source, key in keys.items()))
    found = itertools.islice((each for several in in_turn for each in several if each is not None), count)
    if not (prompts := list(found)):
        raise DatasetError(f"{', '.join(keys.values())}: there is no usable row; async-rl data says why")
    return prompts


def _prompt_id(source: str, line: int) -> str:
    return f"{source}/0-{line}".lstrip("/")
