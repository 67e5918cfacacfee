"""Agents whose rollouts wait for tools: places in the engine and rollouts in the making are two limits."""

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.config.loading import validate
from async_rl.metrics.exporter import Metrics
from async_rl.rollout.actor import RolloutReplica
from async_rl.rollout.engine.interface import EngineLoad
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.prefixes import Computed, computed, in_common
from async_rl.types import Segment
from tests.support.kv_engine import BLOCK, BlockCache, KvEngine, Speed, of_others
from tests.support.scripted_engine import Layout, Script, ScriptedEngine
from tests.support.scripted_replica import Digits, ListQueue, push, sampled, scripted, turns, worker
from tests.support.virtual_time import run

ROLLOUT = {"n": 2, "max_num_seqs": 4, "max_response_tokens": 40}
HELD = {}


def replica(engine, queue, name, **rollout):
    subject, _ = worker(engine, queue, rollout={**ROLLOUT, **rollout, "agent": {"function": f"{__name__}:{name}"}})
    return subject


def making(subject):
    return subject._worker.making


async def waits_for_a_tool(prompt, policy, context):
    await policy.complete(prompt.token_ids)
    HELD["waiting"] += 1
    await HELD["go"].wait()
    await policy.complete(prompt.token_ids)
    return 1.0


@pytest.mark.parametrize(("limit", "waiting"), [(None, 16), (6, 6), (4, 4)])
async def test_rollouts_that_wait_for_tools_leave_the_engine_to_others(limit, waiting):
    engine, queue = scripted(), ListQueue(20)
    HELD.update(waiting=0, go=asyncio.Event())
    subject = replica(engine, queue, "waits_for_a_tool", max_trajectories=limit)
    running = asyncio.create_task(subject.run())
    await turns(2000)
    assert HELD["waiting"] == waiting, "as many as the replica may have in the making, and no more"
    assert making(subject).open == waiting
    metrics = Metrics("rollout")
    making(subject).publish(metrics)
    assert metrics.registry.get_sample_value("async_rl_rollouts_in_the_making") == waiting
    assert metrics.registry.get_sample_value("async_rl_kv_use_at_admission_count") == waiting
    HELD["go"].set()
    await running
    assert len(queue.groups) == 20
    assert making(subject).open == 0


class Loaded(ScriptedEngine):
    """An engine that reports what a test sets."""

    reported = EngineLoad()

    async def load(self):
        return self.reported


def test_no_group_is_taken_while_calls_wait_in_the_engine():
    async def main(loop):
        engine, queue = scripted(kind=Loaded), ListQueue(6)
        length = {"0-5.0/0": 40}  # seconds of its call: 20, of others 3
        engine.script = Script(length=lambda name: length.get(name, 6), turn_s=0.5, layout=engine.script.layout)
        HELD.update(waiting=0, go=asyncio.Event())
        subject = replica(engine, queue, "waits_for_a_tool")
        running = asyncio.create_task(subject.run())
        await asyncio.sleep(1.0)
        engine.reported = EngineLoad(waiting=1)
        await asyncio.sleep(4.0)
        assert (making(subject).open, HELD["waiting"]) == (4, 3), "three places are free"
        engine.reported = EngineLoad()
        await asyncio.sleep(1.0)
        assert making(subject).open == 7
        HELD["go"].set()
        await running
        assert len(queue.groups) == 6

    run(main)


async def asks_once(prompt, policy, context):
    await policy.complete(prompt.token_ids)
    return 1.0


async def test_a_call_that_a_weight_sync_has_cut_keeps_its_place():
    engine, queue = scripted(length=38), ListQueue(1)
    subject = replica(engine, queue, "asks_once", n=8)  # of which four wait to begin
    running = asyncio.create_task(subject.run())
    await sampled(engine, 20)
    for _ in range(2):
        assert making(subject).open == 4
        await push(subject, engine)
        await turns(5)
    assert making(subject).open == 4
    await running
    assert len(queue.groups) == 1


class Counting(ListQueue):
    """Tickets that end somehow, each once."""

    def ended(self):
        return sorted(
            [group.group_id for group in self.groups]
            + [group_id for group_id, _ in (*self.failed, *self.returned, *self.filtered)]
        )


async def does_anything(prompt, policy, context):
    rng = np.random.default_rng((context.seed, HELD["seed"]))
    await asyncio.sleep(rng.choice([0.0, 0.5, 8.0]))
    history = [*prompt.token_ids]
    for _ in range(rng.integers(0, 4)):
        count = 1 + int(rng.random() < 0.3)
        replies = await asyncio.gather(*(policy.complete(history) for _ in range(count)))
        await asyncio.sleep(round(rng.exponential(3.0) * 64) / 64)  # exact, as all times here: limits end on the dot
        if rng.random() < 0.1:
            raise ValueError("a tool is gone")
        history = [*history, *replies[0].token_ids, *of_others(rng, 5)] if rng.random() < 0.7 else history[:-1] or [1]
    return float(rng.random())


@given(
    seed=st.integers(0, 10**6),
    places=st.integers(1, 4),
    limit=st.integers(4, 12),
    kv_tokens=st.sampled_from([600, 2000, 10**6]),
    bound=st.sampled_from([None, 0.2, 0.9]),
    mode=st.sampled_from(["resume", "drain", "in_flight"]),
    timeout=st.sampled_from([None, 10.0]),
)
def test_invariant_5_every_group_that_was_taken_ends_once(seed, places, limit, kv_tokens, bound, mode, timeout):
    """Whatever agents do, how small the cache is, and while weights change: nothing waits for ever."""

    async def main(loop):
        HELD.update(seed=seed)
        agent = {"function": f"{__name__}:does_anything", "on_error": "skip"}
        rollout = {"n": 2, "max_num_seqs": places, "max_trajectories": limit, "max_response_tokens": 200}
        tree = {
            "model": {"path": "model"},
            "data": {"train": "train.jsonl"},
            "rollout": {**rollout, "agent": agent, "max_kv_use": bound, "group_timeout_s": timeout},
            "async_training": {"partial_rollout": {"mode": mode}},
        }
        config = validate(tree)
        script = Script(layout=Layout(None, frozenset({0}), 10_000), tokens_per_turn=4, turn_s=0.25)
        engine = KvEngine(config, script, Speed(places, kv_tokens, turn=12, prefill_tokens_per_s=2**14))
        queue = Counting(8)
        subject = RolloutReplica(config, 0, queue, engine, Digits(), Digits())
        running = asyncio.create_task(subject.run())
        async with asyncio.timeout(3000):  # a rollout takes a minute at most
            while not running.done():
                await asyncio.sleep(4.0)
                assert making(subject).open <= limit
                if loop.now < 1060:
                    await push(subject, engine)
            await running
        assert queue.ended() == [f"0-{index}.0" for index in range(8)]
        assert making(subject).open == 0
        assert not making(subject)._waiting
        assert making(subject).free_groups > 0
        await subject.shutdown()

    run(main)


async def takes_turns(prompt, policy, context):
    history, rng = prompt.token_ids.tolist(), np.random.default_rng(context.seed)
    for _ in range(5):
        reply = await policy.complete(history)
        await asyncio.sleep(rng.exponential(8.0))
        history = [*history, *reply.token_ids.tolist(), *of_others(rng, 40)]
    return 1.0


def turns_taken(kv_tokens, groups=16, **rollout):
    """Return the seconds, and the context tokens by what became of them, of rollouts with five turns of two seconds."""

    async def main(loop):
        agent = {"function": f"{__name__}:takes_turns"} | rollout.pop("agent", {})
        rollout_settings = {"n": 2, "max_num_seqs": 4, "max_response_tokens": 400} | rollout | {"agent": agent}
        tree = {"model": {"path": "model"}, "data": {"train": "train.jsonl"}, "rollout": rollout_settings}
        config = validate(tree)
        script = Script(layout=Layout(None, frozenset({0}), 10_000), tokens_per_turn=10, turn_s=1.0)
        engine = KvEngine(config, script, Speed(4, kv_tokens, turn=20))
        subject = RolloutReplica(config, 0, ListQueue(groups), engine, Digits(), Digits())
        await subject.run()
        await subject.shutdown()
        return loop.now - 1000, subject._worker.calls.context_tokens

    return run(main)


def test_two_limits_fill_the_engine_and_keep_what_open_rollouts_have_cached():
    one_limit, _ = turns_taken(10**5, max_trajectories=4)
    two_limits, tokens = turns_taken(10**5)
    assert two_limits < 0.5 * one_limit
    small = 2000  # tokens, of which a rollout has 300 in the end
    _, unbounded = turns_taken(small, max_kv_use=None)
    seconds, bounded = turns_taken(small)
    assert bounded["lost"] < 0.6 * unbounded["lost"]
    assert tokens["lost"] < bounded["lost"], "in the beginning nothing is known of their size"
    assert seconds < one_limit


# -- what is counted --------------------------------------------------------------------------------------------------


async def held_agent(prompt, policy, context):
    return await HELD["agent"](policy, prompt.token_ids.tolist())


def one_agent(kv_tokens):
    """A replica that makes one rollout of HELD["agent"], and its engine, whose turns have 20 tokens."""
    rollout = {"n": 1, "max_num_seqs": 2, "max_response_tokens": 400}
    tree = {
        "model": {"path": "model"},
        "data": {"train": "train.jsonl"},
        "rollout": rollout | {"agent": {"function": f"{__name__}:held_agent"}},
        "trainer": {"loss": {"advantage": "reinforce_plus_plus"}},
    }
    config = validate(tree)
    script = Script(layout=Layout(None, frozenset({0}), 10_000), tokens_per_turn=4, turn_s=0.3)
    engine = KvEngine(config, script, Speed(2, kv_tokens, turn=20))
    return RolloutReplica(config, 0, ListQueue(1), engine, Digits(), Digits()), engine


def counted(agent, kv_tokens=10**5):
    """Return the context tokens of one rollout, by what became of them, and those that the engine was sent."""

    async def main(loop):
        subject, engine = one_agent(kv_tokens)
        HELD["agent"] = lambda *args: agent(subject, engine, *args)
        await subject.run()
        await subject.shutdown()
        tokens = subject._worker.calls.context_tokens
        return tokens, [sent for _, sent, _ in engine.requests]

    return run(main)


async def turn(policy, history):
    """Return the history with a turn of the policy and an answer of 30 tokens."""
    reply = await policy.complete(history)
    return [*history, *reply.token_ids.tolist(), *of_others(np.random.default_rng(len(history)), 30)]


def test_a_context_that_grows_is_computed_once():
    async def agent(subject, engine, policy, history):
        for _ in range(4):
            history = await turn(policy, history)
        return 1.0

    tokens, sent = counted(agent)
    assert sent == [3, 53, 103, 153]
    assert tokens.total() == sum(sent)
    assert tokens["weight_sync"] == 0
    assert tokens["lost"] < 3 * BLOCK, "what is behind the last whole block"
    assert tokens["cached"] >= 16 + 64 + 112


def test_a_fork_finds_what_its_branch_has_cached():
    async def agent(subject, engine, policy, history):
        first = await turn(policy, history)
        await turn(policy, first)
        await turn(policy, [*first[:-1], 9999])
        return 1.0

    tokens, sent = counted(agent)
    assert sent == [3, 53, 53]
    assert tokens["cached"] == 16 + 48
    assert tokens["new"] + tokens["lost"] == sum(sent) - 64
    assert tokens["lost"] < 3 * BLOCK


def test_after_a_weight_sync_contexts_are_computed_again():
    async def agent(subject, engine, policy, history):
        history = await turn(policy, history)
        await push(subject, engine)
        await turn(policy, history)
        await push(subject, engine)
        await turn(policy, [*history[:-1], 9999])
        return 1.0

    tokens, sent = counted(agent)
    assert sent == [3, 53, 53]
    assert (tokens["cached"], tokens["lost"]) == (0, 0)
    assert tokens["weight_sync"] == 22 + 52
    assert tokens["new"] == sum(sent) - 22 - 52


def test_what_others_took_the_cache_of_is_lost():
    async def agent(subject, engine, policy, history):
        history = await turn(policy, history)
        await policy.complete(of_others(np.random.default_rng(7), 120))
        await turn(policy, history)
        return 1.0

    tokens, sent = counted(agent, kv_tokens=144)
    assert sent == [3, 120, 53]
    assert tokens["lost"] == 22
    assert tokens["cached"] == 0


def partial(prompt, response=(), version=3):
    tokens = np.array(response, dtype=np.int32)
    segments = (Segment(0, len(tokens), version),) if len(tokens) else ()
    return PartialRollout(
        "0-0.0/0", np.array(prompt, np.int32), 40, frozenset({0}), None, response_ids=tokens, segments=segments
    )


def test_the_token_that_was_sampled_last_was_not_computed():
    assert computed(partial([5, 6, 7])) == Computed(0, -1)
    assert computed(partial([5, 6, 7], [1, 2])) == Computed(4, 3)


def test_what_a_prompt_has_in_common_with_another_trajectory():
    one, other = partial([5, 6, 7], [1, 2], version=3), partial([5, 6, 8], [4], version=4)
    prompt = np.array([5, 6, 7, 1, 2, 90], np.int32)
    assert in_common(prompt, [one, other]) == (5, Computed(4, 3))
    assert in_common(np.array([5, 6, 8, 9], np.int32), [one, other]) == (3, Computed(3, 4))
    assert in_common(np.array([5, 6], np.int32), [one]) == (2, Computed(2, 3))
    assert in_common(np.array([1, 6], np.int32), [one]) == (0, Computed())
    assert in_common(prompt, []) == (0, Computed())


# -- the engine of these tests ----------------------------------------------------------------------------------------


def test_blocks_stay_until_others_need_them():
    cache = BlockCache(4)
    found = cache.reserve([1, 2], 3)
    assert (found, cache.use) == ([], 0.75)
    assert cache.reserve([7], 2) is None
    cache.release(found, 3, [1, 2, 3])
    assert cache.use == 0.0
    assert cache.reserve([1, 2, 9], 4) == [1, 2]
    cache.release([1, 2], 4, [1, 2, 9, 10])
    found = cache.reserve([8], 2)
    assert found == []
    cache.release(found, 2, [8, 80])
    assert cache.reserve([1, 2, 9], 3) == [1, 2], "the end of a context went first"
