"""What the driver reads of the groups that it trains: metadata, and of messages only what it writes down."""

import json
import time
from dataclasses import astuple, replace
from types import SimpleNamespace

import msgpack
import numpy as np
import pytest
import structlog

from async_rl.config.loading import validate
from async_rl.config.operation import QueueSection
from async_rl.driver import recorder as recorder_module
from async_rl.driver.recorder import Recorder
from async_rl.driver.run_state import RunState
from async_rl.driver.samples import Samples
from async_rl.driver.watchdog import RunSnapshot
from async_rl.errors import PayloadLost
from async_rl.queue import codec
from async_rl.queue.records import Excerpt, GroupMeta
from async_rl.rollout.evaluation import EvalAnswer, ScoredResponse
from async_rl.rollout.stats import WorkerStats
from async_rl.types import Group, Prompt, RolloutRecord, Segment, Trajectory
from tests.support.queue_parts import make_broker
from tests.support.step_records import eval_results, step_report


def rollout(name, reward, stops=(3,)):
    starts = (0, *stops[:-1])
    trajectory = Trajectory(
        trajectory_id=name,
        prompt_ids=np.array([1, 2], np.int32),
        response_ids=np.arange(stops[-1], dtype=np.int32),
        logprobs=np.zeros(stops[-1], np.float32),
        versions=np.repeat(np.arange(len(stops)), np.diff([0, *stops])).astype(np.int32),
        segments=tuple(Segment(a, b, version) for version, (a, b) in enumerate(zip(starts, stops, strict=True))),
        finish_reason="stop",
    )
    parts = {"format": reward} if reward != 0.3 else {"format": 0.25, "right": 1.0}
    return RolloutRecord.of(trajectory, reward, parts)


def group(number):
    prompt = Prompt(f"0-{number}", number + 1, f"prompt {number}", np.array([1, 2], np.int32))
    name = f"0-{number}.0"
    return Group(name, prompt, (rollout(f"{name}/0", number / 10), rollout(f"{name}/1", 0.5, (2, 5))))


class Store:
    """Stands in for the Fetcher: a payload is a number of a group."""

    def __init__(self, _config):
        self.messages_read, self.excerpts_read = [], []

    def messages(self, payloads):
        self.messages_read += payloads.values()
        return {group_id: codec.encode(group(number)) for group_id, number in payloads.items()}

    def groups(self, payloads):
        return [codec.decode(message) for message in self.messages(payloads).values()]

    def excerpts(self, chosen):
        self.excerpts_read += [(number, index) for _, number, index in chosen]
        return [Excerpt.of(group(number), index) for _, number, index in chosen]


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    def make(**settings):
        monkeypatch.setattr(recorder_module, "Fetcher", Store)
        tree = {
            "name": "run",
            "runs": str(tmp_path),
            "model": {"path": "model"},
            "data": {"train": "train.jsonl"},
            "metrics": {"samples_per_step": settings.pop("samples", 2)},
            **settings.pop("tree", {}),
            "debug": {"dump_trajectories": settings.pop("dumped", 0)},
        }
        made.append(Recorder(validate(tree), time.monotonic(), lambda ids: "".join(map(str, ids))))
        return made[-1]

    made = []
    yield make
    for each in made:
        each.__exit__()


def leased(count):
    return [(GroupMeta.of(group(number), 100), number) for number in range(count)]


def test_metadata_says_what_a_step_record_says_and_survives_the_journal():
    meta = GroupMeta.of(group(3), 100)
    assert (meta.rewards, meta.response_tokens, meta.lengths) == ((0.3, 0.5), (3, 5), (5, 7))
    assert (meta.segments, meta.interruptions, meta.finish_reasons) == ((1, 2), (0, 1), ("stop", "stop"))
    assert (meta.reward_parts, meta.part_sums, meta.part_counts) == (("format", "right"), (0.75, 1.0), (2, 1))
    fields = msgpack.unpackb(msgpack.packb(astuple(meta)))
    assert GroupMeta.from_fields(fields) == meta
    assert GroupMeta.from_fields(fields[:9]).rewards == ()  # as release 0.1 wrote it


def test_a_step_is_recorded_without_any_message(recorder):
    one = recorder()
    one.training_begins()
    one.record_step(1, 0, [step_report()], one.described(leased(3)), step_s=1.0)
    (row,) = [json.loads(line) for line in (one.checkpoints.parent / "metrics.jsonl").read_text().splitlines()]
    assert row["reward_mean"] == pytest.approx((0.0 + 0.1 + 0.2 + 3 * 0.5) / 6)
    assert one._fetcher.messages_read == one._fetcher.excerpts_read == []


def test_metadata_of_the_last_release_is_completed_from_the_groups(recorder):
    one = recorder()
    whole = leased(3)
    old = [(GroupMeta.from_fields(astuple(meta)[:9]), number) for meta, number in whole[:2]]
    assert one.described([*old, whole[2]]) == [meta for meta, _ in whole]
    assert one._fetcher.messages_read == [0, 1]


def test_samples_are_spread_over_the_prompts_and_only_dumped_groups_are_read_whole(recorder):
    one = recorder(samples=2, dumped=1)
    samples = one.samples.read(leased(4))
    assert one._fetcher.excerpts_read == [(0, 0), (2, 0)]
    assert one._fetcher.messages_read == [3]
    one.samples.write(7, 5, samples)
    folder = one.checkpoints.parent
    written = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["trajectory"], line["response"]) for line in written] == [
        (7, "0-0.0/0", "012"),
        (7, "0-2.0/0", "012"),
    ]
    assert codec.decode((folder / "trajectories" / "0-3.0.group").read_bytes()).group_id == "0-3.0"


def test_a_rollout_of_which_two_trajectories_were_chosen_is_written_once(recorder):
    one = recorder()
    branch = Excerpt("0-1.0/0.1", "p", np.array([1], np.int32), ((0, 1, 7),), 1.0, "stop", rollout_id="0-1.0/0")
    others = [replace(branch, trajectory_id=name, rollout_id=of) for name, of in (("0-1.0/0", "0-1.0/0"), ("x", "x"))]
    one.samples.write(7, 5, Samples([branch, *others], {}))
    text = (one.checkpoints.parent / "samples.jsonl").read_text()
    assert [json.loads(line)["trajectory"] for line in text.splitlines()] == ["0-1.0/0", "x"]


@pytest.mark.parametrize("backend", ["memory", "redis"])
async def test_samples_of_a_lost_group_are_not_written_and_the_run_goes_on(recorder, monkeypatch, backend):
    def lost(_):
        raise PayloadLost(["0-1.0"])

    one = recorder()
    one.samples._config = one._config.model_copy(update={"queue": QueueSection(backend=backend)})
    monkeypatch.setattr(one._fetcher, "excerpts", lost)
    groups = leased(2)
    with structlog.testing.capture_logs() as lines:
        await one.samples.before_ack(groups)
        await one.samples.begin(1, 0, groups)
        await one.samples.finished()
    assert {line["event"] for line in lines} == {"samples_not_read"}
    assert "0-1.0" in lines[-1]["reason"]


def excerpt(ids, segments):
    return Excerpt("t", "p" * 500, np.array(ids, np.int32), segments, 1.0, "stop")


def test_sampled_text_is_written_once_and_of_a_long_one_beginning_and_end(recorder):
    one = recorder()
    one.samples._config = one._config.model_copy(
        update={"metrics": one._config.metrics.model_copy(update={"sample_characters": 100})}
    )
    whole = one.samples._readable(excerpt([1, 2, 3], ((0, 3, 7),)))
    assert (whole["response"], whole["segments"]) == ("123", [{"version": 7}])
    turns = one.samples._readable(excerpt([1, 2, 3, 4], ((0, 2, 7), (3, 4, 8))))
    assert turns["segments"] == [{"version": 7, "text": "12"}, {"version": 8, "text": "4"}]
    long = one.samples._readable(excerpt([1] * 1000, ((0, 400, 7), (400, 1000, 8))))
    assert long["response"] == "1" * 50 + " [... 900 characters ...] " + "1" * 50
    assert long["prompt"] == "p" * 50 + " [... 400 characters ...] " + "p" * 50
    assert sum(len(segment["text"]) for segment in long["segments"]) < 200


def test_an_excerpt_shows_where_a_response_was_resumed():
    excerpt = Excerpt.of(group(1), 1)
    assert excerpt.segments == ((0, 2, 0), (2, 5, 1))
    assert excerpt.prompt == "prompt 1"


def test_a_long_response_or_evaluation_is_no_standstill(recorder, monkeypatch):
    now = iter((0.0, 100.0, 250.0, 300.0))
    one = recorder()
    monkeypatch.setattr(recorder_module, "time", SimpleNamespace(monotonic=lambda: next(now)))
    queue, snapshot = make_broker().stats(), RunSnapshot("evaluation", 0.0, 0, 4, {}, None)
    stalled = [one.update_counts(queue, [WorkerStats(0, sampled_tokens=n)], snapshot) for n in (10, 20, 20, 30)]
    assert stalled == [0.0, 0.0, 150.0, 0.0]


def test_a_long_step_of_a_trainer_that_gets_its_groups_in_parts_is_no_standstill(recorder, monkeypatch):
    """With the budget full nothing else moves: no group comes or ends, and no token is sampled."""
    now = iter((0.0, 1000.0, 2000.0, 3000.0))
    one = recorder()
    monkeypatch.setattr(recorder_module, "time", SimpleNamespace(monotonic=lambda: next(now)))
    queue, worker = make_broker().stats(), WorkerStats(0, sampled_tokens=10)
    parts = [RunSnapshot("update", 0.0, 0, 4, {}, None, computed=n) for n in (1, 2, 3, 3)]
    assert [one.update_counts(queue, [worker], part) for part in parts] == [0.0, 0.0, 0.0, 1000.0]


def found(step, state, version=None):
    head = {"version": step if version is None else version, "synced": True, "queue": {}, "queued": {}, "in_flight": {}}
    return RunState(step=step, recorder=msgpack.unpackb(msgpack.packb(state), strict_map_key=False), **head)


def lines(one, name):
    path = one.checkpoints.parent / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_restored_run_knows_which_version_was_evaluated(recorder):
    one = recorder()
    assert not one.is_evaluated("held_out", 5, 5)
    one.evaluation(eval_results(0.5), 5, 5)
    state = one.state()
    one._evaluated = {}
    one.restore(found(6, state))
    assert one.is_evaluated("held_out", 5, 5)
    assert not one.is_evaluated("held_out", 5, 6), "a version that came again, with the weights of another step"
    assert not one.is_evaluated("other", 5, 5)


@pytest.mark.parametrize("evaluated", [None, 6])
def test_a_checkpoint_of_an_earlier_release_knows_the_version_of_its_only_set(recorder, evaluated):
    one = recorder()
    old = {key: value for key, value in one.state().items() if key not in ("evaluated_sets", "evals")}
    if evaluated is not None:  # release 0.1 did not write it
        old["evaluated"] = evaluated
    one.restore(found(6, old))
    assert one.is_evaluated("held_out", 6, 6) == (evaluated == 6)


@pytest.mark.parametrize("restart", ["run", "trainer"])
def test_an_evaluation_that_ended_after_its_checkpoint_is_neither_lost_nor_recorded_twice(recorder, restart):
    """Beside rollouts: version 6 is evaluated while steps 7 and 8 are trained, which are undone."""
    one = recorder()
    one.evaluation(eval_results(0.1), 0, 0)
    one.training_begins()
    groups = one.described(leased(1))
    one.record_step(6, 5, [step_report()], groups, step_s=1.0)
    state = one.state()
    for name in ("held_out", "aime"):
        one.evaluation(eval_results(0.5, name), 6, 6)
    one.record_step(7, 6, [step_report()], groups, step_s=1.0)
    one.record_step(8, 7, [step_report()], groups, step_s=1.0)
    one.evaluation(eval_results(0.9), 8, 8)
    if restart == "run":
        one.restore(found(6, state))
    else:
        one.rewind(6, found(6, state).recorder)
    assert one.is_evaluated("held_out", 6, 6)
    assert one.is_evaluated("aime", 6, 6)
    assert not one.is_evaluated("held_out", 8, 8), "its weights are undone"
    one.record_step(7, 6, [step_report()], groups, step_s=1.0)
    one.record_step(8, 7, [step_report()], groups, step_s=1.0)
    rows = {row["step"]: row for row in lines(one, "metrics.jsonl")}
    assert [rows[step]["eval_reward_mean"] for step in (6, 7, 8)] == [None, 0.5, None]
    assert [rows[step]["eval_version"] for step in (6, 7, 8)] == [{}, {"held_out": 6, "aime": 6}, {}]
    recorded = [(line["set"], line["policy_version"]) for line in lines(one, "evals.jsonl")]
    assert recorded == [("held_out", 0), ("held_out", 6), ("aime", 6)]
    assert [line["policy_version"] for line in lines(one, "rewound-evals.jsonl")] == [8]
    one.finish("finished")
    summary = json.loads((one.checkpoints.parent / "summary.json").read_text())
    assert (summary["eval"]["first"], summary["eval"]["last"]) == (0.1, 0.5)
    assert summary["eval_sets"]["aime"]["last"]["policy_version"] == 6
    published = one._metrics.registry.get_sample_value
    assert published("async_rl_eval_avg", {"set": "aime"}) == 0.5
    assert published("async_rl_eval_reward_mean") == 0.5


def test_a_run_that_begins_again_without_a_checkpoint_does_not_evaluate_its_first_version_again(recorder):
    one = recorder()
    one.evaluation(eval_results(0.1), 0, 0)
    one._evaluated = {}
    one.restore(None)
    assert one.is_evaluated("held_out", 0, 0)


def test_responses_of_evaluations_are_written_like_samples(recorder):
    one = recorder()
    prompt = Prompt("eval-aime-3", 3, "p", np.array([1, 2], np.int32))
    response = ScoredResponse(np.array([7, 8], np.int32), 1.0, "stop")
    one.eval_sample(prompt, EvalAnswer("aime", "eval-aime-3", None), 6, 5)
    one.eval_sample(prompt, EvalAnswer("aime", "eval-aime-3", None, response), 6, 5)
    (line,) = lines(one, "eval_samples.jsonl")
    assert line == {
        "step": 5, "policy_version": 6, "set": "aime", "problem": "eval-aime-3", "row": 3, "prompt": "p",
        "response": "78", "reward": 1.0, "finish_reason": "stop",
    }  # fmt: skip


def test_the_scores_of_checkpoints_are_those_of_one_set_and_the_best_is_in_the_summary(recorder):
    sets = {"aime": {"path": "aime.jsonl", "every": 5}}
    one = recorder(tree={"eval": {"sets": sets}, "checkpoint": {"keep_best": "aime", "every": 5}})
    for step, reward in ((0, 0.9), (5, 0.5), (10, 0.4)):
        one.evaluation(eval_results(reward, "aime"), step + 1, step)
        one.evaluation(eval_results(1.0), step + 1, step)
    assert one.eval_scores() == {0: 0.9, 5: 0.5, 10: 0.4}
    for step in (5, 10):
        (one.checkpoints / f"step-{step:06d}").mkdir()
    one.finish("finished")
    summary = json.loads((one.checkpoints.parent / "summary.json").read_text())
    assert summary["best_checkpoint"].endswith("checkpoints/step-000005")
    assert recorder(tree={"name": "other"}).eval_scores() == {}
