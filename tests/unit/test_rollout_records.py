"""A rollout is what is compared and averaged over, whatever the number of its trajectories: against plain NumPy."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.config.training import LossSection
from async_rl.errors import InvalidTrajectory
from async_rl.queue.codec import decode, encode
from async_rl.queue.records import Excerpt, GroupMeta
from async_rl.trainer import losses
from async_rl.trainer.advantages import load_advantages
from async_rl.trainer.credit import with_credit
from async_rl.trainer.samples import group_samples
from async_rl.trainer.step import Step, masked_tokens
from async_rl.types import NOT_SAMPLED, Group, Prompt, RolloutRecord, Segment, Trajectory
from tests.support.data_ranks import DataRanks
from tests.support.ranks import run_config

LIMIT, VERSION, OLDEST = 64, 5, 3
PROMPT = Prompt("0-1", 1, "a", np.array([1, 2], np.int32))
AGGREGATIONS = ["token_mean", "group_mean", "sequence_mean", "sequence_sum", "fixed_length"]


def trajectory(name, turns, prompt=3, seed=0):
    """Return a trajectory of turns [(tokens, version)], each but the last followed by two tokens of an environment."""
    rng = np.random.default_rng(seed)
    versions, segments, at = [], [], 0
    for number, (tokens, version) in enumerate(turns):
        if number:
            versions += [NOT_SAMPLED] * 2
            at += 2
        versions += [version] * tokens
        segments.append(Segment(at, at + tokens, version))
        at += tokens
    versions = np.array(versions, np.int32)
    return Trajectory(
        trajectory_id=name,
        prompt_ids=rng.integers(0, 50, prompt).astype(np.int32),
        response_ids=rng.integers(0, 50, at).astype(np.int32),
        logprobs=np.where(versions == NOT_SAMPLED, np.nan, -rng.random(at)).astype(np.float32),
        versions=versions,
        segments=tuple(segments),
        finish_reason="stop",
    )


def rollout(name, reward, *lengths, **more):
    trajectories = tuple(
        trajectory(f"{name}:{i}", [(tokens, VERSION - i % 2), (2, VERSION)], 3 + i, seed=len(name) + i)
        for i, tokens in enumerate(lengths)
    )
    return RolloutRecord(name, reward, trajectories, **more)


def group(*rollouts, group_id="0-1.0"):
    return Group(group_id, PROMPT, rollouts)


BRANCHED = group(
    rollout("three", 3.0, 4, 7, 5),
    rollout("one", 1.0, 6),
    rollout("none", 0.0),
    rollout("judge", 100.0, 30, 30, trainable=False),
)


def trained(groups, settings, ranks=1):
    """Return (samples by trajectory, counts of the step, the mean of the tokens' values) over all ranks.

    A token's value is its id times its advantage; the mean is the one that trainer.loss.aggregation names.
    """
    config, crew = run_config("unused"), DataRanks(ranks)

    def of_rank(rank):
        mine = groups[rank::ranks]
        prepared = [(each, group_samples(each, config, oldest_version=OLDEST)) for each in mine]
        credited = with_credit(
            prepared,
            settings,
            load_advantages(settings),
            max_response_tokens=LIMIT,
            sum_over_data=crew.sum_over_data(rank),
        )
        step = Step(VERSION, OLDEST, None, None)
        step.count_groups(mine, credited.samples)
        return credited.samples, step.counts

    parts = crew.run(of_rank)
    samples = [sample for part, _ in parts for sample in part]
    counts = {name: sum(counts[name] for _, counts in parts) for name in parts[0][1]}
    total = sum(float((s.weight * s.advantages * s.token_ids[1:])[s.loss_mask].sum(dtype=np.float64)) for s in samples)
    divisor = losses.denominator(
        settings.aggregation,
        tokens=counts["tokens"],
        rollouts=counts["counting_rollouts"],
        groups=counts["counting_groups"],
    )
    return {sample.trajectory_id: sample for sample in samples}, counts, total / divisor


def values_of(record):
    """The ids of all tokens of a rollout that its policy sampled."""
    return np.concatenate([t.response_ids[t.sampled] for t in record.trajectories]).astype(np.float64)


def reference(groups, settings):
    """The same mean, written down rollout by rollout."""
    of_rollouts, of_groups = [], []
    for each in groups:
        compared = [r for r in each.rollouts if r.trainable]
        rewards = np.array([r.reward for r in compared])
        advantages = rewards - rewards.mean()
        if settings.advantage == "rloo":
            advantages = advantages * len(rewards) / (len(rewards) - 1)
        elif settings.normalize_by_std:
            advantages = advantages / (rewards.std() + 1e-6)
        sampled = [(a, values_of(r)) for a, r in zip(advantages, compared, strict=True) if r.trajectories]
        of_rollouts += [a * values for a, values in sampled]
        of_groups.append(np.concatenate([a * values for a, values in sampled]))
    return {
        "token_mean": np.concatenate(of_rollouts).mean(),
        "group_mean": np.mean([values.mean() for values in of_groups]),
        "sequence_mean": np.mean([values.mean() for values in of_rollouts]),
        "sequence_sum": np.mean([values.sum() for values in of_rollouts]),
        "fixed_length": np.mean([values.sum() / LIMIT for values in of_rollouts]),
    }[settings.aggregation]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("advantage", [{"normalize_by_std": True}, {"normalize_by_std": False}, {"advantage": "rloo"}])
def test_each_aggregation_is_a_mean_over_rollouts(advantage, aggregation, ranks):
    other = group(rollout("x", 1.0, 3), rollout("y", 0.25, 9, 2, 2, 2), group_id="0-2.0")
    settings = LossSection(aggregation=aggregation, **advantage)
    assert trained([BRANCHED, other], settings, ranks)[2] == pytest.approx(reference([BRANCHED, other], settings))


def test_a_rollout_counts_once_in_mean_and_deviation_and_all_its_tokens_get_its_advantage():
    samples, counts, _ = trained([BRANCHED], LossSection())
    rewards = np.array([3.0, 1.0, 0.0])  # that of the judge is left out, that without a trajectory is compared
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    assert samples.keys() == {"three:0", "three:1", "three:2", "one:0"}
    for name, sample in samples.items():
        assert sample.advantages == pytest.approx(np.full(sample.positions, expected[int(name.startswith("one"))]))
    # Four, seven, five and six tokens with two more each; the judge's 64 are masked with a reason of their own.
    assert (counts["tokens"], counts["counting_rollouts"], counts["counting_groups"]) == (6 + 9 + 7 + 8, 2, 1)
    assert masked_tokens(counts, rejected=0.0) == {"stale": 0, "not_sampled": 6 * 2, "not_trainable": 64}


def test_splitting_a_rollout_into_trajectories_changes_the_weight_of_no_token():
    whole = group(rollout("a", 1.0, 8), rollout("b", 0.0, 5))
    (long,) = whole.rollouts[0].trajectories
    halves = (
        trajectory("a:first", [(8, VERSION)]),
        trajectory("a:second", [(2, VERSION)], prompt=len(long.prompt_ids) + 10),
    )
    cut = replace(whole, rollouts=(replace(whole.rollouts[0], trajectories=halves), whole.rollouts[1]))
    for aggregation in AGGREGATIONS:
        settings = LossSection(aggregation=aggregation)
        (before, counts, _), (after, cut_counts, _) = trained([whole], settings), trained([cut], settings)
        assert {before["a:0"].weight} == {after["a:first"].weight, after["a:second"].weight}
        assert before["b:0"].weight == after["b:0"].weight
        assert counts["counting_rollouts"] == cut_counts["counting_rollouts"] == 2


def mean_of_all(rewards):
    return rewards - np.float32(rewards.sum() / 4)


def test_a_users_estimator_gets_one_reward_for_each_rollout():
    samples, *_ = trained([BRANCHED], LossSection(advantage=f"{__name__}:mean_of_all"))
    assert {name: float(s.advantages[0]) for name, s in samples.items()} == {
        **dict.fromkeys(("three:0", "three:1", "three:2"), 2.0),
        "one:0": 0.0,
    }


@given(st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=2, max_size=4), st.integers(0, 2**32 - 1))
def test_reinforce_plus_plus_normalizes_over_the_tokens_of_all_trajectories(lengths, seed):
    if not any(lengths):
        return
    rewards = np.random.default_rng(seed).integers(0, 4, len(lengths)).astype(float)
    made = group(*(rollout(f"r{i}", r, *of) for i, (r, of) in enumerate(zip(rewards, lengths, strict=True))))
    samples, *_ = trained([made], LossSection(advantage="reinforce_plus_plus"))
    centred = rewards - rewards.mean()
    tokens = np.repeat(centred, [sum(n + 2 for n in of) for of in lengths])
    expected = (centred - tokens.mean()) / tokens.std() if tokens.std() > 1e-6 else np.zeros(len(rewards))
    for name, sample in samples.items():
        assert sample.advantages[0] == pytest.approx(expected[int(name[1 : name.index(":")])], abs=1e-5)


def test_truncated_rollouts_stay_in_the_baseline_and_can_be_kept_out_of_the_loss_with_all_their_trajectories():
    made = group(rollout("cut", 2.0, 4, 5, end="truncated"), rollout("whole", 0.0, 6))
    for mask, names in (False, {"cut:0", "cut:1", "whole:0"}), (True, {"whole:0"}):
        config = run_config("unused", trainer__mask_truncated=mask)
        samples = group_samples(made, config, oldest_version=OLDEST)
        assert {sample.trajectory_id for sample in samples} == names
        step = Step(VERSION, OLDEST, None, None)
        step.count_groups([made], samples)
        assert masked_tokens(step.counts, rejected=0.0).get("truncated") == (13 if mask else None)
        credited = with_credit(
            [(made, samples)],
            LossSection(),
            load_advantages(LossSection()),
            max_response_tokens=LIMIT,
            sum_over_data=None,
        )
        assert credited.samples[-1].advantages[0] == pytest.approx(-1, abs=1e-5)


def test_what_the_queue_knows_of_a_group_is_by_rollout_and_by_trajectory():
    made = decode(
        encode(group(rollout("a", 2.0, 4, 7, reward_parts={"x": 1.0}), rollout("b", 1.0), *BRANCHED.rollouts))
    )
    meta = GroupMeta.of(made, 10)
    assert meta.rewards == (2.0, 1.0, 3.0, 1.0, 0.0)
    assert (meta.reward_parts, meta.part_sums, meta.part_counts) == (("x",), (1.0,), (1,))
    assert meta.num_trajectories == len(meta.lengths) == 2 + 3 + 1 + 2
    assert [Excerpt.of(made, i).reward for i in range(meta.num_trajectories)] == [2, 2, 3, 3, 3, 1, 100, 100]
    assert Excerpt.of(made, 1).reward_parts == {"x": 1.0}


def test_the_queue_knows_how_rollouts_end_their_turns_and_what_their_forks_repeat():
    first, edited, other = (trajectory(name, [(4, VERSION), (2, VERSION)], seed=3) for name in "abc")
    # The prompt of the fork is all of the first up to its second turn, but for the last token.
    shared = np.concatenate([first.prompt_ids, first.response_ids])[:8]
    fork = replace(edited, prompt_ids=np.append(shared, np.int32(99)))
    nested = replace(other, prompt_ids=np.concatenate([fork.prompt_ids, fork.response_ids[:3]]))
    root = replace(trajectory("d", [(1, VERSION)]), prompt_ids=np.append(first.prompt_ids[:1], np.int32(77)))
    agent = RolloutRecord("agent", 1.0, (first, fork, nested, root), end="abandoned")
    made = group(agent, rollout("plain", 0.0, 5, end="truncated"), rollout("none", 0.0))
    meta = GroupMeta.of(made, 10)
    assert meta.repeated_tokens == 8 + (9 + 3) + 1
    assert (meta.ends, meta.branches) == (("abandoned", "truncated", "done"), (4, 1, 0))
    assert meta.turns == (2 + 2 + 2 + 1, 2, 0)
    assert GroupMeta.from_fields(meta.to_fields()) == meta
    assert GroupMeta.from_fields(meta.to_fields()[:-4]).ends == (), "as the release before wrote it"


def test_tokens_that_are_not_trained_do_not_make_a_group_old():
    old = replace(rollout("judge", 0.0, trainable=False), trajectories=(trajectory("old", [(3, 0)]),))
    made = group(rollout("a", 1.0, 4), old)
    assert made.oldest_version == VERSION
    assert made.num_tokens == 3 + 4 + 2 + 2 + 3 + 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: group(), "group 0-1.0: no trajectories to train in 0 rollouts"),
        (lambda: group(rollout("a", 1.0)), "no trajectories to train in 1 rollouts"),
        (lambda: group(rollout("a", 1.0), rollout("b", 1.0, 3, trainable=False)), "to train in 2 rollouts"),
        (lambda: group(rollout("a", 1.0, 3), rollout("a", 1.0)), "group 0-1.0: an id is there twice in a, a"),
        (lambda: group(rollout("a", 1.0, 3), replace(rollout("a", 1.0, 3), rollout_id="b")), "twice in a:0, a:0"),
        (lambda: rollout("a", float("nan"), 3), "rollout a: reward is nan"),
        (lambda: rollout("a", 1.0, 3, end="over"), "rollout a: end is 'over', not one of"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(make, message):
    with pytest.raises(InvalidTrajectory, match=message):
        make()


@pytest.mark.parametrize(("reason", "end"), [("stop", "done"), ("length", "truncated")])
def test_a_rollout_of_one_trajectory_ends_as_it_does(reason, end):
    one = replace(trajectory("0-1.0/3", [(4, VERSION)]), finish_reason=reason)
    record = RolloutRecord.of(one, 0.5, {"x": 1.0})
    assert (record.rollout_id, record.end, record.trainable) == ("0-1.0/3", end, True)
    assert (record.reward, record.reward_parts, record.trajectories) == (0.5, {"x": 1.0}, (one,))
