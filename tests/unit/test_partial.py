"""Partial rollouts against an engine that is a function: what it returns for a position depends on the prefix."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.errors import InvalidTrajectory
from async_rl.rollout.engine.interface import EngineOutput
from async_rl.rollout.partial import PartialRollout
from async_rl.types import RoutingSpec

EOS = 1
SPEC = RoutingSpec(num_moe_layers=3, top_k=2, num_experts=8)
PROMPT = np.array([5, 9, 7, 4], dtype=np.int32)


def begin(limit=20, routing_spec=SPEC, eos=EOS):
    return PartialRollout.begin("g.0/0", PROMPT, max_response_tokens=limit, eos_token_id=eos, routing_spec=routing_spec)


def row(tokens, position, salt=0):
    """Routing [L, K] of one position: distinct experts, a function of the prefix."""
    first = int(np.sum(tokens[: position + 1])) + position + salt
    return [[(first + layer) % 8, (first + layer + 3) % 8] for layer in range(SPEC.num_moe_layers)]


def rows(tokens, salt=0):
    return np.array([row(tokens, i, salt) for i in range(len(tokens) - 1)], dtype=np.uint8)


def call(sent, response, upto, versions, *, salt=0, finish="abort", routing=True):
    """What the engine returns when it is interrupted after ``upto`` of ``response``, having been sent ``sent``."""
    start = len(sent) - len(PROMPT)
    tokens = np.asarray(response[start:upto], dtype=np.int32)
    routed = rows([*sent, *tokens], salt) if routing and len(tokens) else None
    logprobs = np.array([-0.25 * (i + 1) for i in range(start, upto)], dtype=np.float32)
    return EngineOutput(tokens, logprobs, np.asarray(versions, dtype=np.int32), routed, finish)


responses = st.lists(st.integers(2, 60), min_size=1, max_size=30)


@st.composite
def interrupted(draw):
    """A response, and the points at which its calls end, repeated ones included (a call without a token)."""
    response = draw(responses)
    cuts = sorted(draw(st.lists(st.integers(0, len(response)), max_size=6)))
    ends_by_eos = draw(st.booleans())
    if ends_by_eos:
        response = [*response[:-1], EOS]
    return response, cuts, "stop" if ends_by_eos else "length"


def run(response, cuts, reason):
    """Play the calls; the states after each."""
    partial = begin(limit=len(response) if reason == "length" else len(response) + 5)
    states = [partial]
    for version, cut in enumerate([*cuts, len(response)]):
        if partial.finished:
            break
        sent, budget, first_row = partial.next_request()
        assert first_row == 0
        assert budget == partial.max_response_tokens - len(partial.response_ids)
        np.testing.assert_array_equal(sent, [*PROMPT, *response[: len(partial.response_ids)]])
        new = cut - len(partial.response_ids)
        last = version == len(cuts)
        partial = partial.absorb(
            call(sent, response, cut, [version] * new, salt=version, finish=reason if last else "abort")
        )
        states.append(partial)
    return states


@given(interrupted())
def test_invariant_1_every_token_has_a_logprob_a_version_and_every_row_its_routing(case):
    for state in run(*case):
        count = len(state.response_ids)
        assert len(state.logprobs) == len(state.versions) == count
        if count:
            assert state.routed_experts.shape == (len(PROMPT) + count - 1, 3, 2)


@given(interrupted())
def test_invariant_2_any_interruptions_give_the_uninterrupted_response(case):
    response, _, reason = case
    *_, final = run(*case)
    assert final.finished
    assert final.finish_reason == reason
    trajectory = final.to_trajectory()  # validates lengths, segments and routing once more
    np.testing.assert_array_equal(trajectory.response_ids, response)
    np.testing.assert_array_equal(trajectory.logprobs, [-0.25 * (i + 1) for i in range(len(response))])


@given(interrupted())
def test_invariant_2_routing_is_replaced_by_that_of_the_last_call(case):
    states = run(*case)
    for before, after in itertools.pairwise(states):
        if len(after.response_ids) == len(before.response_ids):
            assert after is before  # nothing sampled: nothing changed, and the earlier routing stays
        else:
            salt = int(after.versions[-1])
            np.testing.assert_array_equal(after.routed_experts, rows([*PROMPT, *after.response_ids], salt))


@given(interrupted())
def test_invariant_3_what_was_recorded_is_never_changed(case):
    states = run(*case)
    for before, after in itertools.pairwise(states):
        count = len(before.response_ids)
        np.testing.assert_array_equal(after.response_ids[:count], before.response_ids)
        np.testing.assert_array_equal(after.logprobs[:count], before.logprobs)
        np.testing.assert_array_equal(after.versions[:count], before.versions)
        assert after.segments[: len(before.segments)] == before.segments


@given(interrupted())
def test_invariant_7_segments_are_the_calls_that_sampled_something(case):
    response, cuts, _ = case
    *_, final = run(*case)
    edges = [c for c in dict.fromkeys([0, *cuts, len(response)]) if c <= len(final.response_ids)]
    assert [(s.start, s.stop) for s in final.segments] == list(itertools.pairwise(edges))
    assert all(len(segment) > 0 for segment in final.segments)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_invariant_7_versions_within_one_call_become_segments(steps):
    versions = np.cumsum(steps).tolist()
    response = list(range(2, 2 + len(versions)))
    partial = begin(limit=40)
    partial = partial.absorb(call(PROMPT, response, len(response), versions))
    assert partial.versions.tolist() == versions
    assert [v for s in partial.segments for v in [s.version] * len(s)] == versions
    assert len(partial.segments) == len(set(versions))


def test_a_response_is_interrupted_once_a_call_has_left_it_unfinished():
    assert not begin().interrupted
    assert begin().absorb(call(PROMPT, [3, 4], 2, [0, 0])).interrupted


def test_aborted_before_the_first_token_changes_nothing():
    partial = begin()
    assert partial.absorb(call(PROMPT, [], 0, [])) is partial
    assert partial.segments == ()
    assert not partial.finished


def test_aborted_at_the_stop_token_has_stopped():
    partial = begin().absorb(call(PROMPT, [3, EOS], 2, [0, 0]))
    assert partial.finish_reason == "stop"


def test_aborted_at_the_token_limit_has_reached_it():
    partial = begin(limit=2).absorb(call(PROMPT, [3, 4], 2, [0, 0]))
    assert partial.finish_reason == "length"


def test_any_of_several_stop_tokens_ends_a_response():
    assert begin(eos=[EOS, 50]).absorb(call(PROMPT, [50], 1, [0])).finish_reason == "stop"
    assert begin(eos=None).absorb(call(PROMPT, [EOS], 1, [0])).finish_reason is None


def test_an_answer_between_two_turns_has_no_logprob_no_version_and_its_routing_from_the_next_call():
    first = begin().absorb(call(PROMPT, [3, EOS], 2, [4, 4], finish="stop"))
    asked = first.append_turn(np.array([30, 31, 32], dtype=np.int32))
    assert not asked.finished
    assert not asked.interrupted
    sent, budget, _ = asked.next_request()
    np.testing.assert_array_equal(sent, [*PROMPT, 3, EOS, 30, 31, 32])
    assert budget == 20 - 5
    response = [3, EOS, 30, 31, 32, 8, EOS]
    trajectory = asked.absorb(call(sent, response, 7, [5, 5], finish="stop")).to_trajectory()
    assert trajectory.response_ids.tolist() == response
    assert trajectory.sampled.tolist() == [True, True, False, False, False, True, True]
    assert np.isnan(trajectory.logprobs[2:5]).all()
    assert trajectory.versions.tolist() == [4, 4, -1, -1, -1, 5, 5]
    assert [(s.start, s.stop, s.version) for s in trajectory.segments] == [(0, 2, 4), (5, 7, 5)]
    assert not trajectory.is_partial, "a new turn is not an interruption"
    assert trajectory.routed_experts.shape == (len(PROMPT) + 7 - 1, 3, 2)


def test_an_answer_that_leaves_no_room_ends_the_response():
    first = begin(limit=5).absorb(call(PROMPT, [3, EOS], 2, [0, 0], finish="stop"))
    assert first.append_turn(np.array([30, 31], dtype=np.int32)).next_request().max_tokens == 1
    ended = first.append_turn(np.array([30, 31, 32], dtype=np.int32))
    assert ended.finish_reason == "length"
    assert ended.to_trajectory().response_ids.tolist() == [3, EOS]


def test_only_a_turn_that_stopped_can_be_answered_and_only_with_tokens():
    answer = np.array([30], dtype=np.int32)
    for state in (begin(), begin(limit=2).absorb(call(PROMPT, [3, 4], 2, [0, 0]))):
        with pytest.raises(InvalidTrajectory, match="takes no answer"):
            state.append_turn(answer)
    stopped = begin().absorb(call(PROMPT, [EOS], 1, [0], finish="stop"))
    with pytest.raises(InvalidTrajectory, match="answered without a token"):
        stopped.append_turn(answer[:0])


def test_routing_for_a_dense_model_is_refused():
    with pytest.raises(InvalidTrajectory, match="returned routed experts, and the model has no MoE layer"):
        begin(routing_spec=None).absorb(call(PROMPT, [3, EOS], 2, [0, 0], finish="stop"))


def test_a_dense_model_has_no_routing():
    partial = begin(routing_spec=None).absorb(call(PROMPT, [3, EOS], 2, [0, 0], routing=False, finish="stop"))
    trajectory = partial.to_trajectory()
    assert trajectory.routed_experts is None
    assert trajectory.routing_spec is None


def test_concatenated_routing_is_refused():
    first = begin().absorb(call(PROMPT, [3, 4, 5], 2, [0, 0]))
    sent, _, _ = first.next_request()
    output = call(sent, [3, 4, 5], 3, [1])
    doubled = EngineOutput(
        output.token_ids,
        output.logprobs,
        output.versions,
        np.concatenate([first.routed_experts, output.routed_experts]),
        "abort",
    )
    with pytest.raises(InvalidTrajectory, match=r"g\.0/0: routed_experts has shape \(11, 3, 2\), expected \(6, 3, 2\)"):
        first.absorb(doubled)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": np.zeros(1, np.float32)}, "returned 2 tokens, 1 logprobs"),
        ({"versions": np.zeros(3, np.int32)}, ", 3 stamps"),
        ({"routed_experts": None}, "without their routed experts"),
        ({"finish_reason": "stop", "token_ids": np.zeros(0, np.int32), "logprobs": np.zeros(0, np.float32),
          "versions": np.zeros(0, np.int32)}, "without a token"),
    ],
)  # fmt: skip
def test_an_output_that_cannot_be_is_refused(change, message):
    from dataclasses import replace

    output = replace(call(PROMPT, [3, 4], 2, [0, 0]), **change)
    with pytest.raises(InvalidTrajectory, match=message):
        begin().absorb(output)


def test_more_tokens_than_asked_for_are_refused():
    with pytest.raises(InvalidTrajectory, match="returned 2 tokens, 1 were left"):
        begin(limit=1).absorb(call(PROMPT, [3, 4], 2, [0, 0]))


def test_an_ended_response_takes_no_call_and_an_open_one_is_no_trajectory():
    ended = begin().absorb(call(PROMPT, [EOS], 1, [0], finish="stop"))
    with pytest.raises(InvalidTrajectory, match="has ended"):
        ended.next_request()
    with pytest.raises(InvalidTrajectory, match="has not ended"):
        begin().to_trajectory()
    with pytest.raises(InvalidTrajectory, match="max_response_tokens is 0"):
        begin(limit=0)
