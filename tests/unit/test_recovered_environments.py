"""Rollouts that continue with another environment: after the death of its host, and in another worker or run."""

import asyncio

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from async_rl.config.loading import validate
from async_rl.errors import AgentFailure, ConfigError
from async_rl.metrics.exporter import Metrics
from async_rl.rollout.environments.instance import Failed, Instance
from tests.support.examples import examples
from tests.support.played import MODULE, Says, call, environments, play
from tests.support.processes import alive
from tests.support.scripted_engine import ScriptedEngine
from tests.support.scripted_replica import ListQueue, sampled, scripted, snapshot, worker

KINDS = ["state", "replay"]


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch):
    """Give environments a log, and see that no process is left."""
    monkeypatch.setenv("ENVIRONMENTS_LOG", str(tmp_path / "log"))
    before = set(psutil.Process().children(recursive=True))
    yield lambda: [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]
    assert not [each for each in psutil.Process().children(recursive=True) if each not in before and alive(each)]


# -- hosts --


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["setup", "step", "later step", "reward", "get_state", "set_state"])
async def test_a_rollout_continues_where_its_host_died(kind, stage, log):
    """The policy is asked for no turn twice, and each turn is rewarded once."""
    policy = Says("a", "b", "c")
    async with environments("Survivor", recovery=kind) as subject:
        played = await play(subject, policy, {stage: "dies"})
        lost = subject._hosts.lost["died"]
        recoveries = dict(subject.counts.recoveries)
    assert (played.reward, dict(played.metrics)) == (1.5, {"turns": 3.0})
    assert played.turn_rewards == {0: 0.5, 1: 0.5, 2: 0.5}
    assert [asked[-1]["content"] for asked in policy.asked] == ["row 1", "turn 1", "turn 2"]
    deaths, how = {
        "setup": (1, "restart"),
        "get_state": (1, "restart") if kind == "state" else (0, None),  # It dies in the first: there is no state yet.
        "set_state": (2 if kind == "state" else 1, kind),
    }.get(stage, (1, kind))
    assert (lost, recoveries) == (deaths, {how: 1} if how else {})


async def test_an_environment_that_kills_each_of_its_hosts_fails_after_some():
    async with environments("Survivor", recovery="state", max_recoveries=2) as subject:
        with pytest.raises(Failed, match=r"with its environment host, which ended with status 137"):
            await play(subject, Says(), {"step": "always dies"})
        assert subject._hosts.lost == {"died": 3}
        assert subject.counts.recoveries == {"state": 2}
    async with environments("Survivor", recovery="state", max_recoveries=1) as subject:
        played = await play(subject, Says(), {f"step {turn}": "dies" for turn in range(3)})
        assert (played.reward, subject._hosts.lost) == (1.5, {"died": 3}), "each step has an attempt of its own"
    async with environments("Survivor") as subject:
        with pytest.raises(Failed, match="status 137"):
            await play(subject, Says(), {"step": "dies"})
        assert subject._hosts.lost == {"died": 1}


@pytest.mark.parametrize(("kind", "how"), [("state", "unsaved"), ("replay", "random")])
async def test_what_cannot_be_continued_is_begun_again(kind, how):
    policy = Says("a", "b", "c", "d", "e")
    async with environments("Survivor", recovery=kind) as subject:
        played = await play(subject, policy, {"later step": "dies", "how": how})
        assert subject.counts.recoveries == {"restart": 1}
    assert played.reward == 1.5
    assert [asked[-1]["content"].split()[0] for asked in policy.asked] == ["row", "turn", "turn"], "the second time"
    assert policy.said == []


async def test_the_other_rollouts_of_a_host_continue_too():
    async with environments("Survivor", recovery="state") as subject:
        rows = [{"later step": "dies"}] + [{"step": "waits"}] * 4
        played = await asyncio.gather(
            *(play(subject, Says(), row, name=f"0-{at}") for at, row in enumerate(rows)), return_exceptions=True
        )
        assert [each.reward for each in played] == [1.5] * 5
        assert subject._hosts.lost == {"died": 1}
        assert subject.counts.recoveries.total() == 5


# -- states --


@pytest.mark.parametrize("inline", [True, False])
async def test_a_class_without_get_state_is_refused_before_the_first_rollout(inline):
    why = "has no get_state and set_state, which rollout.agent.recovery state calls; write them, or set"
    with pytest.raises(AgentFailure, match=rf"rollout\.agent\.environment \S+:NoState: NoState {why}"):
        async with environments("NoState", recovery="state", inline=inline) as subject:
            await subject.start()
    async with environments("makes_no_state", recovery="state", inline=inline) as subject:
        await subject.start()
        with pytest.raises(Failed, match=f"NoState {why}"):
            await play(subject, Says())


class Holds:
    value = None

    def step(self, message):
        """Never called."""

    def get_state(self):
        return self.value

    async def set_state(self, state):
        self.value = state


@pytest.mark.parametrize("value", [b"\xff", {"a": [1, 2.5, None, True, "\ud800"]}, [], "text", 2**80, float("inf")])
async def test_a_state_comes_back_as_it_was(value):
    one, other = (Instance(Holds, {}, 10, "e", needs_state=True) for _ in range(2))
    row = {"prompt_id": "0-1", "row": 1, "text": "", "messages": None, "fields": {}, "seed": 1}
    for each in (one, other):
        await each.setup(row, {"rollout_id": "r", "seed": 1})
    one._form.environment.value = value
    await other.set_state(await one.get_state())
    found = other._form.environment.value
    assert (type(found), found) == (type(value), value)
    for odd in ({1: 2}, (1, 2), object(), {"a": {1}}, [b"x"]):
        one._form.environment.value = odd
        with pytest.raises(Failed, match=r"its get_state returned .* does not come back from JSON as it was"):
            await one.get_state()
    one._form.environment.value = None
    assert await one.get_state() is None
    for each in (one, other):
        await each.close()


# -- another worker --


class TurnEngine(ScriptedEngine):
    """Ends each turn after six tokens; tokens from 90 on are not the policy's."""

    def last_position(self, trajectory_id, response):
        others = [i for i, token in enumerate(response) if token >= 90]
        return (others[-1] + 1 if others else 0) + 5


def replica(engine, queue, name="Wordy", routing="replace", **agent):
    rollout = {"n": 2, "max_num_seqs": 4, "max_response_tokens": 60}
    rollout["agent"] = {"environment": f"{MODULE}:{name}", "inline": True, **agent}
    partial = {"async_training": {"partial_rollout": {"routing": routing}}}
    subject, digits = worker(engine, queue, rollout=rollout, **partial)
    digits.encode = lambda text, add_special_tokens=False: [90 + ord(c) % 10 for c in text]
    return subject


def engine():
    return scripted(kind=TurnEngine, max_response_tokens=60)


def recoveries(subject):
    metrics, found = Metrics("rollout"), {}
    subject._worker.agents.publish(metrics)
    for kind in (*KINDS, "restart"):
        labels = {"agent": "agent", "kind": kind}
        count = metrics.registry.get_sample_value("async_rl_agent_recoveries_total", labels)
        found |= {kind: count} if count else {}
    return found


def left(subject):
    """Return how many rollouts of the groups that it has adopted have not ended."""
    return sum(2 - len(group.made) for group in subject._worker._adopted)


async def cut(kind, after, **agent):
    """Return the messages of two groups of a worker that was cut off ``after`` so many tokens, and what it did."""
    first, queue = engine(), ListQueue(2)
    subject = replica(first, queue, recovery=kind, **agent)
    run = asyncio.create_task(subject.run())
    await sampled(first, after)
    await subject.pause()
    messages = await snapshot(subject)
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    await subject.shutdown()
    return messages, first.sampled


TOTAL = 2 * 2 * 4 * 6
"""Tokens that the policy samples in two groups of two rollouts of four turns."""


# Hosts take a second each.
@pytest.mark.parametrize(
    ("after", "inline"), [*((after, True) for after in (1, 20, 24, 41, 50, 80)), (20, False), (50, False)]
)
@pytest.mark.parametrize("kind", KINDS)
async def test_another_worker_continues_rollouts_at_their_tokens(kind, after, inline, log):
    """Invariants 1, 2, 3, 7 and 12 across a hand-over in the middle of turns."""
    messages, before = await cut(kind, after, inline=inline)
    other, heir = engine(), ListQueue(0)
    other.version = 2
    successor = replica(other, heir, recovery=kind, inline=inline)
    adopted = await successor.adopt(*messages.values())
    assert len(adopted) == len(messages)
    await successor.run()
    assert sorted(group.group_id for group in heir.groups) == sorted(adopted)
    assert other.sampled == TOTAL - before, "what was sampled before is not sampled again"
    for group in heir.groups:
        for rollout in group.rollouts:
            (one,) = rollout.trajectories
            assert (rollout.reward, rollout.end, rollout.metrics) == (4.0, "done", {"turns": 4.0})
            assert one.response_ids[~one.sampled].tolist() == [90 + ord(c) % 10 for c in "1;2;3;"]
            assert int(one.sampled.sum()) == 24
            assert one.versions[one.sampled].tolist() == (-0.5 - one.logprobs[one.sampled]).astype(int).tolist()
            assert rollout.turns == ((0, 1, 2, 3),)
    assert recoveries(successor).keys() <= {kind, "restart"}
    await successor.shutdown()
    assert 4 < len(log()) <= 4 * 2, "a rollout that had ended is not made again"


@given(
    cuts=st.lists(st.integers(0, 50), max_size=4),
    kind=st.sampled_from(KINDS),
    routing=st.sampled_from(["replace", "preserve", "exact"]),
)
@settings(max_examples=examples(30), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_invariant_5_each_group_ends_once_however_often_its_workers_are_cut_off(cuts, kind, routing):
    """And each of its tokens is sampled once, under the version of the worker that has it (3, 7)."""

    async def run():
        left, messages, groups, total = 2, {}, [], 0
        for at, cut_after in enumerate([*cuts, None]):
            one, queue = engine(), ListQueue(left)
            one.version = at
            subject = replica(one, queue, routing=routing, recovery=kind)
            await subject.adopt(*messages.values())
            working = asyncio.create_task(subject.run())
            while not working.done() and (cut_after is None or one.sampled < cut_after):
                await asyncio.sleep(0)
            await subject.pause()
            messages = {} if working.done() else await snapshot(subject)
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            await subject.shutdown()
            # What has ended without another token since the snapshot is not known to the next worker.
            groups += [group for group in queue.groups if group.group_id not in messages]
            left, total = queue.left, total + one.sampled
        assert (sorted(group.group_id for group in groups), left) == (["0-0.0", "0-1.0"], 0)
        assert total == TOTAL
        for one in (t for group in groups for t in group.trajectories):
            assert one.versions[one.sampled].tolist() == (-0.5 - one.logprobs[one.sampled]).astype(int).tolist()
            assert int(one.sampled.sum()) == 24

    asyncio.run(run())


@pytest.mark.parametrize(
    ("changed", "kind"),
    [({"recovery": "restart"}, "restart"), ({"name": "WordyToo"}, "restart"), ({"recovery": "replay"}, "replay")],
)
async def test_other_settings_begin_rollouts_again(changed, kind):
    messages, _ = await cut("state", 50)
    other, heir = engine(), ListQueue(0)
    successor = replica(other, heir, **{"recovery": "state", **changed})
    await successor.adopt(*messages.values())
    # One that was being set up has nothing to lose, which only a worker that keeps states knows.
    again = changed.get("recovery") == "restart"
    expected = left(successor) if again else sum(len(group.parked) for group in successor._worker._adopted)
    await successor.run()
    assert [rollout.reward for group in heir.groups for rollout in group.rollouts] == [4.0] * 2 * len(messages)
    found = recoveries(successor)
    assert found[kind] == sum(found.values()) or kind == "replay", "a setup may have been under way"
    assert sum(found.values()) == expected
    await successor.shutdown()


async def test_a_rollout_that_is_made_again_is_counted():
    messages, before = await cut("restart", 50)
    other, heir = engine(), ListQueue(0)
    successor = replica(other, heir)
    await successor.adopt(*messages.values())
    expected = left(successor)
    await successor.run()
    assert recoveries(successor) == {"restart": expected}
    assert other.sampled == 24 * expected > TOTAL - before
    await successor.shutdown()


@pytest.mark.parametrize(
    ("agent", "what"),
    [
        ({"function": "a:b"}, r"rollout\.agent\.function is a:b"),
        ({"command": ["run", "it"]}, r"rollout\.agent\.command is run it"),
        ({}, "no environment is set"),
    ],
)
def test_only_environments_can_be_recovered(agent, what):
    tree = {"model": {"path": "m"}, "data": {"train": "t"}, "rollout": {"agent": {**agent, "recovery": "state"}}}
    with pytest.raises(ConfigError, match=rf"rollout\.agent\.recovery is state, but {what}, and only an environment"):
        validate(tree)


async def test_tools_that_are_used_again_are_not_counted_again():
    policy = Says(call("put", {"title": "A"}), call("sell"), call("put", {"title": "B"}), "done")
    async with environments("DyingShelf", recovery="replay") as subject:
        played = await play(subject, policy)
        assert subject.counts.recoveries == {"replay": 1}
        assert subject.counts.tool_calls == {"ok": 2, "unknown_tool": 1}
    assert played.reward == {"reward": 2.0, "kept": 1.0}
