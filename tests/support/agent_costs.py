"""A worker whose agents take turns with a tool, in virtual time, by how many rollouts it has in the making.

Its engine is ``kv_engine``'s: it has places, a KV cache and prefill.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from async_rl.config.loading import validate
from async_rl.queue.records import Ticket
from async_rl.rollout.actor import RolloutReplica
from async_rl.rollout.outcome import Context
from async_rl.rollout.policy import Policy
from async_rl.types import Group, Prompt
from tests.support.kv_engine import KvEngine, Speed, of_others
from tests.support.scripted_engine import Layout, Script
from tests.support.scripted_replica import Digits, push
from tests.support.virtual_time import VirtualLoop

PLACES, N, TURNS, PROMPT, TURN, ANSWER = 16, 8, 8, 4096, 128, 1024
CONTEXT = PROMPT + TURNS * TURN + (TURNS - 1) * ANSWER
SETTINGS: dict[str, dict[str, Any]] = {
    "one": {"max_trajectories": PLACES, "max_kv_use": None},
    "unbounded": {"max_kv_use": None},
    "two": {},
    "forks": {},
}
CACHES = {"roomy": 4 * PLACES * CONTEXT, "tight": PLACES * CONTEXT * 5 // 4}
ROWS = (("roomy", "one"), ("roomy", "two"), ("tight", "unbounded"), ("tight", "two"), ("tight", "forks"))
WARM_UP = 0.5  # of the time: the rollouts that begin first do so all at once


@dataclass(frozen=True)
class Times:
    """Seconds of virtual time."""

    seconds: float = 480.0
    """That are measured, a warm-up included."""
    tool_s: float = 8.0
    """Mean of a tool."""
    sync_s: float = 0.0
    """Between two weight syncs; 0 for none."""


@dataclass
class Scene:
    """What agents look up, and leave behind."""

    tool_s: float = 0.0
    forks: bool = False
    took: list[float] = field(default_factory=list)


SCENE = Scene()


async def agent(prompt: Prompt, policy: Policy, context: Context) -> float:
    """Take turns with a tool; where the scene has forks, every second answer takes the place of the one before it."""
    rng, loop = np.random.default_rng(context.seed), asyncio.get_running_loop()
    history: list[int] = prompt.token_ids.tolist()
    began = loop.time()
    before = history
    for turn in range(TURNS):
        reply = await policy.complete(history)
        if turn == TURNS - 1:
            break
        await asyncio.sleep(rng.lognormal(np.log(SCENE.tool_s) - 0.125, 0.5) if SCENE.tool_s else 0.0)
        said = [*history, *reply.token_ids.tolist()]
        if SCENE.forks and turn % 2:
            said, before = before, said  # what was said behind the turn before is taken back
        else:
            before = said
        history = [*said, *of_others(rng, ANSWER)]
    SCENE.took.append(loop.time() - began)
    return 1.0


class Prompts:
    """A queue that has a prompt whenever one is wanted, and counts the rollouts of finished groups."""

    def __init__(self) -> None:
        self.issued = 0

    async def take(self, worker: str, limit: int) -> list[Ticket]:
        """Return as many tickets as are wanted."""
        del worker
        return [self._ticket() for _ in range(limit)]

    def _ticket(self) -> Ticket:
        self.issued += 1
        tokens = of_others(np.random.default_rng(self.issued), PROMPT)
        prompt = Prompt(f"0-{self.issued}", self.issued, "", np.array(tokens, dtype=np.int32))
        return Ticket(f"{prompt.prompt_id}.0", prompt, 0)

    async def put(self, group: Group) -> None:
        """Take a finished group."""


async def measure(loop: VirtualLoop, settings: str, cache: str, times: Times) -> dict[str, float]:
    """Run a worker for some time and return what it did after the warm-up."""
    SCENE.tool_s, SCENE.forks, SCENE.took = times.tool_s, settings == "forks", []
    tree = SETTINGS[settings]
    named = {"function": f"{__name__}:agent"} | tree.get("agent", {})
    rollout = {"n": N, "max_num_seqs": PLACES, "max_response_tokens": 2 * CONTEXT} | tree | {"agent": named}
    config = validate({"model": {"path": "model"}, "data": {"train": "train.jsonl"}, "rollout": rollout})
    layout = Layout(None, frozenset({0}), 10_000)
    script = Script(layout=layout, tokens_per_turn=16, turn_s=0.32)
    engine = KvEngine(config, script, Speed(PLACES, CACHES[cache], TURN, prefill_tokens_per_s=10_000.0))
    digits = Digits()
    digits.encode = None  # type: ignore[attr-defined]  # no agent here sends text
    replica = RolloutReplica(config, 0, Prompts(), engine, digits, digits)  # type: ignore[arg-type]
    working = asyncio.create_task(replica.run())
    ends = loop.time() + times.seconds
    making = replica._worker.making
    assert making is not None
    open_seconds, last, start = 0.0, loop.time(), ends - (1 - WARM_UP) * times.seconds
    synced, begun = loop.time(), None
    while loop.time() < ends and not working.done():
        await asyncio.sleep(0.25)
        if begun is None and loop.time() >= start:
            engine._count_places(0)
            begun = (loop.time(), engine.place_seconds, dict(replica._worker.calls.context_tokens), len(SCENE.took))
        elif begun is not None:
            open_seconds += making.open * (loop.time() - last)
        last = loop.time()
        if times.sync_s and loop.time() - synced >= times.sync_s:
            synced = loop.time()
            await push(replica, engine)
    if working.done():
        working.result()
    engine._count_places(0)
    assert begun is not None
    seconds = loop.time() - begun[0]
    tokens = {how: count - begun[2].get(how, 0) for how, count in replica._worker.calls.context_tokens.items()}
    computed = tokens["new"] + tokens["lost"] + tokens["weight_sync"]
    took = SCENE.took[begun[3] :]
    await replica.shutdown()
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    return {
        "rollouts_per_s": round(len(took) / seconds, 2),
        "idle": round(1 - (engine.place_seconds - begun[1]) / seconds / PLACES, 3),
        "again": round(tokens["lost"] / computed, 3),
        "again_sync": round(tokens["weight_sync"] / computed, 3),
        "cached": round(tokens["cached"] / (computed + tokens["cached"]), 3),
        "open": round(open_seconds / seconds, 1),
        "oldest_p99_s": round(float(np.quantile(took, 0.99)), 1),
    }
