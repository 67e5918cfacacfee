"""What turns, tools and forks cost a replica, by how many rollouts it has in the making.

    .venv/bin/python -m tests.bench.agent_costs [--seconds 480] [--tool-s 8] [--sync-s 0]

A real worker, sessions and admission in virtual time, around an engine of 16 places (``tests.support.kv_engine``) that
reads 10,000 tokens a second, and whose KV cache is of two sizes: for all rollouts that the second limit allows (roomy),
or for one of each place and a quarter more (tight).
Each agent has eight turns of 128 tokens, 2.6 s each, and between two of them a tool that takes --tool-s in the mean and
answers with 1,024 tokens; its context grows from 4,096 to 12,288. With --sync-s the weights change every so often.
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
import json
from typing import Any

from tests.support.agent_costs import ROWS, Times, measure
from tests.support.virtual_time import run


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480.0, help="virtual seconds of each")
    parser.add_argument("--tool-s", type=float, default=8.0, help="mean seconds of a tool")
    parser.add_argument("--sync-s", type=float, default=0.0, help="seconds between two weight syncs; 0 for none")
    options = parser.parse_args()
    times = Times(options.seconds, options.tool_s, options.sync_s)
    found: dict[str, Any] = {"tool_s": options.tool_s, "sync_s": options.sync_s}
    for cache, settings in ROWS:
        found[f"{cache}_{settings}"] = run(lambda loop, row=(settings, cache): measure(loop, *row, times))
        print(cache, settings, found[f"{cache}_{settings}"], flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
