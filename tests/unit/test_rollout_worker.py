"""A replica with a scripted engine and queue: interruption, resumption, stamps, completeness of groups.

The same paths with the real engine and queue are in tests/integration/test_pipeline.py.
"""

import asyncio
import threading

import numpy as np
import pytest

from async_rl.config.loading import validate
from async_rl.errors import EngineDied, EngineError, EnvironmentFailure, RewardError, RewardNotApplicable
from async_rl.queue.records import Ticket
from async_rl.rollout import aside, in_flight, routing_policies
from async_rl.rollout.actor import RolloutReplica
from async_rl.rollout.engine.interface import EngineOutput, Score
from async_rl.runtime import manifest
from async_rl.types import Prompt, RoutingSpec
from async_rl.weights.buckets import checksum
from tests.support.scripted_engine import Layout, Script, ScriptedEngine

EOS = 0
ROUTING = RoutingSpec(num_moe_layers=2, top_k=2, num_experts=4)


LAYOUT = Layout(ROUTING, frozenset({EOS}), vocab_size=10_000)


def scripted(length: int = 12, kind: type[ScriptedEngine] = ScriptedEngine, max_response_tokens: int = 40):
    """An engine that samples one token per turn of the event loop: 1, 2, 3, ... and EOS as the last of ``length``.

    The log-prob of a token names the version that sampled it, as the routing does.
    """
    config = validate(
        {
            "model": {"path": "model"},
            "data": {"train": "train.jsonl"},
            "rollout": {"max_response_tokens": max_response_tokens},
        }
    )
    return kind(config, script=Script(length=length, logprob=lambda version: -0.5 - version, layout=LAYOUT))


class ListQueue:
    """Hands out ``count`` tickets and keeps what is put."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.groups = []
        self.failed = []
        self.returned = []

    async def take(self, worker, limit):
        tickets = []
        while self.left and len(tickets) < limit:
            self.left -= 1
            prompt = Prompt(f"0-{self.left}", self.left + 1, "abc", np.array([5, 6, 7], dtype=np.int32))
            tickets.append(Ticket(f"{prompt.prompt_id}.0", prompt, 0))
        return tickets

    async def put(self, group) -> None:
        self.groups.append(group)

    async def fail(self, group_id, reason) -> None:
        self.failed.append((group_id, reason))

    async def return_group(self, group_id, reason) -> None:
        self.returned.append((group_id, reason))


class Digits:
    """A tokenizer and a reward in one: text is the token ids, the reward their count."""

    error: Exception | None = None

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))

    async def score(self, prompt, response):
        if self.error is not None:
            raise self.error
        return float(len(response.split()))

    def close(self) -> None:
        """Nothing to close."""


def worker(engine, queue, mode="resume", environment=None, digits=None, **settings):
    tree = {
        "model": {"path": "model"},
        "data": {"train": "train.jsonl"},
        "rollout": {"n": 2, "max_num_seqs": 4, "max_response_tokens": 40},
        "async_training": {"partial_rollout": {"mode": mode}},
        **settings,
    }
    digits = digits or Digits()
    return RolloutReplica(validate(tree), 0, queue, engine, digits, digits, environment), digits


async def snapshot(replica):
    """The messages of all groups in flight, by id."""
    return {group_id: message async for group_id, message in replica._worker.moment().messages()}


async def push(worker, engine) -> None:
    """What a sync does to a worker and its engine."""
    await worker.pause()
    engine.version += 1
    await worker.wake()
    await worker.resume()


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def sampled(engine, more: int) -> None:
    """Until the engine has sampled that many more tokens."""
    goal = engine.sampled + more
    while engine.sampled < goal:
        await asyncio.sleep(0)


async def test_all_groups_are_published_complete():
    engine, queue = scripted(), ListQueue(5)
    subject, _ = worker(engine, queue)
    await subject.run()
    assert len(queue.groups) == 5
    assert all(len(group.trajectories) == 2 for group in queue.groups)
    assert {t.finish_reason for g in queue.groups for t in g.trajectories} == {"stop"}


@pytest.mark.parametrize("cuts", [1, 2, 4])
async def test_invariant_2_and_7_interrupted_generations_resume_with_true_stamps(cuts):
    engine, queue = scripted(length=30), ListQueue(2)
    subject, _ = worker(engine, queue)
    run = asyncio.create_task(subject.run())
    for _ in range(cuts):
        await sampled(engine, 4 * 5)
        await push(subject, engine)
    await run
    assert len(queue.groups) == 2
    for trajectory in (t for group in queue.groups for t in group.trajectories):
        assert trajectory.response_ids.tolist() == [*range(1, 30), EOS]
        assert len(trajectory.segments) == cuts + 1
        # The scripted log-prob names the version that sampled the token.
        assert trajectory.versions.tolist() == (-0.5 - trajectory.logprobs).astype(int).tolist()
        # Replaced, not concatenated: every row is of the last call.
        assert (trajectory.routed_experts[:, 0, 0] == cuts % 4).all()
    # A resumed call sends prompt and tokens so far, and may sample only what is left of the budget.
    for _, sent, budget in engine.requests:
        assert sent - 3 + budget == 40


async def test_drain_finishes_what_runs_before_the_push():
    engine, queue = scripted(length=20), ListQueue(2)
    subject, _ = worker(engine, queue, mode="drain")
    run = asyncio.create_task(subject.run())
    await sampled(engine, 8)
    await push(subject, engine)
    await run
    assert all(not t.is_partial for group in queue.groups for t in group.trajectories)
    assert all(t.oldest_version == 0 for group in queue.groups for t in group.trajectories)


class Answers:
    """An environment that answers each turn with two tokens, until ``turns`` have been answered."""

    error: Exception | None = None

    def __init__(self, turns: int) -> None:
        self.turns, self.heard = turns, []

    async def answer(self, prompt, turns, texts):
        if self.error is not None:
            raise self.error
        self.heard.append([turn.tolist() for turn in turns])
        return np.array([90, 91], dtype=np.int32) if len(turns) // 2 < self.turns else None

    def close(self) -> None:
        """Nothing to close."""


class TurnEngine(ScriptedEngine):
    """Ends each turn after four tokens, whatever was said before."""

    def last_position(self, trajectory_id, response):
        answered = [i for i, token in enumerate(response) if token == 91]
        return (answered[-1] + 1 if answered else 0) + 3


@pytest.mark.parametrize(("routing", "cuts"), [("replace", 0), ("replace", 3), ("preserve", 3), ("exact", 3)])
async def test_an_environment_answers_each_turn_and_interruptions_do_not_matter(routing, cuts):
    engine, queue, environment = scripted(kind=TurnEngine), ListQueue(2), Answers(turns=2)
    partial = {"partial_rollout": {"routing": routing}}
    subject, _ = worker(engine, queue, environment=environment, async_training=partial)
    run = asyncio.create_task(subject.run())
    for _ in range(cuts):
        await sampled(engine, 10)
        await push(subject, engine)
    await run
    for trajectory in (t for group in queue.groups for t in group.trajectories):
        sampled_ids = trajectory.response_ids[trajectory.sampled].tolist()
        assert trajectory.response_ids[~trajectory.sampled].tolist() == [90, 91] * 2
        assert sampled_ids.count(EOS) == 3
        assert len(trajectory.response_ids) == 3 * 4 + 2 * 2
        assert np.isnan(trajectory.logprobs[~trajectory.sampled]).all()
    assert [len(turns) for turns in environment.heard].count(5) == 4, "the third turn of each of four responses"


class Waits(Answers):
    """An environment of which every call waits until the test lets it go."""

    def __init__(self) -> None:
        super().__init__(turns=1)
        self.let_go = asyncio.Event()

    async def answer(self, prompt, turns, texts):
        answer = await super().answer(prompt, turns, texts)
        await self.let_go.wait()
        return answer


@pytest.mark.parametrize(("limit", "waiting"), [(None, 4), (8, 8)])
async def test_trajectories_that_wait_for_tools_leave_the_engine_to_others(limit, waiting):
    engine, queue, environment = scripted(kind=TurnEngine), ListQueue(10), Waits()
    limits = {"n": 2, "max_num_seqs": 4, "max_response_tokens": 40, "max_trajectories": limit}
    subject, _ = worker(engine, queue, environment=environment, rollout=limits)
    run = asyncio.create_task(subject.run())
    await turns(500)
    assert len(environment.heard) == waiting, "as many as the replica may have unfinished, and no more"
    environment.let_go.set()
    await run
    assert len(queue.groups) == 10


async def test_the_last_turn_is_not_answered():
    engine, queue, environment = scripted(kind=TurnEngine, max_response_tokens=400), ListQueue(1), Answers(turns=100)
    limits = {"n": 2, "max_num_seqs": 4, "max_response_tokens": 400, "environment": {"max_turns": 3}}
    subject, _ = worker(engine, queue, environment=environment, rollout=limits)
    await subject.run()
    for trajectory in queue.groups[0].trajectories:
        assert (trajectory.response_ids == EOS).sum() == 3
        assert trajectory.response_ids[-1] == EOS


async def test_environment_failure_ends_the_run_or_the_group_as_configured():
    for on_error in ("fail", "skip"):
        engine, queue, environment = scripted(kind=TurnEngine), ListQueue(2), Answers(turns=1)
        environment.error = EnvironmentFailure("environment f: prompt 0-1: raised KeyError")
        limits = {"n": 2, "max_num_seqs": 4, "max_response_tokens": 40, "environment": {"on_error": on_error}}
        subject, _ = worker(engine, queue, environment=environment, rollout=limits)
        if on_error == "fail":
            with pytest.raises(EnvironmentFailure, match="raised KeyError"):
                await subject.run()
        else:
            await subject.run()
            assert sorted(queue.failed) == [("0-0.0", "environment"), ("0-1.0", "environment")]


async def test_nothing_is_begun_while_paused():
    engine, queue = scripted(), ListQueue(2)
    subject, _ = worker(engine, queue)
    await subject.pause()
    run = asyncio.create_task(subject.run())
    await turns(20)
    assert engine.requests == []
    await subject.wake()
    await turns(20)
    assert engine.requests == []  # the canary may compute, rollouts may not
    await subject.resume()
    await run
    assert len(queue.groups) == 2


class Receiver(ScriptedEngine):
    """Takes weights in the order of the calls; hangs in ``stuck``."""

    stuck = None

    def __getattribute__(self, name):
        if name not in ("start_weight_update", "update_weights", "finish_weight_update"):
            return super().__getattribute__(name)

        async def call(*arguments):
            self.received.append((name, *arguments))
            if name == self.stuck:
                await asyncio.Event().wait()

        return call


async def test_staged_weights_are_taken_in_one_call_and_a_call_that_hangs_in_it_is_named():
    engine = scripted(kind=Receiver)
    engine.received = []
    subject, _ = worker(engine, ListQueue(0))
    await subject.pause()
    await subject.receive({"round": 3}, 7)
    calls = [name for name, *_ in engine.received]
    assert calls == ["start_weight_update", "update_weights", "finish_weight_update"]
    assert engine.received[1][1].update_info == {"round": 3}
    assert (engine.version, await subject.unanswered()) == (7, None)
    engine.stuck = "update_weights"
    receiving = asyncio.ensure_future(subject.receive({"round": 4}, 8))
    await turns(5)
    assert (engine.version, await subject.unanswered()) == (7, "update_weights")
    receiving.cancel()


async def test_reward_failure_ends_the_run_or_the_group_as_configured():
    engine, queue = scripted(), ListQueue(2)
    subject, digits = worker(engine, queue)
    digits.error = RewardError("reward f: prompt 0-1: returned nan")
    with pytest.raises(RewardError, match="returned nan"):
        await subject.run()
    assert queue.groups == []

    engine, queue = scripted(), ListQueue(2)
    subject, digits = worker(engine, queue, reward={"on_error": "skip"})
    digits.error = RewardError("reward f: prompt 0-1: returned nan")
    await subject.run()
    assert sorted(queue.failed) == [("0-0.0", "reward"), ("0-1.0", "reward")]


async def test_stop_gives_up_what_runs():
    engine, queue = scripted(length=1000, max_response_tokens=2000), ListQueue(2)
    subject, _ = worker(engine, queue, rollout={"n": 2, "max_num_seqs": 4, "max_response_tokens": 2000})
    run = asyncio.create_task(subject.run())
    await sampled(engine, 8)
    await subject.stop()
    await asyncio.wait_for(run, 5)
    assert queue.groups == []


async def test_an_engine_that_dies_during_a_push_ends_the_run(monkeypatch):
    monkeypatch.setattr("async_rl.rollout.engine.liveness._PERIOD_S", 0.01)
    engine, queue = scripted(length=1000, max_response_tokens=2000), ListQueue(2)
    subject, _ = worker(engine, queue, rollout={"n": 2, "max_num_seqs": 4, "max_response_tokens": 2000})
    run = asyncio.create_task(subject.run())
    await sampled(engine, 8)
    await subject.pause()
    engine.dead = True
    with pytest.raises(EngineError, match="the engine died"):
        await asyncio.wait_for(run, 5)


async def test_counts_tokens_and_busy_time():
    engine, queue = scripted(length=12), ListQueue(3)
    subject, _ = worker(engine, queue)
    run = asyncio.create_task(subject.run())
    await sampled(engine, 8)
    await push(subject, engine)
    await run
    stats = subject.stats()
    assert stats.generated_tokens == 3 * 2 * 12
    assert stats.trajectories == 6
    assert stats.partial_rollouts > 0
    assert stats.resumed_prefill_tokens > 0
    assert stats.running_trajectories == 0
    assert 0 < stats.busy_s < 60


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


class Scorer(ScriptedEngine):
    """Scores with any weights, and not while it is paused."""

    async def score(self, sequences):
        assert self._running.is_set()
        self.scored = ["score"]
        return [Score(np.zeros(len(s) - 1, np.float32), np.zeros((len(s) - 1, 2, 2), np.uint8)) for s in sequences]


class ScorerOnResume(Scorer):
    async def resume_and_score(self, sequences):
        await self.resume()
        scores = await self.score(sequences)
        self.scored = ["resume_and_score"]
        return scores


@pytest.mark.parametrize(("kind", "call"), [(Scorer, "score"), (ScorerOnResume, "resume_and_score")])
async def test_a_paused_replica_is_scored_at_once_where_its_engine_can(kind, call, monkeypatch):
    monkeypatch.setattr("async_rl.rollout.actor.check_probe", lambda rows, lengths, spec: checked.append(lengths))
    checked = []
    engine = scripted(kind=kind)
    subject, _ = worker(engine, ListQueue(0))
    await subject.pause()
    (score,) = await subject.wake_and_score([np.arange(5, dtype=np.int32)])
    assert len(score.logprobs) == 4
    assert (engine.scored, checked) == ([call], [[5]])
    assert not subject._gate.is_open, "rollouts wait for the canary"


@pytest.mark.parametrize("kind", [Scorer, ScorerOnResume])
async def test_routed_experts_of_a_probe_are_sent_with_its_scores_or_kept_where_they_are_large(kind, monkeypatch):
    monkeypatch.setattr("async_rl.rollout.actor.check_probe", lambda *_: None)
    subject, _ = worker(scripted(kind=kind), ListQueue(0))
    small, large = ([np.arange(n, dtype=np.int32)] * 2 for n in (100, 10_000))
    for sequences, kept in ((small, False), (large, True), (small, False)):
        await subject.pause()
        scores = await subject.wake_and_score(sequences)
        rows = await subject.probed_routing()
        assert [len(score.logprobs) for score in scores] == [len(s) - 1 for s in sequences]
        if kept:
            assert [score.routed_experts for score in scores] == [None, None]
            assert [score.left_behind for score in scores] == [checksum(each) for each in rows]
            assert [len(each) for each in rows] == [9_999, 9_999]
        else:
            assert [(len(score.routed_experts), score.left_behind) for score in scores] == [(99, None)] * 2
            assert rows == []


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
    settings = {"n": 2, "max_response_tokens": 40, "stop_token_ids": frozenset({EOS}), "routing_policy": "replace"}
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
    assert [t.reward for t in heir.groups[0].trajectories] == [8.0, 8.0]
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


class Straggler(ScriptedEngine):
    """Never finishes a response whose request is named in ``stuck``."""

    stuck = ()

    async def generate(self, request_id, *arguments, **keywords) -> EngineOutput:
        if request_id.startswith(self.stuck):
            await asyncio.sleep(3600)
        return await super().generate(request_id, *arguments, **keywords)


@pytest.mark.parametrize(("needed", "handed_in"), [(2, True), (3, False), (None, False)])
async def test_a_group_over_its_time_is_handed_in_short_or_its_prompt_goes_back(needed, handed_in):
    engine, queue = scripted(kind=Straggler), ListQueue(2)
    engine.stuck = ("0-0.0/1",)
    settings = {"n": 3, "max_num_seqs": 6, "max_response_tokens": 40, "group_timeout_s": 0.05}
    subject, _ = worker(engine, queue, rollout=settings | ({"min_group_size": needed} if needed else {}))
    await subject.run()
    sizes = {group.group_id: len(group.trajectories) for group in queue.groups}
    assert sizes == ({"0-1.0": 3, "0-0.0": 2} if handed_in else {"0-1.0": 3})
    assert queue.returned == ([] if handed_in else [("0-0.0", "timeout")])
    assert await snapshot(subject) == {}
    assert subject.stats().cut_groups == handed_in


class SomeFail(Digits):
    """Fails to score the first so many responses, of those that it is asked for."""

    def __init__(self, failures):
        self.failures = list(failures)

    async def score(self, prompt, response):
        if self.failures:
            raise self.failures.pop()
        return await super().score(prompt, response)


FAILED, NOT_APPLICABLE = RewardError("busy"), RewardNotApplicable("returned None")


@pytest.mark.parametrize(
    ("failures", "needed", "on_error", "published"),
    [
        ([FAILED], 2, "skip", 2),
        ([FAILED, NOT_APPLICABLE], 2, "skip", None),
        ([FAILED], None, "skip", None),
        ([NOT_APPLICABLE], 2, "fail", 2),
        ([NOT_APPLICABLE], None, "fail", None),
        ([EngineError("refused")], 2, "fail", 2),
    ],
)
async def test_a_response_that_fails_is_left_out_if_its_group_can_do_without_it(failures, needed, on_error, published):
    engine, queue = scripted(), ListQueue(1)
    rollout = {"n": 3, "max_num_seqs": 3, "max_response_tokens": 40, "min_group_size": needed}
    subject, _ = worker(engine, queue, digits=SomeFail(failures), rollout=rollout, reward={"on_error": on_error})
    await subject.run()
    assert [len(group.trajectories) for group in queue.groups] == ([published] if published else [])
    assert queue.failed == ([] if published else [("0-0.0", "reward")])
    assert subject.stats().cut_groups == bool(published)


async def test_a_reward_that_fails_ends_the_run_if_the_settings_say_so_whatever_the_group_can_do_without():
    rollout = {"n": 3, "max_num_seqs": 3, "max_response_tokens": 40, "min_group_size": 2}
    subject, _ = worker(scripted(), ListQueue(1), digits=SomeFail([FAILED]), rollout=rollout)
    with pytest.raises(RewardError, match="busy"):
        await subject.run()


async def test_time_for_which_the_engine_is_paused_is_not_the_groups_time():
    engine, queue = scripted(length=30), ListQueue(2)
    subject, _ = worker(engine, queue, rollout={"n": 2, "max_response_tokens": 40, "group_timeout_s": 1.0})
    run = asyncio.create_task(subject.run())
    await sampled(engine, 8)
    await subject.pause()
    await asyncio.sleep(1.3)
    await subject.wake()
    await subject.resume()
    await run
    assert len(queue.groups) == 2
    assert queue.returned == []


async def test_an_engine_that_hangs_is_taken_for_dead_but_not_during_a_push(monkeypatch):
    monkeypatch.setattr("async_rl.rollout.engine.liveness._PERIOD_S", 0.01)
    engine, queue = scripted(kind=Straggler), ListQueue(2)
    engine.stuck = "0-"
    subject, _ = worker(engine, queue, watchdog={"stall_s": 0.05})
    run = asyncio.create_task(subject.run())
    await asyncio.sleep(0.2)
    assert not run.done()
    subject._gate.close()  # what a push begins with
    engine.hangs = True
    await asyncio.sleep(0.2)
    assert not run.done(), "loading weights takes its time"
    subject._gate.open()
    with pytest.raises(EngineDied, match="has not answered for"):
        await asyncio.wait_for(run, 5)
    assert len(await snapshot(subject)) == 2, "what is in flight can be handed over"


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
    settings = {"n": 2, "max_response_tokens": 40, "stop_token_ids": frozenset({EOS}), "routing_policy": "replace"}
    saved = [in_flight.decode(message, **settings) for message in (await saving).values()]
    assert sum(group.num_tokens for group in saved) == engine.sampled
    await subject.wake()
    await subject.resume()
    await run
    assert len(queue.groups) == 2


async def test_a_request_that_the_engine_refuses_costs_its_group_only():
    engine, queue = scripted(), ListQueue(5)
    subject, _ = worker(engine, queue)
    generate = engine.generate

    async def refuses_one(request_id, *arguments):
        if request_id.startswith("0-3.0/1"):
            raise EngineError("replica 0: this request cannot be")
        return await generate(request_id, *arguments)

    engine.generate = refuses_one
    await subject.run()
    assert sorted(group.group_id for group in queue.groups) == ["0-0.0", "0-1.0", "0-2.0", "0-4.0"]
    assert queue.failed == [("0-3.0", "engine")]


async def test_an_answer_that_breaks_an_invariant_costs_its_group_only():
    engine, queue = scripted(), ListQueue(3)
    subject, _ = worker(engine, queue)
    generate = engine.generate

    async def spoils_one(request_id, *arguments):
        output = await generate(request_id, *arguments)
        if request_id.startswith("0-1.0/0"):
            output.logprobs[0] = np.nan
        return output

    engine.generate = spoils_one
    await subject.run()
    assert len(queue.groups) == 2
    assert queue.failed == [("0-1.0", "engine")]


async def test_tokens_of_calls_under_way_are_progress():
    engine, queue = scripted(length=40), ListQueue(1)
    subject, _ = worker(engine, queue)
    run = asyncio.create_task(subject.run())
    seen = []
    for _ in range(3):
        await sampled(engine, 2)
        seen.append((subject.stats().sampled_tokens, subject.stats().generated_tokens))
    assert seen == sorted(set(seen)), "they grow"
    assert {generated for _, generated in seen} == {0}, "although no call has ended"
    await run
