"""Rollouts with environments, played by a policy that says what a test has written."""

import contextlib
import json
import sys
from pathlib import Path

import msgpack
import numpy as np

from async_rl.config.loading import validate
from async_rl.errors import RequestRefused
from async_rl.rollout.environments.play import Environments
from async_rl.rollout.gate import Gate
from async_rl.rollout.policy import Reply
from async_rl.types import Prompt

MODULE = "tests.support.user_environments"


def call(name, arguments="{}", call_id="c1"):
    """Return a message of the policy that calls a tool."""
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return calls({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})


def calls(*made):
    return {"role": "assistant", "content": "", "tool_calls": list(made)}


def summed(played):
    """Return the reward of a rollout, with what else it came with where that is anything."""
    own = played.reward if isinstance(played.reward, dict) else {"reward": played.reward}
    return own | dict(played.metrics)


class Says:
    """A policy that says each of these in turn, and then "." without end; ``most`` turns have room."""

    def __init__(self, *said, most=None, cut=False):
        self.said, self.most, self.cut, self.asked, self.tools, self.raw = list(said), most, cut, [], None, []

    def _reply(self):
        if self.most is not None and len(self.asked) + len(self.raw) > self.most:
            raise RequestRefused("context_length_exceeded", "there is no room")
        message = self.said.pop(0) if self.said else "."
        message = message if isinstance(message, dict) else {"role": "assistant", "content": message}
        return Reply(
            message, message["content"], np.zeros(1, np.int32), "length" if self.cut else "stop", self._replies()
        )

    def _replies(self):
        return len(self.asked) + len(self.raw) - 1

    cut_off = False

    def restart(self):
        """Forget what it was asked."""
        self.asked, self.raw = [], []

    async def chat(self, messages, tools=None):
        self.asked.append([dict(message) for message in messages])
        self.tools = tools
        return self._reply()

    async def complete(self, token_ids):
        self.raw.append(token_ids.tolist())
        return self._reply()

    async def extend(self, text):
        self.raw.append(text)
        return self._reply()

    @property
    def heard(self):
        """What it heard since its first turn, by role."""
        return [(m["role"], m["content"]) for m in self.asked[-1][len(self.asked[0]) :] if m["role"] != "assistant"]


def bare_python(folder, monkeypatch):
    """Return an interpreter for environments that has the standard library and msgpack alone."""
    (folder / "lib").mkdir()
    (folder / "lib" / "msgpack").symlink_to(Path(msgpack.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", str(folder / "lib"))
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    path.chmod(0o755)
    return str(path)


def prompt(fields=None, row=1, name="0-1"):
    return Prompt(name, row, "abc", np.array([5, 6, 7], np.int32), fields or {})


@contextlib.asynccontextmanager
async def environments(name, gate=None, **settings):
    """Yield the environments of a class of ``user_environments``; nothing is left of them afterwards."""
    agent = {"environment": name if ":" in name else f"{MODULE}:{name}", **settings}
    config = validate({"model": {"path": "m"}, "data": {"train": "t.jsonl"}, "rollout": {"agent": agent}})
    subject = Environments(config)
    subject.clock = gate or Gate()
    try:
        yield subject
    finally:
        await subject.close()
        assert subject.open == 0


async def play(subject, policy, fields=None, name="0-1", **more):
    return await subject.play(prompt(fields, name=name), policy, f"{name}.0/0", 7, subject.clock, **more)
