"""The three routing policies against an engine whose rows name the call that computed them.

Any number of calls and turns, cut anywhere, calls without a token included; with dense layers anywhere; on both sides
of the border between uint8 and uint16.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.errors import InvalidTrajectory
from async_rl.queue import codec
from async_rl.rollout.engine.interface import EngineOutput
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.routing_policies import exact, moe_columns
from async_rl.trainer.samples import samples_of
from async_rl.types import Prompt, RoutingSpec, Segment
from tests.support.groups import grouped

EOS = 1
PROMPT = np.array([5, 9, 7, 4], dtype=np.int32)
POLICIES = ["replace", "preserve", "exact"]


class Engine:
    """Rows depend on call, position and layer; columns of dense layers hold zeros, as vLLM's do."""

    def __init__(self, num_layers, moe_layers, num_experts, top_k):
        self.num_layers, self.moe_layers = num_layers, moe_layers
        self.spec = RoutingSpec(len(moe_layers), top_k, num_experts)

    def rows(self, call, first, stop):
        """[stop - first, A, K]"""
        position = np.arange(first, stop)[:, None, None]
        layer = np.arange(self.num_layers)[:, None]
        experts = (position * 31 + call * 101 + layer * 13 + np.arange(self.spec.top_k)) % self.spec.num_experts
        experts[:, [i for i in range(self.num_layers) if i not in self.moe_layers]] = 0
        return experts.astype(self.spec.dtype)

    def moe_rows(self, call, first, stop):
        return moe_columns(self.rows(call, first, stop), num_layers=self.num_layers, moe_layers=self.moe_layers)

    def call(self, number, request, tokens, finish):
        total = len(request.token_ids) + len(tokens) - 1
        return EngineOutput(
            token_ids=np.array(tokens, dtype=np.int32),
            logprobs=np.full(len(tokens), -0.5, dtype=np.float32),
            versions=np.full(len(tokens), number, dtype=np.int32),
            routed_experts=self.moe_rows(number, request.first_row, total) if tokens else None,
            finish_reason=finish,
        )


@st.composite
def engines(draw):
    num_layers = draw(st.integers(1, 5))
    moe_layers = sorted(draw(st.sets(st.integers(0, num_layers - 1), min_size=1)))
    experts = draw(st.sampled_from([4, 256, 257]))
    return Engine(num_layers, tuple(moe_layers), experts, draw(st.integers(1, 3)))


# Turns, each a list of the numbers of tokens that its calls sample, and the length of the answer to it.
turns = st.lists(
    st.tuples(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(1, 3)), min_size=1, max_size=3
)


def play(engine, policy, plan):
    """The finished trajectory, and (call, tokens in all when it ended) of each call that sampled something."""
    partial = PartialRollout.begin(
        "g.0/0", PROMPT, max_response_tokens=200, eos_token_id=EOS, routing_spec=engine.spec, routing_policy=policy
    )
    calls, number = [], 0
    for turn, (counts, answer) in enumerate(plan):
        for index, count in enumerate(counts):
            last = index == len(counts) - 1
            tokens = [20 + number] * count + [EOS] * last
            partial = partial.absorb(engine.call(number, partial.next_request(), tokens, "stop" if last else "abort"))
            if tokens:
                calls.append((number, len(PROMPT) + len(partial.response_ids)))
            number += 1
        if turn < len(plan) - 1:
            partial = partial.append_turn(np.full(answer, 60, dtype=np.int32))
    return partial.to_trajectory(), calls


@given(engines(), st.sampled_from(POLICIES), turns)
def test_invariant_1_and_2_every_policy_keeps_one_row_per_token_but_the_last(engine, policy, plan):
    trajectory, calls = play(engine, policy, plan)
    assert trajectory.routed_experts.shape == (trajectory.num_tokens - 1, len(engine.moe_layers), engine.spec.top_k)
    assert trajectory.routed_experts.dtype == (np.uint8 if engine.spec.num_experts <= 256 else np.uint16)
    assert [len(PROMPT) + segment.stop for segment in trajectory.segments] == [total for _, total in calls]


@given(engines(), turns)
def test_replace_has_the_rows_of_the_last_call(engine, plan):
    trajectory, calls = play(engine, "replace", plan)
    number, total = calls[-1]
    np.testing.assert_array_equal(trajectory.routed_experts, engine.moe_rows(number, 0, total - 1))
    assert all(segment.routed_experts is None for segment in trajectory.segments)


@given(engines(), turns)
def test_preserve_has_each_row_of_the_call_that_computed_it_first(engine, plan):
    trajectory, calls = play(engine, "preserve", plan)
    expected, known = [], 0
    for number, total in calls:
        expected.append(engine.moe_rows(number, known, total - 1))
        known = total - 1
    np.testing.assert_array_equal(trajectory.routed_experts, np.concatenate(expected))
    assert all(segment.routed_experts is None for segment in trajectory.segments)


@given(engines(), turns)
def test_exact_has_the_rows_of_its_own_call_for_each_segment(engine, plan):
    trajectory, calls = play(engine, "exact", plan)
    views = samples_of(trajectory, advantage=1.0, oldest_version=0, per_segment=True)
    assert len(views) == len(calls)
    for view, (number, total) in zip(views, calls, strict=True):
        np.testing.assert_array_equal(view.routed_experts, engine.moe_rows(number, 0, total - 1))
        assert len(view.token_ids) == total


@given(engines(), st.sampled_from(POLICIES), turns)
def test_invariant_1_all_of_it_survives_the_wire(engine, policy, plan):
    trajectory, _ = play(engine, policy, plan)
    prompt = Prompt("0-0", 1, "p", PROMPT)
    (decoded,) = codec.decode(codec.encode(grouped("0-0.0", prompt, [trajectory]))).trajectories
    np.testing.assert_array_equal(decoded.routed_experts, trajectory.routed_experts)
    np.testing.assert_array_equal(decoded.logprobs, trajectory.logprobs)  # NaN where nothing was sampled
    for a, b in zip(decoded.segments, trajectory.segments, strict=True):
        assert (a.start, a.stop, a.version) == (b.start, b.stop, b.version)
        assert (a.routed_experts is None) == (b.routed_experts is None)
        if a.routed_experts is not None:
            np.testing.assert_array_equal(a.routed_experts, b.routed_experts)


@given(engines(), turns)
def test_without_an_interruption_the_policies_are_one(engine, plan):
    whole = [([sum(counts)], answer) for counts, answer in plan[:1]]
    arrays = [play(engine, policy, whole)[0].routed_experts for policy in POLICIES]
    np.testing.assert_array_equal(arrays[0], arrays[1])
    np.testing.assert_array_equal(arrays[0], arrays[2])


def test_exact_gives_each_segment_of_a_call_no_more_rows_than_its_own_tokens_need():
    """A call that went on through a push has several segments."""
    earlier = Engine(2, (0, 1), 8, 2).moe_rows(0, 0, 4 + 9 - 1)
    segments = (Segment(0, 3, 5), Segment(3, 9, 6))
    returned = Engine(2, (0, 1), 8, 2).moe_rows(1, 0, 4 + 12 - 1)
    kept = exact(segments, earlier, returned)
    assert kept.routed_experts is returned
    np.testing.assert_array_equal(kept.segments[0].routed_experts, earlier[: 4 + 3 - 1])
    np.testing.assert_array_equal(kept.segments[1].routed_experts, earlier)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_full_array_where_only_new_rows_were_asked_for_is_refused_and_so_is_the_reverse(policy):
    engine = Engine(3, (1, 2), 8, 2)
    begin = PartialRollout.begin(
        "g.0/0", PROMPT, max_response_tokens=50, eos_token_id=EOS, routing_spec=engine.spec, routing_policy=policy
    )
    first = begin.absorb(engine.call(0, begin.next_request(), [20, 21], "abort"))
    request = first.next_request()
    other = request._replace(first_row=0 if request.first_row else len(first.routed_experts))
    with pytest.raises(InvalidTrajectory, match="routed_experts has shape"):
        first.absorb(engine.call(1, other, [22, EOS], "stop"))
