"""Rollouts of a user's own through a worker: pushes in every mode, failures, groups of any number of trajectories."""

import asyncio
import dataclasses

import numpy as np
import pytest

from async_rl.config.loading import validate
from async_rl.doctor.inputs import functions
from async_rl.errors import AgentFailure, ConfigError, RequestRefused
from async_rl.metrics.exporter import Metrics
from async_rl.queue.codec import decode, encode
from async_rl.queue.records import Excerpt, GroupMeta
from async_rl.rollout.outcome import Outcome
from tests.support.groups import rewarded
from tests.support.scripted_engine import ScriptedEngine
from tests.support.scripted_replica import ListQueue, push, sampled, scripted, snapshot, turns, worker

ROLLOUT = {"n": 2, "max_num_seqs": 4, "max_response_tokens": 40}
HELD = {}  # what agents wait for, by name


def agent(name, **settings):
    return {"rollout": {**ROLLOUT, "agent": {"function": f"{__name__}:{name}", **settings}}}


def encode_text(text, add_special_tokens=False):
    assert not add_special_tokens
    return [90 + ord(c) % 10 for c in text]


def replica(engine, queue, name, mode="resume", agent_settings=None, **settings):
    subject, digits = worker(engine, queue, mode, **agent(name, **(agent_settings or {})), **settings)
    digits.encode = encode_text
    return subject


class TurnEngine(ScriptedEngine):
    """Ends each turn after six tokens, whatever came before; tokens from 90 on are not the policy's."""

    def last_position(self, trajectory_id, response):
        others = [i for i, token in enumerate(response) if token >= 90]
        return (others[-1] + 1 if others else 0) + 5


async def branches(prompt, policy, context):
    """One turn, then three at one time: one goes on, two fork."""
    first = await policy.complete(prompt.token_ids)
    said = [*prompt.token_ids, *first.token_ids]
    await asyncio.gather(*(policy.complete([*said, 90 + i]) for i in range(3)))
    assert context.rollout_id.startswith(f"{prompt.prompt_id}.0/")
    return {"reward": float(context.rollout_id[-1]), "seeded": float(context.seed >= 0)}


@pytest.mark.parametrize("mode", ["resume", "in_flight", "drain"])
async def test_an_agent_that_branches_is_a_rollout_of_several_trajectories_whatever_interrupts_it(mode):
    engine, queue = scripted(kind=TurnEngine), ListQueue(2)
    subject = replica(engine, queue, "branches", mode)
    run = asyncio.create_task(subject.run())
    for _ in range(2):
        await sampled(engine, 10)
        await push(subject, engine)
    await run
    assert len(queue.groups) == 2
    for group in queue.groups:
        assert [rollout.reward for rollout in group.rollouts] == [0.0, 1.0]
        assert all(rollout.reward_parts == {"seeded": 1.0} for rollout in group.rollouts)
        for rollout in group.rollouts:
            first, *forks = rollout.trajectories
            assert (len(forks), first.trajectory_id) == (2, rollout.rollout_id)
            assert first.response_ids.tolist()[6] in (90, 91, 92)
            for fork in forks:
                assert fork.prompt_ids[:-1].tolist() == [*first.prompt_ids, *first.response_ids[:6]]
            assert sum(int(one.sampled.sum()) for one in rollout.trajectories) == 4 * 6
            for one in rollout.trajectories:
                # The scripted log-prob names the version that sampled the token.
                assert one.versions[one.sampled].tolist() == (-0.5 - one.logprobs[one.sampled]).astype(int).tolist()
        assert decode(encode(group)).rewards.tolist() == group.rewards.tolist()
    versions = {v for group in queue.groups for t, _ in rewarded(group) for v in t.versions.tolist()}
    assert versions > {0}, "pushes came in the middle"
    if mode == "drain":
        assert not any(t.is_partial for group in queue.groups for t in group.trajectories)
    else:
        assert any(t.is_partial for group in queue.groups for t in group.trajectories)
    assert subject.stats().trajectories == 2 * 2 * 3


async def talks(prompt, policy, context):
    reply = await policy.complete(prompt.token_ids)
    while reply.index < 2:
        reply = await policy.extend("ab")
    return float(reply.index)


async def test_text_that_is_appended_makes_one_trajectory():
    engine, queue = scripted(kind=TurnEngine), ListQueue(1)
    await replica(engine, queue, "talks").run()
    for trajectory, reward in rewarded(queue.groups[0]):
        assert (reward, trajectory.finish_reason) == (2.0, "stop")
        assert trajectory.response_ids[~trajectory.sampled].tolist() == encode_text("ab") * 2
        assert trajectory.sampled.sum() == 3 * 6


async def until_refused(prompt, policy, context):
    count = 0
    try:
        while True:
            count += 1
            await policy.complete([*prompt.token_ids, count])
    except RequestRefused:
        return Outcome(count, trainable=context.rollout_id.endswith("0"))


@pytest.mark.parametrize(
    ("limit", "made"), [({"max_turns": 3}, 3), ({"max_branches": 2}, 2), ({"max_sampled_tokens": 1}, 1)]
)
async def test_a_rollout_that_reaches_a_limit_is_truncated(limit, made):
    queue = ListQueue(1)
    subject = replica(scripted(), queue, "until_refused", agent_settings=limit)
    await subject.run()
    (group,) = queue.groups
    assert subject._worker.agents["rollout.agent"].refused == {"rollout_budget_exceeded": 2}
    metrics = Metrics("rollout")
    subject._worker.agents.publish(metrics)
    labels = {"agent": "agent", "code": "rollout_budget_exceeded"}
    assert metrics.registry.get_sample_value("async_rl_agent_requests_refused_total", labels) == 2.0
    assert [(len(r.trajectories), r.end, r.trainable) for r in group.rollouts] == [
        (made, "truncated", True),
        (made, "truncated", False),
    ]
    assert group.rewards.tolist() == [made + 1.0]


async def held(prompt, policy, context):
    await policy.complete(prompt.token_ids)
    HELD.setdefault("asked", []).append(context)
    if "go" in HELD:
        await HELD["go"].wait()
    await policy.extend("c")
    return 1.0


async def test_an_agent_that_has_not_ended_is_made_again_by_the_worker_that_adopts_its_group():
    engine, queue = scripted(length=6), ListQueue(1)
    HELD.update(asked=[], go=asyncio.Event())
    subject = replica(engine, queue, "held")
    run = asyncio.create_task(subject.run())
    while len(HELD["asked"]) < 2:
        await turns(1)
    messages = await snapshot(subject)
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    del HELD["go"]
    heir = ListQueue(0)
    successor = replica(scripted(length=6), heir, "held")
    assert await successor.adopt(*messages.values()) == ["0-0.0"]
    await successor.run()
    assert [group.group_id for group in heir.groups] == ["0-0.0"]
    seeds = {(context.rollout_id, context.seed) for context in HELD["asked"]}
    assert (len(HELD["asked"]), len(seeds)) == (4, 2), "the same seeds again"


async def one_is_held(prompt, policy, context):
    await policy.complete(prompt.token_ids)
    HELD.setdefault("asked", []).append(context.rollout_id)
    if context.rollout_id.endswith("/1") and "go" in HELD:
        await HELD["go"].wait()
    await policy.complete(prompt.token_ids)  # a second trajectory
    return {"reward": float(context.rollout_id[-1]), "part": 3.0}


async def test_a_rollout_that_has_ended_is_kept_by_the_worker_that_adopts_its_group():
    HELD.update(asked=[], go=asyncio.Event())
    subject = replica(scripted(length=6), ListQueue(1), "one_is_held")
    run = asyncio.create_task(subject.run())
    while not (len(HELD["asked"]) == 2 and subject._worker.moment()._groups[0].made):
        await turns(1)
    ended = subject._worker.moment()._groups[0].made[0]
    messages = await snapshot(subject)
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    del HELD["go"]
    heir = ListQueue(0)
    successor = replica(scripted(length=6), heir, "one_is_held")
    assert await successor.adopt(*messages.values()) == ["0-0.0"]
    await successor.run()
    assert sorted(HELD["asked"]) == ["0-0.0/0", "0-0.0/1", "0-0.0/1"], "the first was not asked for again"
    (group,) = heir.groups
    assert group.rewards.tolist() == [0.0, 1.0]
    kept = group.rollouts[0]
    assert (kept.end, kept.reward_parts) == (ended.end, {"part": 3.0})
    assert len(kept.trajectories) == len(ended.trajectories) == 2
    for one, other in zip(kept.trajectories, ended.trajectories, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        assert one.logprobs.tolist() == other.logprobs.tolist()
        assert one.versions.tolist() == other.versions.tolist()


async def raises(prompt, policy, context):
    await policy.complete(prompt.token_ids)
    raise ValueError("no such tool")


async def leaves_a_task_behind(prompt, policy, context):
    async def asks_on():
        try:
            while True:
                await policy.complete(prompt.token_ids)
        except RequestRefused as error:
            HELD["refused"].append(str(error))

    HELD["tasks"].append(asyncio.create_task(asks_on()))
    await policy.complete(prompt.token_ids)
    raise ValueError("given up")


async def test_what_an_agent_leaves_running_asks_nothing_more():
    engine = scripted()
    HELD.update(tasks=[], refused=[])
    await replica(engine, ListQueue(1), "leaves_a_task_behind", agent_settings={"on_error": "skip"}).run()
    await asyncio.wait_for(asyncio.gather(*HELD["tasks"]), 10)
    assert HELD["refused"] == ["rollout_budget_exceeded: the rollout has ended"] * 2
    sampled_then = engine.sampled
    await turns(50)
    assert engine.sampled == sampled_then


async def asks_too_much(prompt, policy, context):
    while True:
        await policy.complete(prompt.token_ids)


async def counts(prompt, policy, context):
    """Return the metrics in an Outcome, or in a mapping as programs write it."""
    await policy.complete(prompt.token_ids)
    if context.rollout_id.endswith("0"):
        return Outcome({"reward": 1.0, "exact": 0.5}, metrics={"errors": 3, "steps": np.float32(2), "none": None})
    return {"reward": 0.0, "exact": 0.0, "metrics": {"errors": 1}}


async def test_metrics_are_kept_apart_from_the_parts_of_the_reward():
    queue = ListQueue(1)
    await replica(scripted(), queue, "counts").run()
    (group,) = queue.groups
    assert [dict(r.metrics) for r in decode(encode(group)).rollouts] == [{"errors": 3.0, "steps": 2.0}, {"errors": 1.0}]
    assert [dict(r.reward_parts) for r in group.rollouts] == [{"exact": 0.5}, {"exact": 0.0}]
    meta = GroupMeta.of(group, 100)
    assert (meta.metrics, meta.metric_sums, meta.metric_counts) == (("errors", "steps"), (4.0, 2.0), (2, 1))
    assert meta.reward_parts == ("exact",)
    assert GroupMeta.from_fields(meta.to_fields()) == meta
    assert Excerpt.of(group, 1).metrics == {"errors": 1.0}


async def counts_wrongly(prompt, policy, context):
    return Outcome(1.0, metrics={"errors": "many"})


async def counts_without_names(prompt, policy, context):
    return Outcome(1.0, metrics=[1.0])


async def says_nothing(prompt, policy, context):
    return "good"


async def gives_up(prompt, policy, context):
    return Outcome(0.0, end="abandoned")


def plain(prompt, policy, context):
    return 1.0


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("raises", r"prompt 0-0 \(dataset row 1\): raised ValueError: no such tool"),
        ("asks_too_much", r"a request was refused \(rollout_budget_exceeded: .*\); catch RequestRefused"),
        ("says_nothing", "returned 'good'"),
        ("counts_wrongly", "returned 'many' .*under the key 'errors'"),
        ("counts_without_names", "returned metrics of type list; expected a mapping"),
        ("plain", "is not async; define it with async def"),
    ],
)
async def test_an_agent_that_fails_is_named_and_fails_the_run_or_its_group(name, match):
    settings = {"max_turns": 3}
    with pytest.raises(AgentFailure, match=rf"rollout\.agent\.function {__name__}:{name}, .*{match}"):
        await replica(scripted(), ListQueue(1), name, agent_settings=settings).run()
    queue = ListQueue(1)
    await replica(scripted(), queue, name, agent_settings={**settings, "on_error": "skip"}).run()
    assert (queue.groups, queue.failed) == ([], [("0-0.0", "agent")])


async def test_a_group_in_which_no_agent_asked_anything_is_given_up():
    queue = ListQueue(1)
    await replica(scripted(), queue, "gives_up").run()
    assert (queue.groups, queue.failed) == ([], [("0-0.0", "engine")])


async def one_of_two(prompt, policy, context):
    if context.rollout_id.endswith("1"):
        return Outcome(-1.0, end="abandoned")
    await policy.complete(prompt.token_ids)
    return 1.0


async def test_an_agent_that_asked_nothing_counts_in_the_baseline():
    queue = ListQueue(1)
    await replica(scripted(), queue, "one_of_two", agent_settings={}).run()
    (group,) = queue.groups
    assert [(len(r.trajectories), r.end) for r in group.rollouts] == [(1, "done"), (0, "abandoned")]
    assert group.rewards.tolist() == [1.0, -1.0]


async def no_reward(prompt, policy, context):
    await policy.complete(prompt.token_ids)
    return None if context.rollout_id.endswith("1") else 1.0


async def test_a_rollout_without_a_reward_is_left_out():
    queue = ListQueue(1)
    settings = agent("no_reward")
    settings["rollout"] |= {"n": 3, "min_group_size": 2}
    subject, _ = worker(scripted(), queue, **settings)
    await subject.run()
    assert [rollout.rollout_id for rollout in queue.groups[0].rollouts] == ["0-0.0/0", "0-0.0/2"]


async def test_agents_are_filtered_by_their_rewards():
    queue = ListQueue(1)
    settings = agent("one_of_two")
    settings["rollout"]["filter"] = {"mean_reward": [0.5, 1.0]}
    subject, _ = worker(scripted(), queue, **settings)
    await subject.run()
    assert queue.filtered == [("0-0.0", "mean_reward")]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rollout": {"environment": {"function": "a:b"}}}, r"and rollout\.environment\.function is a:b"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(change, match):
    tree = {"model": {"path": "m"}, "data": {"train": "t.jsonl", **change.get("data", {})}}
    tree["rollout"] = {"agent": {"function": f"{__name__}:talks"}, **change.get("rollout", {})}
    with pytest.raises(ConfigError, match=match):
        validate(tree)


def test_the_doctor_imports_it():
    tree = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    for name, status in (("talks", "ok"), ("missing", "FAIL"), ("encode_text", "FAIL")):
        config = validate({**tree, "rollout": {"agent": {"function": f"{__name__}:{name}"}}})
        (found,) = [check for check in functions(config) if check.name == "rollout.agent.function"]
        assert found.status == status


def test_an_outcome_is_plain_data():
    rest = {"end": None, "trainable": True, "metrics": {}, "turn_rewards": None}
    assert dataclasses.asdict(Outcome(1.0)) == {"reward": 1.0, **rest}
    assert np.isfinite(Outcome(0.5).reward)
