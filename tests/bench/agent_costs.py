"""What turns, tools and forks cost a replica, by how many rollouts it has in the making.

    .venv/bin/python -m tests.bench.agent_costs [--seconds 480] [--tool-s 8] [--sync-s 0]
    .venv/bin/python -m tests.bench.agent_costs --engine vllm [--seconds 60] [--tool-s 2]

A real worker, sessions and admission in virtual time, around an engine of 16 places (``tests.support.kv_engine``) that
reads 10,000 tokens a second, and whose KV cache is of two sizes: for all rollouts that the second limit allows (roomy),
or for one of each place and a quarter more (tight).
Each agent has eight turns of 128 tokens, 2.6 s each, and between two of them a tool that takes --tool-s in the mean and
answers with 1,024 tokens; its context grows from 4,096 to 12,288. With --sync-s the weights change every so often.

With --engine vllm the engine is a real one on this machine's cores, in real time: a tiny model, 8 places, turns of 24
tokens, and answers of 64; a context grows from 256 to 896. It is to have two cores that nothing else uses, and weights
do not change.

There is a line for each of

    one        as many rollouts as places, what one limit for both was
    unbounded  four times as many (rollout.max_trajectories), rollout.max_kv_use null
    two        the defaults
    forks      the defaults, where an agent edits the history before every second turn

and the last line of stdout is one JSON object of all:

    rollouts_per_s       that ended
    idle                 share of the engine's places in which no call was
    again                tokens that were computed again because the cache had lost them, by all that were computed
    again_sync           the same for those that were computed under earlier weights
    cached               tokens that were found in the cache, by all that were sent
    open                 rollouts in the making, in the mean
    oldest_p99_s         seconds of a rollout from its first call to its end, 99th percentile
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.support.agent_costs import ROWS, Times, real, real_engine, virtual
from tests.support.virtual_time import run

DEFAULTS = {"virtual": Times(480.0, 8.0), "vllm": Times(60.0, 2.0)}


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=DEFAULTS, default="virtual")
    parser.add_argument("--seconds", type=float, help="of each row, the first half as a warm-up: 480, or 60 with vllm")
    parser.add_argument("--tool-s", type=float, help="mean seconds of a tool: 8, or 2 with vllm")
    parser.add_argument("--sync-s", type=float, default=0.0, help="seconds between two weight syncs; 0 for none")
    options = parser.parse_args()
    if options.sync_s and options.engine != "virtual":
        parser.error("--sync-s is for virtual time")
    default = DEFAULTS[options.engine]
    times = Times(options.seconds or default.seconds, options.tool_s or default.tool_s, options.sync_s)
    found: dict[str, Any] = {"engine": options.engine, "tool_s": times.tool_s, "sync_s": times.sync_s}
    if options.engine == "virtual":
        for cache, settings in ROWS:
            _show(found, cache, settings, run(lambda _, row=(settings, cache): virtual(*row, times)))
    else:
        asyncio.run(_with_vllm(found, times))
    print(json.dumps(found))


async def _with_vllm(found: dict[str, Any], times: Times) -> None:
    for cache, rows in groupby(ROWS, key=lambda row: row[0]):
        with tempfile.TemporaryDirectory() as folder:
            async with real_engine(Path(folder), cache) as engine:
                for _, settings in rows:
                    _show(found, cache, settings, await real(engine, settings, times))


def _show(found: dict[str, Any], cache: str, settings: str, row: dict[str, float]) -> None:
    found[f"{cache}_{settings}"] = row
    print(cache, settings, row, flush=True)


if __name__ == "__main__":
    main()
