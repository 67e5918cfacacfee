"""Rollouts with an environment that are cut off and continue elsewhere: at every moment, and what a message may say."""

import asyncio
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.config.loading import validate
from async_rl.errors import WireError
from async_rl.queue import wire
from async_rl.rollout import parked
from async_rl.rollout.engine.interface import EngineOutput
from async_rl.rollout.environments.drive import Counts, Differs, Stages, drive
from async_rl.rollout.environments.instance import Failed
from async_rl.rollout.environments.interface import Context, Task
from async_rl.rollout.gate import Gate
from async_rl.rollout.parked import PARKED, Parked, Rules
from async_rl.rollout.policy import Policy
from async_rl.rollout.session import Session
from tests.support.agent_sessions import CALL_END, CHAT, END, STOPS, WORDS, ids, session
from tests.support.examples import examples
from tests.support.gateway_parts import Letters

TASK = Task("0-1", 1, "abc", None, {}, 3)
TOOL = {"type": "function", "function": {"name": "go", "parameters": {"type": "object", "properties": {}}}}
NAME = "rollout.agent.environment tests:Game"
RULES = {"max_response_tokens": 10_000, "stop_token_ids": STOPS}


class Game:
    """An environment as the driver has it, which is done after ``turns`` turns; what it says depends on its state."""

    def __init__(self, kind, turns, tally):
        self.kind, self.turns, self.tally, self.at = kind, turns, tally, 0

    async def setup(self, task, context):
        messages = None if self.kind == "text" else [{"role": "user", "content": "begin"}]
        return {"messages": messages, "tools": [TOOL] if self.kind == "tools" else [], "steps": True, "plays": False}

    async def step(self, message):
        self.tally.append(self.at)
        self.at += 1
        said = [{"role": "user", "content": f"s{self.at}"}]
        return {
            "messages": said,
            "reward": 0.5 if self.at % 2 else None,
            "done": self.at == self.turns,
            "truncated": False,
            "metrics": {"turns": float(self.at)},
        }

    async def reward(self, messages):
        return None

    async def get_state(self):
        return json.dumps({"at": self.at}) if self.kind != "bytes" else bytes([self.at])

    async def set_state(self, state):
        self.at = state[0] if self.kind == "bytes" else json.loads(state)["at"]


class Calls:
    """Engine calls that sample at most two tokens, which their place in the branch decides; then a push cuts them."""

    def __init__(self, lengths):
        self.lengths, self.sampled = lengths, 0

    async def __call__(self, partial, request_id, stop=()):
        await asyncio.sleep(0)
        request = partial.next_request()
        at = len(request.token_ids)
        turn_start = self.turn_start(partial)
        length = self.lengths[turn_start % len(self.lengths)]
        left = turn_start + length - at
        count = min(2, left, request.max_tokens)
        tokens = [WORDS + 1 + place % 7 for place in range(at, at + count)]
        if count == left:
            tokens[-1] = CALL_END if turn_start % 5 == 0 else END
        self.sampled += count
        rows = np.arange(request.first_row, at + count - 1) % 60_000
        end = "stop" if count == left else "length" if count == request.max_tokens else "abort"
        places = np.arange(at, at + count)
        return partial.absorb(
            EngineOutput(
                ids(*tokens),
                (-0.01 * places).astype(np.float32),
                np.full(count, at // 10, np.int32),
                rows.astype(np.uint16)[:, None, None],
                end,
            ),
            temperature=0.7 + turn_start,
        )

    @staticmethod
    def turn_start(partial):
        """Where in the branch the turn that is being sampled began."""
        start = len(partial.response_ids)
        while start and partial.versions[start - 1] >= 0:
            start -= 1
        return len(partial.prompt_ids) + start


class Rollout:
    """One rollout, begun or continued, with all that it could be continued from."""

    def __init__(self, kind, turns, lengths, policy="replace", recovery="state", before=None):
        self.game_turns, self.kind, self.recovery = turns, kind, recovery
        self.session = session(policy)
        if before is not None:
            begin, limits = self.session._start, self.session._limits
            self.session = Session.restored("r", begin, limits, before.session)
        self.progress = self.before = None if before is None else before.progress
        self.calls, self.steps, self.kept, self.counts = Calls(lengths), [], [], Counts()
        letters = Letters()
        self.policy = Policy(
            self.session,
            self.calls,
            chat=CHAT.for_row({}),
            encode=letters.encode,
            decode=lambda tokens: letters.decode(tokens, True).strip(),
            kept=self.keep,
        )

    def keep(self, progress=None):
        self.progress = progress or self.progress
        self.kept.append((self.calls.sampled, Parked(NAME, self.session.saved(), self.progress)))

    async def play(self, game=None):
        agent = validate({"model": {"path": "m"}, "data": {"train": "t"}}).rollout.agent
        stages = Stages(agent, "rollout.agent", Gate(), self.counts, set())
        game = game or Game(self.kind, self.game_turns, self.steps)
        return await drive(
            game,
            TASK,
            Context("r", 7),
            ids(110, 111),
            self.policy,
            stages,
            recovery=self.recovery,
            before=self.before,
            keep=self.keep,
        )


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for name in ("prompt_ids", "response_ids", "logprobs", "versions", "routed_experts"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert [(s.start, s.stop, s.version) for s in a.segments] == [(s.start, s.stop, s.version) for s in b.segments]
        assert (a.trajectory_id, a.finish_reason, a.origin) == (b.trajectory_id, b.finish_reason, b.origin)
        for s, t in zip(a.segments, b.segments, strict=True):
            np.testing.assert_array_equal(s.routed_experts, t.routed_experts)


KINDS = ["json", "bytes", "text", "tools"]
GAMES = {
    "kind": st.sampled_from(KINDS),
    "turns": st.integers(1, 5),
    "lengths": st.lists(st.integers(1, 5), min_size=1, max_size=3),
    "policy": st.sampled_from(["replace", "preserve", "exact"]),
}


@given(**GAMES, recovery=st.sampled_from(["state", "replay"]), data=st.data())
@settings(max_examples=examples(100), deadline=None)
def test_invariants_3_and_12_a_rollout_that_continues_is_the_one_that_was_not_cut(
    kind, turns, lengths, policy, recovery, data
):
    """From whatever moment it continues: same tokens, rewards and trajectories, and nothing is sampled twice."""

    async def run():
        whole = Rollout(kind, turns, lengths, policy, recovery)
        played = await whole.play()
        made = whole.session.trajectories()
        assert len(made) == 1 or any(t.origin == "stop_mismatch" for t in made)
        sampled, moment = data.draw(st.sampled_from(whole.kept))
        message = parked.encode("r", moment)
        received = parked.decode("r", message, Rules(routing_policy=policy, **RULES))
        assert parked.encode("r", received).tobytes() == message.tobytes()
        for sent, back in zip(moment.session.branches, received.session.branches, strict=True):
            assert (sent.history, sent.tools, sent.turns) == (back.history, back.tools, back.turns)
        rest = Rollout(kind, turns, lengths, policy, recovery, received)
        again = await rest.play()
        assert (again.reward, again.turn_rewards, again.metrics) == (played.reward, played.turn_rewards, played.metrics)
        same(made, rest.session.trajectories())
        assert rest.calls.sampled == whole.calls.sampled - sampled, "no token is sampled again"
        assert rest.steps == whole.steps[0 if recovery == "replay" else len(moment.progress.exchanges) :]
        assert rest.counts.recoveries == {recovery: 1}

    asyncio.run(run())


def moments(kind="json", turns=3, lengths=(3,), policy="replace"):
    async def run():
        whole = Rollout(kind, turns, list(lengths), policy)
        await whole.play()
        return [moment for *_, moment in whole.kept]

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "text"}, "its setup returns other messages than before"),
        ({"says": "x"}, "it answers turn 0 other than before"),
        ({"worth": 9.0}, "it answers turn 0 other than before"),
        ({"turns": 1}, "it is done after turn 0 where it was not"),
        ({"fails": "broken"}, "it fails in turn 0, as it did not before: broken"),
        ({"kind": "tools"}, "its tools are not those that it had"),
    ],
)
async def test_an_environment_that_answers_other_than_it_did_is_not_continued(change, match):
    whole = Rollout("json", 3, [3], recovery="replay")
    await whole.play()
    moment = next(each for *_, each in whole.kept if len(each.progress.exchanges) == 1)

    class Other(Game):
        async def step(self, message):
            step = await super().step(message)
            if "fails" in change:
                raise Failed(change["fails"])
            if "says" in change:
                step["messages"] = [{"role": "user", "content": change["says"]}]
            return step | ({"reward": change["worth"]} if "worth" in change else {})

    rest = Rollout("json", 3, [3], recovery="replay", before=moment)
    with pytest.raises(Differs, match=match):
        await rest.play(Other(change.get("kind", "json"), change.get("turns", 3), []))
    assert rest.counts.recoveries == {}


def altered(message, change):
    _, table, arrays = wire.unpack(PARKED, message)
    table.pop("arrays")
    change(table, arrays)
    return wire.pack(PARKED, "altered", table, arrays)


def refused(moment, change, rules=None):
    message = altered(parked.encode("r", moment), change)
    with pytest.raises(WireError):
        parked.decode("r", message, rules or Rules(routing_policy="replace", **RULES))


def test_what_does_not_belong_together_is_refused():
    *_, moment = [m for m in moments() if m.session.under_way]
    assert moment.session.turns == 2
    for change in (
        lambda table, _: table.update(said=table["exchanges"][0][:3]),
        lambda table, _: table["exchanges"].pop(),
        lambda table, _: table["exchanges"].append(table["exchanges"][0]),
        lambda table, _: table["branches"].pop(),
        lambda table, _: table["branches"][0].update(open=None),
        lambda table, _: table["branches"][0]["turns"].pop(),
        lambda table, _: table["branches"][0]["turns"][0].__setitem__(1, 0),
        lambda table, _: table["branches"][0]["turns"][0].__setitem__(2, 10**6),
        lambda table, _: table["branches"][0]["turns"][0].__setitem__(1, table["branches"][0]["turns"][0][1] + 1),
        lambda table, _: table["branches"][0]["turns"][0].__setitem__(2, table["branches"][0]["turns"][0][2] - 1),
        lambda table, _: table["branches"][0]["turns"][0].__setitem__(0, "robbed"),
        lambda table, _: table["branches"][0].update(messages=100),
        lambda table, _: table["branches"][0].update(root_tokens=0),
        lambda table, _: table.update(state="pickle"),
        lambda table, _: table.update(session=[-1, 0, False]),
        lambda table, _: table.update(session=[0, 0, False]),
        lambda table, _: table["exchanges"][0][0].update(role="user"),
        lambda table, arrays: arrays.pop("state"),
        lambda table, arrays: arrays.update(more=arrays["state"]),
    ):
        refused(moment, change)
    refused(moment, lambda *_: None, Rules(10_000, STOPS, "exact"))
    refused(moment, lambda *_: None, Rules(1, STOPS, "replace"))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
KEYS = ["first", "tools", "exchanges", "said", "metrics", "done", "truncated", "state", "session", "branches"]
INNER = ["trajectory_id", "policy", "finish_reason", "routing", "max_response_tokens", "root_tokens", "messages"]


@given(
    at=st.integers(0, 10**6),
    key=st.sampled_from([*KEYS, "environment"]),
    inner=st.none() | st.sampled_from([*INNER, "turns", "open"]),
    value=json_like,
)
@settings(max_examples=examples(200), deadline=None)
def test_a_table_that_says_something_else_is_refused_or_harmless(at, key, inner, value):
    known = MOMENTS[at % len(MOMENTS)]

    def change(table, _):
        if inner is None:
            table[key] = value
        for entry in table["branches"] if inner is not None else ():
            entry[inner] = value

    try:
        received = parked.decode(
            "r", altered(parked.encode("r", known), change), Rules(routing_policy="replace", **RULES)
        )
    except WireError:
        return
    for branch in received.session.branches:
        branch.partial.check()
    restored = session()
    Session.restored("r", restored._start, restored._limits, received.session)


MOMENTS = moments() + moments("text") + moments("bytes", 2, (1, 4))


def test_an_answer_that_was_being_merged_is_added():
    *_, moment = [m for m in moments() if m.session.under_way]
    (name,) = moment.session.under_way
    branch = next(b for b in moment.session.branches if b.open is not None)
    longer = dataclasses.replace(branch.partial, max_response_tokens=7)
    assert moment.after(longer).session.branches[-1].partial is longer
    assert (name, moment.num_tokens) == (longer.trajectory_id, moment.session.num_tokens)
