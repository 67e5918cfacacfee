"""A worker whose agents ask over HTTP, around a scripted engine, with the template and tokens of ``agent_sessions``."""

import asyncio

import numpy as np
import psutil

from async_rl.config.loading import validate
from async_rl.rollout.actor import RolloutReplica
from tests.support.agent_sessions import END, ROLES, WORDS
from tests.support.gateway_parts import Letters
from tests.support.scripted_engine import Layout, Script, ScriptedEngine
from tests.support.scripted_replica import ROUTING, Digits, push, scripted

ROLLOUT = {"n": 2, "max_num_seqs": 4, "max_response_tokens": 200}
TURN = 6  # tokens, the stop token included


class Turns(ScriptedEngine):
    """Says words that are numbered by their place, and ends each turn after TURN tokens."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sent = []

    async def generate(self, request_id, token_ids, *rest):
        self.sent.append((request_id.rpartition("/")[0], token_ids.tolist()))
        return await super().generate(request_id, token_ids, *rest)

    def last_position(self, trajectory_id, response):
        asked = [at for at, token in enumerate(response.tolist()) if token == ROLES["assistant"]]
        return (asked[-1] + 1 if asked else 0) + TURN - 1

    def _tokens(self, done, count, *, stopped):
        said = np.arange(WORDS + 1 + done, WORDS + 1 + done + count, dtype=np.int32)
        if stopped:
            said[-1] = END
        return said


def engine(fault=None, kind=Turns):
    made = scripted(kind=kind, max_response_tokens=ROLLOUT["max_response_tokens"])
    script = Script(
        logprob=lambda version: -0.5 - version, layout=Layout(ROUTING, frozenset({END}), 10_000), fault=fault
    )
    return kind(made._config, script=script)


def served(subject, queue, mode="resume", n=2, rollout=None, partial_rollout=None, **agent):
    """Return a replica around the engine ``subject``; ``rollout``, ``partial_rollout`` and ``agent`` are settings."""
    tree = {
        "model": {"path": "model"},
        "data": {"train": "train.jsonl"},
        "rollout": {**ROLLOUT, "n": n, "agent": agent, **(rollout or {})},
        "async_training": {"partial_rollout": {"mode": mode, **(partial_rollout or {})}},
    }
    return RolloutReplica(validate(tree), 0, queue, subject, Letters(), Digits())


async def run_with_pushes(subject, made, every):
    """Run a worker; push whenever that many more tokens are sampled, or never for None."""
    run = asyncio.create_task(made.run())
    pushes, goal = 0, subject.sampled + (every or 0)
    async with asyncio.timeout(60):
        while not run.done():
            if every is not None and subject.sampled >= goal:
                await push(made, subject)
                pushes, goal = pushes + 1, subject.sampled + every
            await asyncio.sleep(0)
    await run
    await made.shutdown()
    return pushes


def of(folder):
    """The processes with that folder among their arguments."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if str(folder) in (process.info["cmdline"] or ()) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)
