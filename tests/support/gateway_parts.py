"""A policy behind a gateway, without a worker: the template and the tokens are those of ``agent_sessions``."""

import asyncio
import contextlib

import numpy as np
from openai import AsyncOpenAI

from async_rl.rollout.engine.interface import EngineOutput
from async_rl.rollout.gateway.server import Gateway
from async_rl.rollout.policy import Policy
from tests.support.agent_sessions import CHAT, END, LETTERS, STOPS, WORDS, ids, session

CONTEXT = 1_000


class Letters:
    """A tokenizer of the template's characters, and of words that the policy says."""

    def __len__(self):
        return 2 * WORDS

    def encode(self, text, add_special_tokens=True):
        return [LETTERS + ord(c) for c in text]

    def convert_ids_to_tokens(self, token):
        return self.one(token, skip=False)

    def decode(self, token_ids, skip_special_tokens=False):
        return "".join(self.one(token, skip_special_tokens) for token in np.asarray(token_ids).tolist())

    def one(self, token, skip):
        if token > WORDS:
            return f" {token - WORDS}"
        return chr(token - LETTERS) if token >= LETTERS else "" if skip else f"<{token}>"


class Answers:
    """Answers each turn with "1 2 3 ..." and a stop token in two calls, as if a push had come between them."""

    def __init__(self, words=2):
        self.words, self.calls, self.version, self.hold, self.error, self.stops = words, [], 0, None, None, []

    async def __call__(self, partial, request_id, stop=()):
        self.calls.append(request_id)
        self.stops.append(tuple(stop))
        if self.hold is not None:
            await self.hold.wait()
        if self.error is not None:
            raise self.error
        await asyncio.sleep(0)
        request = partial.next_request()
        whole = [*range(WORDS + 1, WORDS + 1 + self.words), END][: request.max_tokens + 1]
        done = 1 if partial.interrupted else 0
        tokens = whole[done:] if done else whole[:1]
        tokens = tokens[: request.max_tokens]
        ended = tokens[-1] in STOPS
        rows = len(request.token_ids) + len(tokens) - 1 - request.first_row
        self.version += 1
        full = len(tokens) == request.max_tokens
        return partial.absorb(
            EngineOutput(
                ids(*tokens),
                np.full(len(tokens), -0.5 * self.version, np.float32),
                np.full(len(tokens), self.version, np.int32),
                np.full((rows, 1, 1), 7, np.uint16),
                "stop" if ended else "length" if full else "abort",
            )
        )


class Served:
    """A gateway with one rollout."""

    def __init__(self, call, **limits):
        self.call = call
        self.session = session(**({"context_tokens": CONTEXT} | limits))
        self.gateway = Gateway("127.0.0.1", None, "tiny", CONTEXT, Letters())
        self.failed = asyncio.get_running_loop().create_future()
        letters = Letters()
        self.policy = Policy(
            self.session,
            call,
            chat=CHAT.for_row({}),
            encode=letters.encode,
            decode=lambda tokens: letters.decode(tokens, True).strip(),
            serve=lambda policy: self.gateway.open(policy, self.failed),
        )

    @property
    def root(self):
        """The gateway's address without a key."""
        return self.policy.base_url.partition("/r/")[0]

    def client(self, **settings):
        return AsyncOpenAI(
            **({"base_url": self.policy.base_url, "api_key": self.policy.api_key, "max_retries": 0} | settings)
        )


@contextlib.asynccontextmanager
async def served(call=None, **limits):
    subject = Served(call or Answers(), **limits)
    try:
        yield subject
    finally:
        if subject.call.hold is not None:
            subject.call.hold.set()
        await subject.gateway.close()
