"""A worker whose agents take turns with a tool, by how many rollouts it has in the making.

In virtual time its engine is ``kv_engine``'s, which has places, a KV cache and prefill; else it is a real one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from async_rl.config.loading import validate
from async_rl.config.schema import RunConfig
from async_rl.queue.records import Ticket
from async_rl.rollout.actor import RolloutReplica
from async_rl.rollout.outcome import Context
from async_rl.rollout.policy import Policy
from async_rl.types import Group, Prompt
from tests.support.kv_engine import KvEngine, Speed, of_others
from tests.support.scripted_engine import Layout, Script
from tests.support.scripted_replica import Digits, push

N, TURNS = 8, 8
UNBOUNDED = ("one", "unbounded")  # without a look at the KV cache
ROWS = (("roomy", "one"), ("roomy", "two"), ("tight", "unbounded"), ("tight", "two"), ("tight", "forks"))
WARM_UP = 0.5  # of the time: the rollouts that begin first do so all at once


@dataclass(frozen=True)
class Shape:
    """How large an agent's rollouts are, in tokens, and the engine that plays them."""

    places: int
    prompt: int
    turn: int
    limited: bool
    """Whether a turn has to be ended by its limit; the scripted engine ends it by itself."""
    answer: int
    """What the tool answers."""
    room: int
    """For a rollout behind its prompt, more than it needs."""
    tokens: Callable[[np.random.Generator, int], list[int]]
    """Returns so many tokens that are not the policy's."""

    @property
    def context(self) -> int:
        """Tokens of a rollout at its end."""
        return self.prompt + TURNS * self.turn + (TURNS - 1) * self.answer

    def cache(self, name: str) -> int:
        """Return the tokens of the KV cache: for all rollouts of the second limit, or for one of each place and a
        quarter more."""
        return {"roomy": 4 * self.places * self.context, "tight": self.places * self.context * 5 // 4}[name]


def _any_letters(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(2, 128, count).tolist()


VIRTUAL = Shape(places=16, prompt=4096, turn=128, limited=False, answer=1024, room=24_576, tokens=of_others)
REAL = Shape(places=8, prompt=256, turn=24, limited=True, answer=64, room=768, tokens=_any_letters)


@dataclass(frozen=True)
class Times:
    """Seconds, of virtual time or of this machine's."""

    seconds: float = 480.0
    """That are measured, a warm-up included."""
    tool_s: float = 8.0
    """Mean of a tool."""
    sync_s: float = 0.0
    """Between two weight syncs; 0 for none."""


@dataclass
class Scene:
    """What agents look up, and leave behind."""

    shape: Shape = VIRTUAL
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
        reply = await policy.complete(history, max_tokens=SCENE.shape.turn if SCENE.shape.limited else None)
        if turn == TURNS - 1:
            break
        await asyncio.sleep(rng.lognormal(np.log(SCENE.tool_s) - 0.125, 0.5) if SCENE.tool_s else 0.0)
        said = [*history, *reply.token_ids.tolist()]
        if SCENE.forks and turn % 2:
            said, before = before, said  # what was said behind the turn before is taken back
        else:
            before = said
        history = [*said, *SCENE.shape.tokens(rng, SCENE.shape.answer)]
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
        tokens = SCENE.shape.tokens(np.random.default_rng(self.issued), SCENE.shape.prompt)
        prompt = Prompt(f"0-{self.issued}", self.issued, "", np.array(tokens, dtype=np.int32))
        return Ticket(f"{prompt.prompt_id}.0", prompt, 0)

    async def put(self, group: Group) -> None:
        """Take a finished group."""


async def virtual(settings: str, cache: str, times: Times) -> dict[str, float]:
    """Run a worker around the scripted engine for some time and return what it did after the warm-up."""
    config = _config(VIRTUAL, settings, {"model": {"path": "model"}})
    script = Script(layout=Layout(None, frozenset({0}), 10_000), tokens_per_turn=16, turn_s=0.32)
    speed = Speed(VIRTUAL.places, VIRTUAL.cache(cache), VIRTUAL.turn, prefill_tokens_per_s=10_000.0)
    engine = KvEngine(config, script, speed)

    def place_seconds() -> float:
        engine._count_places(0)
        return engine.place_seconds

    return await _measured(config, engine, VIRTUAL, settings, times, place_seconds)


@contextlib.asynccontextmanager
async def real_engine(folder: Path, cache: str) -> AsyncIterator[Any]:
    """A vLLM engine on this machine's cores, with a tiny model that never stops by itself."""
    from tests.support.engine_checkpoint import engine_config, make_checkpoint, running

    model = make_checkpoint(folder / "model", eos=None)
    # Two heads of 32 in each of four layers, keys and values in float32.
    nbytes = REAL.cache(cache) * 4 * 2 * 2 * 32 * 4
    blocks = {"engine_args": {"block_size": 32}}  # the smallest on a CPU, whose default of 128 is more than a turn
    arguments = {"kv_cache_bytes": nbytes, "max_num_seqs": REAL.places, "max_response_tokens": REAL.room, **blocks}
    async with running(engine_config(model, runs=folder, **arguments)) as engine:
        yield engine


async def real(engine: Any, settings: str, times: Times) -> dict[str, float]:
    """Run a worker around a real engine for some time and return what it did after the warm-up."""
    base = engine._config.model_dump(mode="json", exclude_unset=True)
    config = _config(REAL, settings, base)
    busy = 0.0

    async def count() -> None:
        nonlocal busy
        loop = asyncio.get_running_loop()
        before = loop.time()
        while True:
            await asyncio.sleep(0.02)
            now = loop.time()
            busy += min(len(engine._calls), REAL.places) * (now - before)
            before = now

    counting = asyncio.create_task(count())
    try:
        return await _measured(config, engine, REAL, settings, times, lambda: busy)
    finally:
        counting.cancel()


def _config(shape: Shape, settings: str, base: dict[str, Any]) -> RunConfig:
    rollout = {
        **base.get("rollout", {}),
        "n": N,
        "max_num_seqs": shape.places,
        "max_response_tokens": shape.room,
        **({"max_trajectories": shape.places} if settings == "one" else {}),
        **({"max_kv_use": None} if settings in UNBOUNDED else {}),
        "agent": {"function": f"{__name__}:agent"},
    }
    return validate({"data": {"train": "train.jsonl"}, **base, "rollout": rollout})


async def _measured(
    config: RunConfig, engine: Any, shape: Shape, settings: str, times: Times, place_seconds: Callable[[], float]
) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    SCENE.shape, SCENE.tool_s, SCENE.forks, SCENE.took = shape, times.tool_s, settings == "forks", []
    digits = Digits()
    digits.encode = None  # type: ignore[attr-defined]  # no agent here sends text
    replica = RolloutReplica(config, 0, Prompts(), engine, digits, digits)  # type: ignore[arg-type]
    ends = loop.time() + times.seconds
    working = asyncio.create_task(replica.run())
    making = replica._worker.making
    assert making is not None
    open_seconds, last, start = 0.0, loop.time(), ends - (1 - WARM_UP) * times.seconds
    synced, begun = loop.time(), None
    while loop.time() < ends and not working.done():
        await asyncio.sleep(0.25)
        if begun is None and loop.time() >= start:
            begun = (loop.time(), place_seconds(), dict(replica._worker.calls.context_tokens), len(SCENE.took))
        elif begun is not None:
            open_seconds += making.open * (loop.time() - last)
        last = loop.time()
        if times.sync_s and loop.time() - synced >= times.sync_s:
            synced = loop.time()
            await push(replica, engine)
    if working.done():
        working.result()
    assert begun is not None
    seconds, busy = loop.time() - begun[0], place_seconds() - begun[1]
    tokens = {how: count - begun[2].get(how, 0) for how, count in replica._worker.calls.context_tokens.items()}
    computed = tokens["new"] + tokens["lost"] + tokens["weight_sync"]
    took = SCENE.took[begun[3] :]
    await replica._worker.close()
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    return {
        "rollouts_per_s": round(len(took) / seconds, 2),
        "idle": round(1 - busy / seconds / shape.places, 3),
        "again": round(tokens["lost"] / computed, 3),
        "again_sync": round(tokens["weight_sync"] / computed, 3),
        "cached": round(tokens["cached"] / (computed + tokens["cached"]), 3),
        "open": round(open_seconds / seconds, 1),
        "oldest_p99_s": round(float(np.quantile(took, 0.99)), 1),
    }
