"""An environment's tools, called by a policy that writes calls as text: template, parser, session and environment."""

import numpy as np
import pytest

from async_rl.data.chat import CheckpointEncoder
from async_rl.data.chat_turns import ChatTurns
from async_rl.rollout.engine.interface import EngineOutput
from async_rl.rollout.engine.vllm.parsing import TOOL_PARSERS, ToolParser
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.policy import Policy
from async_rl.rollout.session import Limits, Session
from async_rl.rollout.turn_message import ToolParsers, TurnReader
from tests.support.chat_families import tokenizer
from tests.support.played import environments, play, summed
from tests.support.tool_families import EOS, TOOL_FAMILIES

SAYS = {
    "hermes": (
        '<tool_call>\n{"name": "put", "arguments": {"title": "A<|im_end|>"}}\n</tool_call>',
        'hm <tool_call>\n{"name": "put", "arguments": {"place": 1}}\n</tool_call>',
        '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>',
        "done",
    ),
    "qwen3_xml": (
        "<tool_call>\n<function=put>\n<parameter=title>\nA<|im_end|>\n</parameter>\n</function>\n</tool_call>",
        "hm <tool_call>\n<function=put>\n<parameter=place>\n1\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=look>\n</function>\n</tool_call>",
        "done",
    ),
}


class Chat:
    """The chat of one row, as ``rollout.chat`` makes it of a checkpoint."""

    def __init__(self, row, reader):
        self.row, self.reader = row, reader
        self.prompt, self.after = row.prompt, row.after

    def message(self, turn):
        return self.reader.message(turn, self.row)


class Says:
    """An engine that says each of these turns, three tokens to a call as if weight syncs had cut it."""

    def __init__(self, turns, encode, stop):
        self.turns = [[*encode(turn), stop] for turn in turns]
        self.left = None

    async def __call__(self, partial, request_id, stop=()):
        self.left = self.left or self.turns.pop(0)
        tokens, self.left = self.left[:3], self.left[3:]
        count = len(tokens)
        return partial.absorb(
            EngineOutput(
                np.array(tokens, np.int32),
                np.full(count, -1.0, np.float32),
                np.zeros(count, np.int32),
                None,
                "abort" if self.left else "stop",
            )
        )


@pytest.mark.parametrize("family", SAYS)
async def test_a_rollout_with_tools_is_one_trajectory_of_what_was_sampled(family):
    made = tokenizer(TOOL_FAMILIES[family])
    stop = made.convert_tokens_to_ids(EOS[family])
    encoder = CheckpointEncoder(lambda: made)
    row = ChatTurns(encoder.chat, [stop], None, None, encoder.written).for_row({})
    reader = TurnReader(
        lambda: ToolParsers(TOOL_PARSERS, lambda name: ToolParser(name, made)),
        lambda ids: made.decode(ids, skip_special_tokens=False),
    )

    def encode(text):
        """Return its tokens, control tokens of what is said as text."""
        head, _, tail = text.partition("<|im_end|>")
        inner = [token for letter in "<|im_end|>" for token in made.encode(letter, add_special_tokens=False)]
        parts = [made.encode(part, add_special_tokens=False) for part in (head, tail)]
        return [*parts[0], *(inner if tail else []), *parts[1]]

    def start(name, prompt, room):
        return PartialRollout.begin(
            name,
            prompt,
            max_response_tokens=room,
            eos_token_id=frozenset({stop}),
            routing_spec=None,
            routing_policy="replace",
        )

    session = Session("0-1.0/0", start, Limits(context_tokens=10_000, response_tokens=10_000))
    policy = Policy(
        session,
        Says(SAYS[family], encode, stop),
        chat=(chat := Chat(row, reader)),
        reader=chat,
        encode=encode,
        decode=lambda ids: made.decode(ids, skip_special_tokens=True),
    )
    async with environments("Shelf", inline=True) as subject:
        played = await play(subject, policy)
    assert summed(played)["kept"] == 1.0
    assert session.ways == {"first": 1, "extended": 3}
    (trajectory,) = session.trajectories()
    assert trajectory.response_ids[trajectory.sampled].tolist() == [
        token for turn in SAYS[family] for token in (*encode(turn), stop)
    ]
    context = made.decode(trajectory.response_ids[~trajectory.sampled])
    assert "1 books" in context
    assert "title" in context, "the faulty call was answered"
    assert "A<|im_end|>" in context, "what the tool said"
    # What the tool wrote is no control token: each turn of the policy ends by one, each message of a tool by another.
    assert trajectory.response_ids.tolist().count(stop) == 4 + 3
    assert reader.read == {True: 3, False: 0}
