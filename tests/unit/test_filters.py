"""Groups that teach nothing: which they are, what a worker does with them, and that no crash loses or repeats one."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.config.loading import validate
from async_rl.config.rollouts import FilterSection
from async_rl.doctor.inputs import functions
from async_rl.errors import ConfigError, RewardError
from async_rl.rollout.filters import FinishedGroup, GroupFilter
from async_rl.rollout.responses import load_filter
from async_rl.rollout.rewards.score import Score
from async_rl.types import Prompt
from tests.support.examples import examples
from tests.support.queue_parts import make_broker, meta
from tests.support.scripted_replica import Digits, ListQueue, scripted, snapshot, worker
from tests.support.simulation import cursor

PROMPT = Prompt("0-7", 7, "text", np.array([1], dtype=np.int32))


def group(*rewards, cut=()):
    reasons = tuple("length" if n in cut else "stop" for n in range(len(rewards)))
    return FinishedGroup(PROMPT, rewards, ({},) * len(rewards), reasons, (5,) * len(rewards))


def long_answers(group):
    return sum(group.response_tokens) > 100


def raises(group):
    raise ValueError("no such column")


def says_nothing(group):
    """Return None, as a function without a return does."""


def as_numpy(group):
    return np.float32(group.mean_reward) > 0.5


@pytest.mark.parametrize(
    ("settings", "judged", "reason"),
    [
        ({}, group(1.0, 1.0), None),
        ({"zero_variance": True}, group(0.3, 0.3, 0.3), "zero_variance"),
        ({"zero_variance": True}, group(0.3, 0.3, 0.31), None),
        ({"all_truncated": True}, group(0.0, 1.0, cut=(0, 1)), "all_truncated"),
        ({"all_truncated": True}, group(0.0, 1.0, cut=(0,)), None),
        ({"all_truncated": True, "zero_variance": True}, group(0.0, 0.0, cut=(0, 1)), "all_truncated"),
        ({"mean_reward": [0.25, 0.75]}, group(0.0, 0.5), None),
        ({"mean_reward": [0.25, 0.75]}, group(0.5, 1.0), None),
        ({"mean_reward": [0.25, 0.75]}, group(0.0, 0.0, 0.5), "mean_reward"),
        ({"mean_reward": [0.25, 0.75]}, group(1.0, 0.51), "mean_reward"),
        ({"function": f"{__name__}:long_answers"}, group(1.0, 0.0), "function"),
        ({"function": f"{__name__}:as_numpy"}, group(1.0, 0.5), None),
        ({"function": f"{__name__}:as_numpy"}, group(0.0, 0.5), "function"),
        ({"function": f"{__name__}:long_answers", "zero_variance": True}, group(1.0, 1.0), "zero_variance"),
    ],
)
def test_what_is_filtered_and_why(settings, judged, reason):
    assert load_filter(FilterSection(**settings)).reason(judged) == reason


@pytest.mark.parametrize(
    ("function", "says"),
    [(raises, "raised ValueError: no such column"), (says_nothing, "returned None; expected true")],
)
def test_a_function_that_fails_is_named_with_the_row(function, says):
    settings = FilterSection(function=f"{__name__}:{function.__name__}")
    with pytest.raises(RewardError, match=rf"rollout\.filter\.function .*:{function.__name__}, row 7: {says}"):
        GroupFilter(settings, function).reason(group(1.0))


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"rollout\.filter\.function.*has no function 'missing'"):
        load_filter(FilterSection(function=f"{__name__}:missing"))
    tree = {"model": {"path": "m"}, "data": {"train": "d"}, "rollout": {"filter": {"mean_reward": [0.9, 0.1]}}}
    with pytest.raises(ConfigError, match=r"rollout\.filter\.mean_reward is \[0\.9, 0\.1\].*swap"):
        validate(tree)
    tree["rollout"]["filter"] = {"function": f"{__name__}:missing"}
    (found,) = [check for check in functions(validate(tree)) if check.name == "rollout.filter.function"]
    assert found.status == "FAIL"
    tree["rollout"]["filter"] = {"rest_epochs": 2}
    with pytest.raises(ConfigError, match=r"rollout\.filter\.rest_epochs is 2, but no group is filtered"):
        validate(tree)


# -- the worker ------------------------------------------------------------------------------------------------------


class Right(Digits):
    """Scores each response by the rewards of its prompt's row, in the order in which they end."""

    def __init__(self, by_row):
        self.by_row = {row: list(rewards) for row, rewards in by_row.items()}

    async def score(self, prompt, response, source):
        return Score(float(self.by_row[prompt.row].pop()))


FILTER = {"zero_variance": True, "rest_epochs": 3}
ROLLOUT = {"n": 2, "max_num_seqs": 4, "max_response_tokens": 40, "filter": FILTER}


async def test_a_filtered_group_is_not_published_and_makes_room_for_others():
    queue = ListQueue(5)
    digits = Right({1: (1, 1), 2: (0, 1), 3: (0, 0), 4: (0, 0), 5: (1, 0)})
    subject, _ = worker(scripted(), queue, digits=digits, rollout=ROLLOUT)
    await subject.run()
    assert sorted(queue.filtered) == [(f"0-{n}.0", "zero_variance") for n in (0, 2, 3)]
    assert sorted(group.group_id for group in queue.groups) == ["0-1.0", "0-4.0"]
    assert (queue.failed, queue.returned, subject.stats().groups) == ([], [], 2)
    assert queue.rests == [3, 3, 3]
    assert await snapshot(subject) == {}


async def test_a_group_may_have_one_response():
    queue = ListQueue(2)
    rollout = {"n": 1, "max_num_seqs": 4, "max_response_tokens": 40}
    trainer = {"loss": {"advantage": "reinforce_plus_plus"}}
    subject, _ = worker(scripted(), queue, rollout=rollout, trainer=trainer)
    await subject.run()
    assert [len(group.trajectories) for group in queue.groups] == [1, 1]


async def test_by_default_groups_without_variance_are_trained():
    queue = ListQueue(2)
    subject, _ = worker(scripted(), queue, digits=Right({1: (1, 1), 2: (0, 0)}))
    await subject.run()
    assert (len(queue.groups), queue.filtered) == (2, [])


async def test_rewards_are_judged_before_their_penalty_for_length_also_after_a_hand_over():
    settings = {"rollout": ROLLOUT, "reward": {"overlong_tokens": 35}}
    queue = ListQueue(1)

    def lengths(trajectory):
        return 20 + 10 * int(trajectory[-1])

    subject, _ = worker(scripted(length=lengths), queue, digits=Right({1: (1, 1)}), **settings)

    async def lost(*_):
        raise ConnectionError("the worker dies before the queue hears of it")

    queue.filter_group = lost
    with pytest.raises(ConnectionError):
        await subject.run()
    (message,) = (await snapshot(subject)).values()
    heir = ListQueue(0)
    successor, _ = worker(scripted(length=lengths), heir, digits=Right({}), **settings)
    assert await successor.adopt(message) == ["0-0.0"]
    (adopted,) = successor._worker._adopted
    assert len({score.reward for score in adopted.scores}) == 2, "the longer response has less"
    await successor.run()
    assert (heir.filtered, heir.groups) == ([("0-0.0", "zero_variance")], [])


@pytest.mark.parametrize("on_error", ["fail", "skip"])
async def test_a_function_that_raises_costs_the_run_or_the_group_as_a_reward_does(on_error):
    queue = ListQueue(1)
    rollout = ROLLOUT | {"filter": {"function": f"{__name__}:raises"}}
    subject, _ = worker(scripted(), queue, rollout=rollout, reward={"on_error": on_error})
    if on_error == "fail":
        with pytest.raises(RewardError, match=r"rollout\.filter\.function"):
            await subject.run()
    else:
        await subject.run()
    assert queue.failed == ([] if on_error == "fail" else [("0-0.0", "reward")])


# -- the books -------------------------------------------------------------------------------------------------------


def restored(state, rows):
    broker = make_broker(cursor(rows), window_limit=4, can_rewind=True)
    broker.restore(json.loads(json.dumps(state)))
    return broker


def test_a_filtered_group_frees_its_place_at_once_and_its_prompt_is_done_for_the_epoch():
    broker = make_broker(cursor(5), window_limit=4)
    first = broker.issue("w", 9)
    assert (len(first), broker.free_slots) == (4, 0)
    for ticket in first[:3]:
        broker.filter_group(ticket.group_id, "zero_variance")
    assert broker.free_slots == 3
    more = broker.issue("w", 9)
    assert [ticket.group_id.partition("-")[0] for ticket in more] == ["0", "1", "1"], "the next epoch begins"
    counts = broker.counts()
    assert (counts.issued, counts.outstanding, counts.filtered, counts.add_up) == (7, 4, 3, True)
    assert broker.stats().filtered == {"zero_variance": 3}


def test_invariant_5_a_restore_repeats_no_group_that_was_filtered_and_loses_none_that_was_not():
    """A checkpoint between two filtered groups: the books say which of them comes again."""
    broker = make_broker(cursor(8), window_limit=4, can_rewind=True)
    before, after, queued, _ = tickets = broker.issue("w", 4)
    broker.filter_group(before.group_id, "zero_variance")
    broker.put(meta(queued))
    state = broker.state()
    broker.filter_group(after.group_id, "zero_variance")

    again = restored(state, 8)
    assert again.counts() == restored(again.state(), 8).counts()
    # Its worker had finished the first one in the moment that was saved; only the others are resumed.
    assert again.adopt("v", [ticket.group_id for ticket in tickets]) == [tickets[1].group_id, tickets[3].group_id]
    again.filter_group(after.group_id, "mean_reward")
    assert again.stats().filtered == {"zero_variance": 1, "mean_reward": 1}
    issued = [ticket.prompt.prompt_id for _ in range(2) for ticket in again.issue("v", 9)]
    assert not {before.prompt.prompt_id, after.prompt.prompt_id} & set(issued)
    assert again.counts().add_up


def test_a_trainer_that_rewinds_leaves_filtered_groups_filtered():
    broker = make_broker(cursor(9), window_limit=4, can_rewind=True)
    first, second, *_ = broker.issue("w", 4)
    broker.put(meta(first))
    broker.ack([group.group_id for group in broker.lease(1, "trainer")], 1)
    broker.filter_group(second.group_id, "zero_variance")
    assert broker.rewind(0) == [first.prompt.prompt_id]
    assert (broker.counts().filtered, broker.counts().add_up) == (1, True)


def test_states_of_earlier_releases_have_filtered_nothing():
    broker = make_broker(cursor(9))
    broker.issue("w", 2)
    state = broker.state()
    del state["filtered"]
    again = restored(state, 9)
    assert (again.counts().filtered, again.counts().add_up) == (0, True)


# -- rows that rest --------------------------------------------------------------------------------------------------


def test_the_row_of_a_filtered_group_is_passed_over_for_some_epochs():
    source = cursor(3, shuffle=False)
    broker = make_broker(source, window_limit=99)
    first, second, *_ = broker.issue("w", 4)  # one of the next epoch already
    broker.filter_group(first.group_id, "zero_variance", 1)
    broker.filter_group(second.group_id, "zero_variance", 2)
    assert [t.prompt.prompt_id for t in broker.issue("w", 6)] == ["1-3", "2-1", "2-3", "3-1", "3-2", "3-3"]
    assert source.state()["resting"] == [], "what has rested is forgotten"


def test_where_all_rows_rest_none_does():
    broker = make_broker(cursor(2, shuffle=False), window_limit=99)
    for ticket in broker.issue("w", 2):
        broker.filter_group(ticket.group_id, "zero_variance", 10**4)
    assert [t.prompt.prompt_id for t in broker.issue("w", 3)] == ["2-1", "2-2", "3-1"]


@given(
    moves=st.lists(st.tuples(st.sampled_from(["next", "rest", "restart"]), st.integers(0, 3)), max_size=40),
    rows=st.integers(1, 4),
)
@settings(max_examples=examples(40), deadline=None)
def test_a_row_is_issued_once_in_each_epoch_in_which_it_does_not_rest(moves, rows):
    subject, twin = cursor(rows), cursor(rows)  # the twin is never restored
    until, issued = {}, []
    for move, epochs in moves:
        if move == "restart":
            state = json.loads(json.dumps(subject.state()))
            subject = cursor(rows, seed=9)
            subject.restore(state)
        elif move == "next":
            prompt = subject.next()
            assert prompt.prompt_id == twin.next().prompt_id
            issued.append(prompt)
            assert until.get(prompt.row, 0) <= int(prompt.prompt_id.partition("-")[0]), "it rests"
        elif issued and issued[-1].row > 1:  # the first row never rests
            prompt = issued[-1]
            for each in (subject, twin):
                each.rest(prompt, epochs)
            until[prompt.row] = max(until.get(prompt.row, 0), int(prompt.prompt_id.partition("-")[0]) + epochs + 1)
        assert subject.state() == twin.state()
    ids = [prompt.prompt_id for prompt in issued]
    assert len(set(ids)) == len(ids)
    epoch = subject.state()["epoch"]
    awake = [line for line in range(1, rows + 1) if line not in until]
    assert {f"{e}-{line}" for e in range(epoch) for line in awake} <= set(ids), "a row that is awake was skipped"
