"""A small chat template and an engine of random tokens around a session, for tests of what agents may do to it."""

import numpy as np

from async_rl.data.chat_turns import ChatTurns
from async_rl.rollout.engine.interface import EngineOutput
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.session import Limits, Session
from async_rl.types import RoutingSpec

SPEC = RoutingSpec(num_moe_layers=1, top_k=1, num_experts=60_000)
# Tokens of the template: the end of a turn, another one with which a model calls tools, a new line, and each role.
END, CALL_END, NEWLINE = 1, 2, 3
ROLES = {"system": 4, "user": 5, "assistant": 6, "tool": 7}
STOPS = frozenset({END, CALL_END})
LETTERS = 100  # the token of a character is its code and this; sampled tokens are above 1000
WORDS = 1000


def render(messages, tools, _variables):
    """``Encoder.chat`` of a template that writes tools first, each message as role, text, end, and then asks."""
    ids = [LETTERS + ord(c) for tool in tools or () for c in tool["function"]["name"]]
    for message in messages:
        ids += [ROLES[message["role"]], *(LETTERS + ord(c) for c in message.get("content") or ""), END, NEWLINE]
    return "", [*ids, ROLES["assistant"]]


CHAT = ChatTurns(render, STOPS)


def ids(*tokens):
    return np.array(tokens, np.int32)


def session(policy="replace", **limits):
    """Return the session of rollout "r" with limits that no test reaches unless it sets them."""

    def start(name, prompt, room):
        return PartialRollout.begin(
            name,
            prompt,
            max_response_tokens=room,
            eos_token_id=STOPS,
            routing_spec=SPEC,
            routing_policy=policy,
        )

    return Session("r", start, Limits(**{"context_tokens": 10_000, "response_tokens": 10_000} | limits))


def missing(place, tools=None):
    """Return the tokens that a place asks for, as the template writes them."""
    if place.after is None:
        return ids(*render(place.added, tools, {})[1])
    return ids(*CHAT.after(place.added, tools, {}))


def ask(subject, messages, tools=None, max_tokens=None):
    """Return the turn of a request, begun."""
    place = subject.find(messages, tools)
    return subject.begin(place, missing(place, tools), max_tokens)


class Engine:
    """Samples tokens that it numbers: a log-prob is -0.001 times the number of its token, a row that of its call."""

    def __init__(self):
        self.version = 0
        self.tokens = 0
        self.calls = 0
        self.sent = []

    def call(self, subject, turn, words, end):
        """Make one call for a turn: sample ``words`` and end. Returns the log-probs of what was sampled."""
        request = turn.branch.partial.next_request()
        words = list(words)[: request.max_tokens]
        if len(words) == request.max_tokens and end == "stop" and words[-1] not in STOPS:
            end = "length"
        logprobs = -0.001 * np.arange(self.tokens + 1, self.tokens + 1 + len(words), dtype=np.float32)
        self.tokens += len(words)
        self.calls += 1
        rows = len(request.token_ids) + len(words) - 1 - request.first_row
        output = EngineOutput(
            token_ids=ids(*words),
            logprobs=logprobs,
            versions=np.full(len(words), self.version, np.int32),
            routed_experts=np.full((rows, 1, 1), self.calls, np.uint16) if words else None,
            finish_reason=end,
        )
        self.sent.append((turn, request.token_ids))
        subject.keep(turn, turn.branch.partial.absorb(output))
        return logprobs.tolist()

    def answer(self, subject, turn, *words, last=END):
        """Complete a turn in one call, and return its message: the words as text."""
        self.call(subject, turn, [*(WORDS + w for w in words), *([] if last is None else [last])], "stop")
        said = message_of(turn)
        subject.end(turn, said)
        return said


def message_of(turn):
    """Return the policy's message as an agent gets it."""
    words = [str(token - WORDS) for token in turn.token_ids.tolist() if token > WORDS]
    return {"role": "assistant", "content": " ".join(words)}


def user(text):
    return {"role": "user", "content": text}
