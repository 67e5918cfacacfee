"""A replica around a scripted engine, with a queue and a reward that a test can look into."""

import asyncio

import numpy as np

from async_rl.config.loading import validate
from async_rl.queue.records import Ticket
from async_rl.rollout.actor import RolloutReplica
from async_rl.rollout.rewards.score import Score
from async_rl.types import Prompt, RoutingSpec
from tests.support.scripted_engine import Layout, Script, ScriptedEngine

EOS = 0
ROUTING = RoutingSpec(num_moe_layers=2, top_k=2, num_experts=4)
LAYOUT = Layout(ROUTING, frozenset({EOS}), vocab_size=10_000)


def scripted(
    length: int = 12, kind: type[ScriptedEngine] = ScriptedEngine, max_response_tokens: int = 40, sources=None
):
    """An engine that samples one token per turn of the event loop: 1, 2, 3, ... and EOS as the last of ``length``.

    The log-prob of a token names the version that sampled it, as the routing does.
    """
    config = validate(
        {
            "model": {"path": "model"},
            "data": {"sources": sources} if sources else {"train": "train.jsonl"},
            "rollout": {"max_response_tokens": max_response_tokens},
        }
    )
    return kind(config, script=Script(length=length, logprob=lambda version: -0.5 - version, layout=LAYOUT))


class ListQueue:
    """Hands out ``count`` tickets, of rows with ``fields``, and keeps what is put."""

    def __init__(self, count: int, fields=None) -> None:
        self.left, self.fields = count, fields or {}
        self.groups = []
        self.failed = []
        self.filtered, self.rests = [], []
        self.returned = []

    async def take(self, worker, limit):
        tickets = []
        while self.left and len(tickets) < limit:
            self.left -= 1
            prompt = Prompt(f"0-{self.left}", self.left + 1, "abc", np.array([5, 6, 7], dtype=np.int32), self.fields)
            tickets.append(Ticket(f"{prompt.prompt_id}.0", prompt, 0))
        return tickets

    async def put(self, group) -> None:
        self.groups.append(group)

    async def fail(self, group_id, reason) -> None:
        self.failed.append((group_id, reason))

    async def filter_group(self, group_id, reason, rest_epochs) -> None:
        self.filtered.append((group_id, reason))
        self.rests.append(rest_epochs)

    async def return_group(self, group_id, reason) -> None:
        self.returned.append((group_id, reason))


class Digits:
    """A tokenizer and a reward in one: text is the token ids, the reward their count."""

    error: Exception | None = None

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))

    needs = frozenset()
    whole_groups = False

    async def score(self, prompt, response, source="train"):
        if self.error is not None:
            raise self.error
        return Score(float(len(response.text.split())))

    def close(self) -> None:
        """Nothing to close."""


def worker(engine, queue, mode="resume", environment=None, digits=None, **settings):
    tree = {
        "model": {"path": "model"},
        "data": {"train": "train.jsonl"},
        "rollout": {"n": 2, "max_num_seqs": 4, "max_response_tokens": 40},
        "async_training": {"partial_rollout": {"mode": mode}},
        **settings,
    }
    environments = {}
    if environment is not None:
        environments["tests:environment"] = environment
        named = {**tree["rollout"].get("environment", {}), "function": "tests:environment"}
        tree["rollout"] = {**tree["rollout"], "environment": named}
    digits = digits or Digits()
    return RolloutReplica(validate(tree), 0, queue, engine, digits, digits, environments), digits


async def snapshot(replica):
    """The messages of all groups in flight, by id."""
    return {group_id: message async for group_id, message in replica._worker.moment().messages()}


async def push(worker, engine) -> None:
    """What a sync does to a worker and its engine."""
    await worker.pause()
    engine.version += 1
    await worker.wake()
    await worker.resume()


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def sampled(engine, more: int) -> None:
    """Until the engine has sampled that many more tokens."""
    goal = engine.sampled + more
    while engine.sampled < goal:
        await asyncio.sleep(0)
