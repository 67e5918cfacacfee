"""The policy as an agent asks it: requests of messages, tokens and text over one session, and what interrupts them."""

import asyncio
import weakref

import numpy as np
import pytest

from async_rl.errors import EngineError, RequestRefused
from async_rl.rollout.engine.interface import EngineOutput
from async_rl.rollout.policy import Policy
from tests.support.agent_sessions import CHAT, END, LETTERS, WORDS, ids, session, user


class Answers:
    """Answers each turn with two words and a stop token, one token to a call as if each had been cut."""

    def __init__(self, *, cut=True, fails=()):
        self.cut, self.fails, self.requests, self.hold, self.version = cut, set(fails), [], None, 0

    async def __call__(self, partial, request_id, stop=()):
        self.requests.append(request_id)
        if self.hold is not None:
            await self.hold.wait()
        if len(self.requests) in self.fails:
            raise EngineError("refused")
        request = partial.next_request()
        whole = [WORDS + 1 + len(request.token_ids) % 7, WORDS + 1, END]
        done = len([t for t in request.token_ids[::-1][:2] if t > WORDS]) if partial.interrupted else 0
        tokens = whole[done : done + 1] if self.cut else whole[done:]
        rows = len(request.token_ids) + len(tokens) - 1 - request.first_row
        await asyncio.sleep(0)
        self.version += 1
        return partial.absorb(
            EngineOutput(
                ids(*tokens),
                np.full(len(tokens), -1.0, np.float32),
                np.full(len(tokens), self.version, np.int32),
                np.full((rows, 1, 1), self.version, np.uint16),
                "stop" if tokens[-1] == END else "abort",
            )
        )


def text(tokens):
    return " ".join(str(token - WORDS) for token in np.asarray(tokens).tolist() if token > WORDS)


def policy(subject, call, chat=None):
    return Policy(
        subject, call, chat=chat or CHAT.for_row({}), encode=lambda t: [LETTERS + ord(c) for c in t], decode=text
    )


async def test_an_agent_sends_back_what_it_got_and_never_sees_that_turns_were_cut():
    subject, call = session(), Answers()
    asked = policy(subject, call)
    history = [user("a")]
    for index in range(3):
        reply = await asked.chat(history)
        assert (reply.index, reply.finish_reason, reply.text) == (index, "stop", reply.message["content"])
        assert len(reply.token_ids) == 3
        history += [reply.message, user("b")]
    (made,) = subject.trajectories()
    assert subject.ways == {"first": 1, "extended": 2}
    assert made.sampled.sum() == 9
    assert len(made.resume_points) == 6, "each turn was cut twice"
    assert made.versions[made.sampled].tolist() == list(range(1, 10))
    assert (made.routed_experts == 9).all()
    assert len(set(call.requests)) == 9


async def test_what_earlier_turns_had_is_kept_once():
    """A session that kept the branch as it was at each turn would grow with the square of its turns."""
    subject, call = session(), Answers(cut=False)
    asked = policy(subject, call)
    history, earlier = [user("a")], []
    for _ in range(4):
        reply = await asked.chat(history)
        history += [reply.message, user("b")]
        partial = subject.branches[0].partial
        earlier.append([weakref.ref(array) for array in (partial.routed_experts, partial.logprobs)])
        assert reply.token_ids.base is None
    del partial, reply
    assert [[ref() is not None for ref in refs] for refs in earlier] == [[False, False]] * 3 + [[True, True]]


async def test_several_requests_at_one_time_share_what_came_before():
    subject, call = session(), Answers()
    asked = policy(subject, call)
    first = await asked.chat([user("a")])
    history = [user("a"), first.message, user("b")]
    replies = await asyncio.gather(*(asked.chat(history) for _ in range(3)))
    assert sorted(reply.index for reply in replies) == [1, 2, 3]
    # One whose history is rendered late finds that another turn has ended there meanwhile.
    assert subject.ways["extended"] == 1
    assert subject.ways["parallel"] + subject.ways["edited"] == 2
    assert [int(t.sampled.sum()) for t in subject.trajectories()] == [6, 3, 3]


async def test_tokens_and_text():
    subject, call = session(), Answers(cut=False)
    asked = policy(subject, call)
    first = await asked.complete([11, 12])
    await asked.extend("x")
    await asked.complete([11, 12, *first.token_ids, 13])
    one, fork = subject.trajectories()
    assert one.prompt_ids.tolist() == [11, 12]
    assert one.response_ids.tolist()[3] == LETTERS + ord("x")
    assert fork.prompt_ids.tolist() == [11, 12, *first.token_ids, 13]


async def test_a_turn_that_is_read_when_its_rollout_has_ended_is_refused():
    subject = session()

    class Closes:
        def message(self, *_):
            subject.close()
            return {"role": "assistant", "content": "x"}

    asked = Policy(subject, Answers(), chat=CHAT.for_row({}), encode=list, decode=text, reader=Closes())
    with pytest.raises(RequestRefused, match="has ended"):
        await asked.chat([user("a")])
    assert not subject.trajectories()


async def test_a_turn_that_fails_or_is_cancelled_leaves_no_trace():
    subject, call = session(), Answers(fails=(5,))
    asked = policy(subject, call)
    first = await asked.chat([user("a")])
    history = [user("a"), first.message, user("b")]
    before = subject.branches[0].tokens.tolist()
    with pytest.raises(EngineError):
        await asked.chat(history)
    assert subject.branches[0].tokens.tolist() == before
    call.hold = asyncio.Event()
    task = asyncio.create_task(asked.chat(history))
    while len(call.requests) < 6:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert subject.branches[0].tokens.tolist() == before
    call.hold = None
    assert (await asked.chat(history)).index == 1
    assert subject.ways == {"first": 1, "extended": 1}


async def test_a_request_that_outlives_its_rollout_ends():
    subject, call = session(), Answers()
    asked = policy(subject, call)
    await asked.chat([user("a")])
    call.hold = asyncio.Event()
    late = asyncio.create_task(asked.chat([user("z")]))
    while len(call.requests) < 4:
        await asyncio.sleep(0.001)
    assert len(subject.trajectories()) == 1
    call.hold.set()
    with pytest.raises(RequestRefused, match="the rollout has ended"):
        await late
    with pytest.raises(RequestRefused, match="the rollout has ended"):
        await asked.chat([user("y")])
    assert len(call.requests) == 4


class Refuses:
    def prompt(self, messages, tools):
        from async_rl.errors import RowFault

        raise RowFault("the chat template refuses the messages: roles must alternate")


@pytest.mark.parametrize(
    ("ask", "match"),
    [
        (lambda p: p.chat([]), "messages has no messages"),
        (lambda p: p.chat([{"role": "robot", "content": "a"}]), "the role is 'robot'"),
        (lambda p: p.chat([{"role": "user", "content": [{"type": "image"}]}]), "only text can be trained on"),
        (lambda p: p.chat([user("a")], [{"name": "f"}]), "tool 1: no name of a function"),
        (lambda p: p.chat([user("a")]), "roles must alternate"),
        (lambda p: p.chat([{"role": "assistant", "content": "a"}]), "must end with one that the policy is to answer"),
        (lambda p: p.complete([]), "there are no tokens to continue"),
        (lambda p: p.complete([5], max_tokens=0), "max_tokens is 0"),
        (lambda p: p.extend("a"), "a turn of the policy before it"),
    ],
)
async def test_what_cannot_be_answered_is_refused_by_name(ask, match):
    subject = session()
    with pytest.raises(RequestRefused, match=match) as error:
        await ask(policy(subject, Answers(), Refuses()))
    assert error.value.code == "invalid_request"
    assert (subject.branches, subject.truncated) == ([], False)


async def test_an_empty_answer_may_be_sent_back():
    subject, call = session(), Answers()
    asked = policy(subject, call)
    turn = subject.begin(subject.find([user("a")]), ids(5))
    subject.keep(
        turn,
        turn.branch.partial.absorb(
            EngineOutput(
                ids(END), np.zeros(1, np.float32), np.zeros(1, np.int32), np.ones((1, 1, 1), np.uint16), "stop"
            )
        ),
    )
    subject.end(turn, {"role": "assistant", "content": ""})
    await asked.chat([user("a"), {"role": "assistant", "content": None}, user("b")])
    assert subject.ways == {"first": 1, "extended": 1}
