"""A thousand agents at one time through a real worker, in process or over HTTP, on an engine that takes no computing.

``waves`` runs in the worker's process; those who ask over HTTP are in one of their own, ``python -m
tests.support.gateway_load``, so that what they compute is not the worker's.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import structlog

from async_rl.config.loading import validate
from async_rl.queue.records import Ticket
from async_rl.rollout.actor import RolloutReplica
from async_rl.types import Prompt
from tests.support.scripted_engine import Layout, Script, ScriptedEngine
from tests.support.scripted_replica import Digits

Way = Literal["in_process", "http"]

N = 8  # rollouts of a group
_WORDS = "The train leaves at nine and arrives before noon, if the bridge is open. "


@dataclass(frozen=True)
class Shape:
    """What each agent does: ``turns`` that extend a history, then one behind the first with another message."""

    sessions: int = 1000
    turns: int = 4
    chars: int = 500
    """Letters of each message of the agent; a token is a letter."""
    words: int = 100
    """Tokens of each turn of the policy."""
    turn_s: float = 4.0
    """Seconds that the engine takes for a turn."""
    think_s: float = 2.0
    """The most seconds between two turns; drawn evenly."""

    @property
    def calls(self) -> int:
        return self.turns + 1


@dataclass
class Wave:
    """What one wave of agents cost."""

    way: Way
    shape: Shape
    calls: list[float] = field(default_factory=list)
    """Seconds of each call, as its agent saw it."""
    seconds: float = 0.0
    loop_s: float = 0.0
    """Seconds of the processor that the worker's event loop took."""
    process_s: float = 0.0
    """The same of the worker's process, with its threads."""
    bytes_before: int = 0
    bytes_open: int = 0
    """Resident bytes of the worker when every agent has had its turns and none has ended."""
    bytes_after: int = 0
    """The same when all agents have ended, while the worker serves on."""
    objects_after: int = 0
    """Python's objects in the worker then."""


Ask = Callable[[list[dict[str, Any]]], Awaitable[dict[str, Any]]]


async def converse(ask: Ask, seed: int, shape: Shape) -> list[float]:
    """Make the turns of one agent. Returns the seconds of each."""
    draw, seconds = random.Random(seed), []

    def message() -> dict[str, Any]:
        text = f"{draw.random()} " + _WORDS * (shape.chars // len(_WORDS) + 1)
        return {"role": "user", "content": text[: shape.chars]}

    async def said(history: list[dict[str, Any]]) -> dict[str, Any]:
        await asyncio.sleep(draw.uniform(0, shape.think_s))
        began = time.perf_counter()
        answer = await ask(history)
        seconds.append(time.perf_counter() - began)
        return answer

    history = [message()]
    for _ in range(shape.turns):
        history += [await said(history), message()]
    await said([*history[:2], message()])
    return seconds


class Load:
    """The wave that is under way, as its agents know it."""

    def __init__(self, wave: Wave, shape: Shape, client: Client | None) -> None:
        self.wave, self.shape, self.client = wave, shape, client
        self.through = 0
        self.all_through, self.may_end = asyncio.Event(), asyncio.Event()

    async def agent(self, policy: Any, context: Any) -> None:
        if self.client is None:

            async def ask(history: list[dict[str, Any]]) -> dict[str, Any]:
                return dict((await policy.chat(history)).message)

            self.wave.calls += await converse(ask, context.seed, self.shape)
        else:
            self.wave.calls += await self.client.ask(policy.base_url, context.seed)
        self.through += 1
        if self.through == self.shape.sessions:
            self.all_through.set()
        await self.may_end.wait()


load: Load | None = None


async def agent(prompt: Any, policy: Any, context: Any) -> float:
    """Do as the wave says that is under way."""
    assert load is not None
    await load.agent(policy, context)
    return 1.0


class TurnEngine(ScriptedEngine):
    """Says ``words`` letters in each turn, after which the template's own follow, which begin with ``marker``."""

    words, marker, header = 0, 0, 0

    def last_position(self, trajectory_id: str, response: Any) -> int:
        begins = np.flatnonzero(response == self.marker)
        return (int(begins[-1]) + self.header if len(begins) else 0) + self.words - 1


class Tickets:
    """A queue with a number of groups, which forgets what is put."""

    def __init__(self, groups: int) -> None:
        self.left = groups

    async def take(self, worker: str, limit: int) -> list[Ticket]:
        tickets = []
        while self.left and len(tickets) < limit:
            self.left -= 1
            prompt = Prompt(f"0-{self.left}", self.left + 1, "a", np.array([5, 6, 7], np.int32))
            tickets.append(Ticket(f"{prompt.prompt_id}.0", prompt, 0))
        return tickets

    async def put(self, group: Any) -> None: ...


class Client:
    """The process of those who ask over HTTP."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[list[float]]] = {}

    async def ask(self, base_url: str, seed: int) -> list[float]:
        """Have one agent make its turns; returns the seconds of each."""
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([number, base_url, seed]).encode() + b"\n")
        return list(await answer)

    async def read(self) -> None:
        """Hand out the answers."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            number, seconds = json.loads(line)
            self._answers.pop(number).set_result(seconds)


@contextlib.asynccontextmanager
async def client(shape: Shape) -> AsyncIterator[Client]:
    """Start the clients' process, and end it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __name__, json.dumps(asdict(shape))),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    made = Client(process)
    reading = asyncio.create_task(made.read())
    try:
        yield made
    finally:
        process.kill()
        await process.wait()
        reading.cancel()


def make_model(folder: Path) -> Any:
    """Write what a worker reads of a chat model; returns its tokenizer."""
    from tests.support.chat_families import FAMILIES, tokenizer

    made = tokenizer(FAMILIES["chatml"])
    made.save_pretrained(folder)
    end = made.convert_tokens_to_ids("<|im_end|>")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "eos_token_id": end}))
    return made


def replica(folder: Path, tokenizer: Any, shape: Shape, queue: Any) -> RolloutReplica:
    """A real worker around a scripted engine, without routed experts, with the template and tokenizer of ``folder``."""
    config = validate(
        {
            "model": {"path": str(folder)},
            "data": {"train": "train.jsonl", "max_prompt_tokens": shape.chars + 100},
            "rollout": {
                "n": N,
                "max_num_seqs": shape.sessions,
                "max_response_tokens": shape.calls * (shape.chars + shape.words + 100),
                "agent": {"function": f"{__name__}:agent"},
            },
        }
    )
    stop, marker, *letters = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>", *"abcdefgh"])

    class Engine(TurnEngine):
        words, header = shape.words, len(tokenizer.encode("<|im_start|>assistant\n"))

        def _tokens(self, done: int, count: int, *, stopped: bool) -> Any:
            said = np.resize(np.array(letters, np.int32), count)
            if stopped:
                said[-1] = stop
            return said

    Engine.marker = marker
    script = Script(
        tokens_per_turn=shape.words, turn_s=shape.turn_s, layout=Layout(None, frozenset({stop}), len(tokenizer))
    )
    return RolloutReplica(config, 0, queue, Engine(config, script=script), tokenizer, Digits())


async def run_wave(way: Way, shape: Shape, folder: Path, tokenizer: Any) -> Wave:
    """Run ``shape.sessions`` agents at one time to their ends."""
    global load
    process = psutil.Process()
    async with client(shape) if way == "http" else contextlib.nullcontext() as asking:
        gc.collect()
        wave = Wave(way, shape, bytes_before=process.memory_info().rss)
        load = Load(wave, shape, asking)
        made = replica(folder, tokenizer, shape, Tickets(shape.sessions // N))
        began, loop_s, process_s = time.perf_counter(), time.thread_time(), time.process_time()
        running = asyncio.create_task(made.run())
        through = asyncio.create_task(load.all_through.wait())
        await asyncio.wait({running, through}, return_when=asyncio.FIRST_COMPLETED)
        wave.seconds = time.perf_counter() - began
        wave.loop_s, wave.process_s = time.thread_time() - loop_s, time.process_time() - process_s
        gc.collect()
        wave.bytes_open = process.memory_info().rss
        load.may_end.set()
        through.cancel()
        await running
    asking = load = running = through = None
    await asyncio.sleep(0.2)  # until the worker has noticed that the clients' connections are closed
    gc.collect()
    wave.bytes_after, wave.objects_after = process.memory_info().rss, len(gc.get_objects())
    await made.shutdown()
    return wave


def waves(plan: Sequence[tuple[Way, Shape]], folder: Path) -> list[Wave]:
    """Run waves of agents, one after the other."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    tokenizer = make_model(folder)

    async def run() -> list[Wave]:
        return [await run_wave(way, shape, folder, tokenizer) for way, shape in plan]

    return asyncio.run(run())


async def serve_agents(shape: Shape) -> None:
    """Make the turns of each agent that standard input names, and write the seconds of each to standard output."""
    import aiohttp

    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    limits = {"connector": aiohttp.TCPConnector(limit=0), "timeout": aiohttp.ClientTimeout(None)}
    async with aiohttp.ClientSession(**limits) as session, asyncio.TaskGroup() as agents:

        async def one(number: int, base_url: str, seed: int) -> None:
            async def ask(history: list[dict[str, Any]]) -> dict[str, Any]:
                async with session.post(f"{base_url}/chat/completions", json={"messages": history}) as answer:
                    answer.raise_for_status()
                    return dict((await answer.json())["choices"][0]["message"])

            sys.stdout.write(json.dumps([number, await converse(ask, seed, shape)]) + "\n")
            sys.stdout.flush()

        async for line in reader:
            agents.create_task(one(*json.loads(line)))


if __name__ == "__main__":
    asyncio.run(serve_agents(Shape(**json.loads(sys.argv[1]))))
