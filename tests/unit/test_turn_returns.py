"""Rewards of an agent's turns: from what the agent returns over the wire to the advantage of each token."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.config.loading import validate
from async_rl.config.training import LossSection
from async_rl.errors import AgentFailure, ConfigError, InvalidTrajectory, TrainerError
from async_rl.queue.codec import decode, encode
from async_rl.rollout.evaluation import EvalProblem
from async_rl.rollout.outcome import Outcome
from async_rl.trainer.advantages import load_advantages, turn_return
from async_rl.trainer.credit import with_credit
from async_rl.trainer.samples import samples_of
from async_rl.types import NOT_SAMPLED, Group, Prompt, RolloutRecord, Segment, Trajectory
from tests.support.scripted_engine import ScriptedEngine
from tests.support.scripted_replica import ListQueue, push, sampled, scripted, worker

PROMPT = Prompt("0-1", 1, "a", np.array([1, 2], np.int32))
TREE = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}


def reference(rewards, discount):
    """The definition, written down turn by turn."""
    returns = [
        [sum(discount ** (j - i) * own[j] for j in range(i, len(own))) for i in range(len(own))] for own in rewards
    ]
    every = [value for own in returns for value in own]
    return [[value - sum(every) / len(every) for value in own] for own in returns]


@given(
    st.lists(st.lists(st.floats(-5, 5), max_size=6), min_size=1, max_size=5).filter(any),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_a_turns_advantage_is_its_discounted_return_minus_the_mean_over_all_turns(rewards, discount):
    found = turn_return([np.array(own, np.float64) for own in rewards], discount)
    assert [values.dtype for values in found] == [np.float32] * len(rewards)
    for values, expected in zip(found, reference(rewards, discount), strict=True):
        assert values == pytest.approx(expected, abs=1e-5)


def test_equal_returns_are_advantages_of_exactly_zero():
    assert not any(values.any() for values in turn_return([np.array([0.1]), np.array([0.1]), np.array([0.1])], 0.3))


def trajectory(name, lengths, prompt=3, version=4):
    """A trajectory of turns of so many tokens, each but the last followed by two others."""
    versions, segments = [], []
    for length in lengths:
        versions += [NOT_SAMPLED] * 2 if versions else []
        segments.append(Segment(len(versions), len(versions) + length, version))
        versions += [version] * length
    versions = np.array(versions, np.int32)
    return Trajectory(
        trajectory_id=name,
        prompt_ids=np.arange(prompt, dtype=np.int32),
        response_ids=np.arange(len(versions), dtype=np.int32),
        logprobs=np.where(versions == NOT_SAMPLED, np.nan, -1).astype(np.float32),
        versions=versions,
        segments=tuple(segments),
        finish_reason="stop",
    )


A = RolloutRecord(
    "a",
    9.0,
    (trajectory("a", (4, 2)), trajectory("a.1", (3, 1), 6)),
    turns=((0, 3), (1, 2)),
    turn_rewards={0: 1.0, 2: -2.0},
)
B = RolloutRecord("b", 0.0, (trajectory("b", (5,)),), turns=((0,),), turn_rewards={0: 4.0})
JUDGE = RolloutRecord("judge", 0.0, (trajectory("judge", (2,)),), trainable=False)
GROUP = Group("0-1.0", PROMPT, (A, B, JUDGE))


@pytest.mark.parametrize("per_segment", [False, True])
def test_every_sampled_token_of_a_turn_gets_the_turns_advantage_in_whichever_trajectory_it_is(per_segment):
    group = decode(encode(GROUP))
    assert [rollout.turns for rollout in group.rollouts] == [((0, 3), (1, 2)), ((0,),), ()]
    assert [dict(rollout.turn_rewards) for rollout in group.rollouts] == [{0: 1.0, 2: -2.0}, {0: 4.0}, {}]
    settings = LossSection(advantage="turn_return", turn_discount=0.5)
    trained = [t for rollout in group.trainable for t in rollout.trajectories]
    samples = [s for t in trained for s in samples_of(t, oldest_version=3, per_segment=per_segment)]
    assert len(samples) == (5 if per_segment else 3)
    found = with_credit(
        [(group, samples)], settings, load_advantages(settings), max_response_tokens=64, sum_over_data=None
    ).samples
    turns_of_a, (turn_of_b,) = reference([[1.0, 0.0, -2.0, 0.0], [4.0]], 0.5)
    assert turns_of_a[0] == 1.0 - 0.25 * 2 - (0.5 - 1 - 2 + 0 + 4) / 5
    expected = {
        "a": [turns_of_a[0]] * 4 + [turns_of_a[3]] * 2,
        "a.1": [turns_of_a[1]] * 3 + [turns_of_a[2]] * 1,
        "b": [turn_of_b] * 5,
    }
    counted = {name: [] for name in expected}
    for sample in found:
        counted[sample.trajectory_id] += sample.advantages[sample.loss_mask].tolist()
    assert {name: pytest.approx(values) for name, values in expected.items()} == counted


def test_a_group_whose_turns_are_not_known_is_refused_by_name():
    settings = LossSection(advantage="turn_return")
    group = replace(GROUP, rollouts=(A, replace(B, turns=(), turn_rewards={})))
    samples = [s for t in group.trajectories for s in samples_of(t, oldest_version=3)]
    with pytest.raises(TrainerError, match=r"rollout b: its trajectories have \[1\] turns, of which \[\] are known"):
        with_credit([(group, samples)], settings, None, max_response_tokens=64, sum_over_data=None)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: replace(B, turn_rewards={1: 0.0}), r"rollout b: turns .* and rewards of turns {1: 0\.0} for 1 traj"),
        (lambda: replace(B, turn_rewards={0: float("inf")}), "rewards of turns {0: inf}"),
        (lambda: replace(A, turns=((0, 3), (1, 3))), r"rollout a: turns \(\(0, 3\), \(1, 3\)\)"),
        (lambda: replace(A, trajectories=(*A.trajectories, *B.trajectories)), "for 3 trajectories"),
    ],
)
def test_turns_that_cannot_be_are_refused_by_name(make, match):
    with pytest.raises(InvalidTrajectory, match=match):
        make()


def test_settings_without_rewards_of_turns_are_refused():
    with pytest.raises(ConfigError, match=r"advantage is turn_return, but only agents .*set rollout\.agent\.function"):
        validate({**TREE, "trainer": {"loss": {"advantage": "turn_return"}}})
    with pytest.raises(ConfigError, match=r"turn_discount is 0\.9, but trainer\.loss\.advantage is grpo"):
        validate({**TREE, "trainer": {"loss": {"turn_discount": 0.9}}})


# -- what an agent returns -----------------------------------------------------------------------------------------


class TurnEngine(ScriptedEngine):
    """Ends each turn after six tokens; tokens from 90 on are not the policy's."""

    def last_position(self, trajectory_id, response):
        others = [i for i, token in enumerate(response) if token >= 90]
        return (others[-1] + 1 if others else 0) + 5


def replica(queue, name, engine=None, **agent):
    rollout = {"n": 2, "max_num_seqs": 4, "max_response_tokens": 40}
    rollout["agent"] = {"function": f"{__name__}:{name}", **agent}
    loss = {"advantage": "turn_return"}
    subject, _ = worker(engine or scripted(kind=TurnEngine), queue, rollout=rollout, trainer={"loss": loss})
    return subject


async def branches(prompt, policy, context):
    """One turn, then three at one time, rewarded by how far their tokens add up."""
    first = await policy.complete(prompt.token_ids)
    said = [*prompt.token_ids, *first.token_ids]
    replies = [first, *await asyncio.gather(*(policy.complete([*said, 90 + i]) for i in range(3)))]
    rewards = {reply.index: float(reply.context_tokens) for reply in replies}
    if context.rollout_id.endswith("0"):
        return Outcome(1.0, turn_rewards=rewards)
    return {"reward": 0.0, "turn_rewards": {str(index): reward for index, reward in rewards.items()}}  # as in JSON


async def test_the_turns_of_a_session_keep_their_numbers_whatever_interrupts_them():
    engine, queue = scripted(kind=TurnEngine), ListQueue(1)
    subject = replica(queue, "branches", engine)
    run = asyncio.create_task(subject.run())
    for _ in range(2):
        await sampled(engine, 10)
        await push(subject, engine)
    await run
    (group,) = queue.groups
    assert any(t.is_partial for t in group.trajectories)
    for rollout in decode(encode(group)).rollouts:
        assert sorted(turn for turns in rollout.turns for turn in turns) == [0, 1, 2, 3]
        assert rollout.turn_rewards.keys() == {0, 1, 2, 3}
        for t, turns in zip(rollout.trajectories, rollout.turns, strict=True):
            starts = np.flatnonzero(np.diff(t.sampled, prepend=False) & t.sampled)
            rewards = [rollout.turn_rewards[turn] for turn in turns]
            assert rewards == (len(t.prompt_ids) + starts).tolist(), "those of these very turns"


async def none_given(prompt, policy, context):
    await policy.complete(prompt.token_ids)
    return 1.0


async def empty(prompt, policy, context):
    await policy.complete(prompt.token_ids)
    return Outcome(1.0, turn_rewards={})


async def beyond(prompt, policy, context):
    await policy.complete(prompt.token_ids)
    return Outcome(1.0, turn_rewards={1: 1.0})


async def no_number(prompt, policy, context):
    await policy.complete(prompt.token_ids)
    return Outcome(1.0, turn_rewards={0: "good"})


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "none_given",
            "returned no turn_rewards, which trainer.loss.advantage turn_return compares; return an Outcome",
        ),
        ("beyond", "returned a reward for turn 1, but the rollout had 1 turns"),
        ("no_number", "returned 'good' .*under the key '0'"),
    ],
)
async def test_an_agent_without_rewards_of_its_turns_is_named_and_may_cost_its_group(name, match):
    with pytest.raises(AgentFailure, match=rf"rollout\.agent\.function {__name__}:{name}, prompt 0-0 .*: {match}"):
        await replica(ListQueue(1), name).run()
    queue = ListQueue(1)
    await replica(queue, name, on_error="skip").run()
    assert (queue.groups, queue.failed) == ([], [("0-0.0", "agent")])


async def test_no_turn_need_have_a_reward_and_an_evaluation_needs_none():
    queue = ListQueue(1)
    subject = replica(queue, "empty")
    await subject.run()
    assert [dict(rollout.turn_rewards) for rollout in queue.groups[0].rollouts] == [{}, {}]
    subject = replica(ListQueue(0), "none_given")
    terms = subject._config.terms("")
    (answer,) = (await subject.evaluate([EvalProblem(terms, PROMPT)])).answers
    assert answer.scored.rewards == (1.0,)
