"""What the gateway of agents costs: a thousand agents at one time that ask over HTTP, beside as many in process.

    .venv/bin/python -m tests.bench.gateway [--sessions 1000] [--pairs 3] [--turn-s 4]

A real worker around a scripted engine, with a real tokenizer and chat template, in a process of its own; the agents
that ask over HTTP, on loopback, are in another. Each agent makes four turns that extend its history and one that forks
it, and pauses before each for up to half as long as a turn takes. Waves of them take turns: in process, over HTTP, and
so on, in one process. There are no routed experts, of which HTTP carries none. The last line of stdout is one JSON
object, in which [a, b] is [in process, over HTTP], and what compares both is the median of the pairs:

    loop_ms_per_call          processor time of the event loop, [a, b];  loop_http_over_in_process
    calls_per_s               of all agents, if no call took longer than the engine's turn
    gateway_loop_share        the share of the event loop that the gateway takes then: loop_ms_per_call over HTTP less
                              in process
    process_ms_per_call       the same of the whole process, whose threads render templates, [a, b]
    added_ms_p50, added_ms_p99          quantiles of the seconds of a call, over HTTP less in process
    call_p50_ratio, call_p99_ratio      the same, over HTTP over in process
    kb_per_session            what the process has gained while all agents have had their turns and none has ended,
                              [a, b], each in a process of its own
    kb_left_per_session       what it has of that when all have ended, while the worker serves on, [a, b]
    objects_left_per_session  the same of Python's objects: where there are none, the allocator keeps those bytes
    large_loop_ms_per_call    loop_ms_per_call of histories of up to --large letters, [a, b]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.gateway_load import N, Shape, Wave, Way, waves

WAYS: tuple[Way, Way] = ("in_process", "http")


def measure(ways: Sequence[Way], shape: Shape) -> tuple[dict[Way, Wave], list[Wave]]:
    """Run waves in a process of their own, behind small ones, of which the first two load what all need.

    Returns the last small one of each way, and the others.
    """
    small = replace(shape, sessions=N, turn_s=0.01, think_s=0.0)
    plan = [*((way, small) for way in WAYS * 2), *((way, shape) for way in ways)]
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
        made = pool.apply(waves, (plan, Path(folder)))
    return {wave.way: wave for wave in made[2:4]}, made[4:]


def objects_left(small: Wave, wave: Wave) -> float:
    """Return how many of Python's objects a wave has left for each agent that it had more than the ``small`` one."""
    return (wave.objects_after - small.objects_after) / (wave.shape.sessions - small.shape.sessions)


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--turn-s", type=float, default=4.0, help="seconds of a turn")
    parser.add_argument("--large", type=int, default=500_000)
    options = parser.parse_args()
    shape = Shape(options.sessions - options.sessions % N, turn_s=options.turn_s, think_s=options.turn_s / 2)

    _, measured = measure(WAYS * options.pairs, shape)
    pairs = list(zip(measured[::2], measured[1::2], strict=True))
    for pair in pairs:
        print([describe(wave) for wave in pair], flush=True)

    def compared(what: Callable[[Wave, Wave], float], digits: int = 3) -> float:
        return round(statistics.median(what(*pair) for pair in pairs), digits)

    def both(what: Callable[[Wave], float], digits: int = 2) -> list[float]:
        return [round(statistics.median(what(pair[at]) for pair in pairs), digits) for at in (0, 1)]

    rate = shape.sessions / (shape.turn_s + shape.think_s / 2)
    found: dict[str, Any] = {
        "sessions": shape.sessions,
        "loop_ms_per_call": both(lambda wave: wave.loop_s / len(wave.calls) * 1e3),
        "loop_http_over_in_process": compared(lambda a, b: b.loop_s / a.loop_s, 2),
        "calls_per_s": round(rate, 1),
        "gateway_loop_share": compared(lambda a, b: rate * (b.loop_s - a.loop_s) / len(b.calls)),
        "process_ms_per_call": both(lambda wave: wave.process_s / len(wave.calls) * 1e3),
    }
    for name, q in (("p50", 0.5), ("p99", 0.99)):
        found[f"added_ms_{name}"] = compared(lambda a, b, q=q: 1e3 * (quantile(b, q) - quantile(a, q)), 1)
        found[f"call_{name}_ratio"] = compared(lambda a, b, q=q: quantile(b, q) / quantile(a, q))
    fast = replace(shape, turn_s=0.5, think_s=0.5)
    kept = [(small[way], wave) for way in WAYS for small, (wave,) in [measure([way], fast)]]
    found["kb_per_session"] = [round((w.bytes_open - w.bytes_before) / fast.sessions / 1e3) for _, w in kept]
    found["kb_left_per_session"] = [round((w.bytes_after - w.bytes_before) / fast.sessions / 1e3) for _, w in kept]
    found["objects_left_per_session"] = [round(objects_left(*each), 2) for each in kept]
    large = Shape(sessions=N, chars=options.large // 5, turn_s=0.1, think_s=0.1)
    found["large_loop_ms_per_call"] = [round(w.loop_s / len(w.calls) * 1e3, 1) for w in measure(WAYS, large)[1]]
    print(json.dumps(found))


def quantile(wave: Wave, q: float) -> float:
    """Return a quantile of the seconds of a wave's calls."""
    return float(np.quantile(wave.calls, q))


def describe(wave: Wave) -> str:
    """Return a line about a wave."""
    loop = wave.loop_s / len(wave.calls) * 1e3
    quantiles = [round(quantile(wave, q), 3) for q in (0.5, 0.99)]
    return f"{wave.way}: {wave.seconds:.1f} s, loop {loop:.2f} ms a call, seconds of a call {quantiles}"


if __name__ == "__main__":
    main()
