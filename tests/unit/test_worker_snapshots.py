"""What of a replica is handed over in the middle of responses: to a checkpoint, or to the next worker."""

import asyncio
import threading

import pytest

from async_rl.config.inputs import Terms
from async_rl.errors import RewardError
from async_rl.rollout import aside, in_flight, routing_policies
from async_rl.runtime import manifest
from tests.support.played import MODULE
from tests.support.scripted_engine import ScriptedEngine
from tests.support.scripted_replica import EOS, ListQueue, push, sampled, scripted, snapshot, turns, worker

TERMS = Terms("train", 40)
SETTINGS = {"n": 2, "terms": lambda _: TERMS, "stop_token_ids": frozenset({EOS}), "routing_policy": "replace"}
LONG = {"n": 2, "max_num_seqs": 4, "max_response_tokens": 40}


@pytest.mark.parametrize("routing", ["replace", "preserve", "exact"])
async def test_another_worker_goes_on_with_groups_as_they_stood(routing):
    """Invariants 1, 2, 3 and 7 across a hand-over in the middle of responses."""
    partial = {"async_training": {"partial_rollout": {"routing": routing}}}
    engine, queue = scripted(length=30), ListQueue(3)
    subject, _ = worker(engine, queue, **partial)
    run = asyncio.create_task(subject.run())
    await sampled(engine, 20)
    await push(subject, engine)
    await sampled(engine, 20)
    await subject.pause()
    messages = await snapshot(subject)
    run.cancel()
    sampled_before = engine.sampled
    handed_in = len(queue.groups)

    other, heir = scripted(length=30), ListQueue(0)
    other.version = 2
    successor, _ = worker(other, heir, **partial)
    adopted = await successor.adopt(*messages.values())
    assert len(adopted) == 3 - handed_in - queue.left > 0
    await successor.run()
    assert sorted(group.group_id for group in heir.groups) == sorted(adopted)
    for trajectory in (t for group in heir.groups for t in group.trajectories):
        assert trajectory.response_ids.tolist() == [*range(1, 30), EOS]
        assert trajectory.versions.tolist() == (-0.5 - trajectory.logprobs).astype(int).tolist()
        assert {0, 2} <= set(trajectory.versions.tolist())
    total = 30 * 2 * (len(heir.groups) + handed_in)
    assert other.sampled == total - sampled_before, "what was sampled before is not sampled again"


@pytest.fixture
def may_check(monkeypatch):
    """An event without which no answer of an engine is checked, and so none is merged; all are checked in threads."""
    monkeypatch.setattr(aside, "_SMALL_BYTES", 0)
    may_check, check = threading.Event(), routing_policies.check

    def slow_check(*arguments, **keywords):
        may_check.wait(5)
        check(*arguments, **keywords)

    monkeypatch.setattr(routing_policies, "check", slow_check)
    return may_check


async def test_a_checkpoint_has_the_groups_of_its_moment_although_the_engine_has_resumed(may_check, tmp_path):
    """Answers that were being merged when the engine resumed are in it, and nothing that was sampled later."""
    engine, queue = scripted(length=30), ListQueue(2)
    subject, _ = worker(engine, queue)
    run = asyncio.create_task(subject.run())
    await sampled(engine, 8)
    await subject.pause()
    at_the_moment = engine.sampled
    await subject.freeze(6)
    engine.version += 1
    await subject.wake()
    await subject.resume()
    writing = asyncio.create_task(subject.write_in_flight(6, tmp_path / "in_flight"))
    await asyncio.sleep(0.01)
    assert not writing.done()
    may_check.set()
    await run
    assert len(queue.groups) == 2, "the worker has finished them meanwhile"
    saved = await writing
    assert sorted(saved) == ["0-0.0", "0-1.0"]
    files = {group_id: tmp_path / "in_flight" / group.file for group_id, group in saved.items()}
    assert manifest.find_altered(tmp_path / "in_flight", dict(saved.values())) is None

    other, heir = scripted(length=30), ListQueue(0)
    other.version = 1
    successor, _ = worker(other, heir)
    gone = tmp_path / "gone"
    assert await successor.adopt(*files.values(), gone) == list(files)
    partials = [p for group in successor._worker._adopted for p in group.partials if p is not None]
    assert sum(len(partial.response_ids) for partial in partials) == at_the_moment
    assert {version for partial in partials for version in partial.versions.tolist()} == {0}
    await successor.run()
    assert other.sampled == 30 * 2 * 2 - at_the_moment
    assert sorted(group.group_id for group in heir.groups) == sorted(files)


async def test_a_checkpoint_has_what_was_being_merged_of_rollouts_with_environments(may_check, tmp_path):
    """Also of turns that had just begun; and nothing of an agent's that begins again is taken for a response."""
    agents = {
        "state": {"environment": f"{MODULE}:Wordy", "inline": True, "recovery": "state"},
        "restart": {"environment": f"{MODULE}:Wordy", "inline": True},
    }
    for kind, agent in agents.items():
        may_check.clear()
        engine = scripted(length=30)
        subject, digits = worker(engine, ListQueue(2), rollout=LONG | {"agent": agent})
        digits.encode = lambda text, add_special_tokens=False: [90]
        run = asyncio.create_task(subject.run())
        await sampled(engine, 8)
        await subject.pause()
        at_the_moment = engine.sampled
        saving = asyncio.create_task(snapshot(subject))
        if kind == "state":
            await turns(20)
            assert not saving.done()
            may_check.set()
        groups = [in_flight.decode(each, **SETTINGS) for each in (await saving).values()]
        assert sum(group.num_tokens for group in groups) == (at_the_moment if kind == "state" else 0)
        assert all(partial is None for group in groups for partial in group.partials)
        may_check.set()
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        await subject.shutdown()


class Late(ScriptedEngine):
    """Stops at once, and hands out what its calls have sampled when ``may_answer`` is set."""

    async def generate(self, *arguments, **named):
        output = await super().generate(*arguments, **named)
        if output.finish_reason == "abort":
            await self.may_answer.wait()
        return output

    async def pause(self, mode):
        self._running.clear()
        self._aborting = True
        self._moving.set()


async def test_a_pause_does_not_wait_for_what_calls_have_sampled_but_a_checkpoint_does(tmp_path):
    engine, queue = scripted(length=30, kind=Late), ListQueue(2)
    engine.may_answer = asyncio.Event()
    subject, _ = worker(engine, queue)
    run = asyncio.create_task(subject.run())
    await sampled(engine, 8)
    await asyncio.wait_for(subject.pause(end_calls=True), 1)
    assert subject._gate.calls
    freezing = asyncio.ensure_future(subject.freeze(1))
    await turns(20)
    assert not freezing.done()
    engine.may_answer.set()
    await freezing
    engine.version = 1
    await subject.wake()
    await subject.resume()
    saved = await subject.write_in_flight(1, tmp_path)
    settings = {
        "n": 2,
        "terms": lambda _: Terms("train", 40),
        "stop_token_ids": frozenset({EOS}),
        "routing_policy": "replace",
    }
    groups = [in_flight.decode((tmp_path / group.file).read_bytes(), **settings) for group in saved.values()]
    assert sum(group.num_tokens for group in groups) >= 8
    await run
    for trajectory in (t for group in queue.groups for t in group.trajectories):
        assert trajectory.versions.tolist() == (-0.5 - trajectory.logprobs).astype(int).tolist()


async def test_a_moment_that_was_not_written_makes_way_for_the_next(tmp_path):
    engine, queue = scripted(length=30), ListQueue(1)
    subject, _ = worker(engine, queue)
    run = asyncio.create_task(subject.run())
    await sampled(engine, 4)
    await subject.freeze(4)
    await subject.freeze(6)
    with pytest.raises(RuntimeError, match=r"freeze\(4\) must be called"):
        await subject.write_in_flight(4, tmp_path)
    run.cancel()


async def test_a_scored_response_is_not_scored_again_by_the_next_worker():
    engine, queue = scripted(length=8), ListQueue(1)
    subject, _ = worker(engine, queue)
    queue.put = lambda group: asyncio.sleep(3600)  # the queue is full
    run = asyncio.create_task(subject.run())
    await sampled(engine, 16)
    await turns(20)
    message = await snapshot(subject)
    run.cancel()

    other, heir = scripted(), ListQueue(0)
    successor, strict = worker(other, heir)
    strict.error = RewardError("asked again")
    await successor.adopt(*message.values())
    await successor.run()
    assert [rollout.reward for rollout in heir.groups[0].rollouts] == [8.0, 8.0]
    assert other.sampled == 0


async def test_groups_that_do_not_fit_the_settings_of_now_are_left_out():
    engine, queue = scripted(length=30), ListQueue(2)
    subject, _ = worker(engine, queue)
    run = asyncio.create_task(subject.run())
    await sampled(engine, 20)
    await subject.pause()
    messages = await snapshot(subject)
    run.cancel()
    for changed in (
        {"rollout": LONG | {"n": 4, "max_num_seqs": 4}},
        {"rollout": LONG | {"max_response_tokens": 2}},
        {"async_training": {"partial_rollout": {"routing": "exact"}}},
    ):
        successor, _ = worker(scripted(), ListQueue(0), **changed)
        assert await successor.adopt(*messages.values()) == []
    one, other = messages
    messages[one][-1] ^= 1
    successor, _ = worker(scripted(), ListQueue(0))
    assert await successor.adopt(*messages.values()) == [other]


async def test_a_pause_does_not_wait_until_the_answers_are_checked_but_a_snapshot_does(may_check):
    engine, queue = scripted(length=30), ListQueue(2)
    subject, _ = worker(engine, queue)
    run = asyncio.create_task(subject.run())
    await sampled(engine, 8)
    await subject.pause()
    saving = asyncio.create_task(snapshot(subject))
    await turns(20)
    assert not may_check.is_set()
    assert not saving.done()
    may_check.set()
    settings = {
        "n": 2,
        "terms": lambda _: Terms("train", 40),
        "stop_token_ids": frozenset({EOS}),
        "routing_policy": "replace",
    }
    saved = [in_flight.decode(message, **settings) for message in (await saving).values()]
    assert sum(group.num_tokens for group in saved) == engine.sampled
    await subject.wake()
    await subject.resume()
    await run
    assert len(queue.groups) == 2
