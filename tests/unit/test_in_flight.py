"""Groups in flight on the wire: they come back as they stood, and what does not fit is refused whole."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.config.inputs import Terms
from async_rl.errors import InvalidTrajectory, WireError
from async_rl.queue import wire
from async_rl.queue.records import Ticket
from async_rl.rollout import in_flight
from async_rl.rollout.branches import SavedTurn
from async_rl.rollout.engine.interface import EngineOutput
from async_rl.rollout.environments.progress import Exchange, Progress, Said
from async_rl.rollout.in_flight import IN_FLIGHT, InFlight
from async_rl.rollout.parked import Parked
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.rewards.score import Score
from async_rl.rollout.saved_session import SavedBranch, SavedSession
from async_rl.types import Prompt, RolloutRecord, RoutingSpec
from tests.support.examples import examples

ROUTING = RoutingSpec(num_moe_layers=2, top_k=2, num_experts=300)
LIMIT, STOP = 40, frozenset({0, 99})


def output(rng, partial, count, version, end):
    request = partial.next_request()
    rows = len(request.token_ids) + count - 1 - request.first_row
    first = rng.integers(0, 150, (rows, 2, 1))
    return EngineOutput(
        token_ids=rng.integers(1, 99, count).astype(np.int32),
        logprobs=rng.normal(size=count).astype(np.float32),
        versions=np.full(count, version, dtype=np.int32),
        routed_experts=np.concatenate([first, first + 150], axis=2).astype(np.uint16),
        finish_reason=end,
    )


def group(seed, n=3, policy="replace", dense=False):
    """Responses that were cut, resumed, answered by an environment, finished and scored, each as far as it came."""
    rng = np.random.default_rng(seed)
    prompt = Prompt("3-7", 7, "text \ud800", rng.integers(1, 100, 4).astype(np.int32), {"answer": [1, None, "x"]})
    made = InFlight.begin(Ticket("3-7.2", prompt, 5), n)
    for index in range(n):
        calls = int(rng.integers(0, 4))
        if calls == 0:
            continue
        partial = PartialRollout.begin(
            f"3-7.2/{index}",
            prompt.token_ids,
            max_response_tokens=LIMIT,
            eos_token_id=STOP,
            routing_spec=None if dense else ROUTING,
            routing_policy=policy,
        )
        for call in range(calls):
            end = "stop" if call == calls - 1 and rng.random() < 0.5 else "abort"
            made_output = output(rng, partial, int(rng.integers(1, 5)), 3 + call, end)
            if dense:
                made_output = EngineOutput(
                    *[getattr(made_output, f) for f in ("token_ids", "logprobs", "versions")], None, end
                )
            partial = partial.absorb(made_output, ("", "vllm", "sglang")[call % 3], (0.7, None)[call % 2])
        if partial.finished and rng.random() < 0.5:
            shaped = {"parts": {"length": float(rng.normal())}, "raw": float(rng.normal())} if index else {}
            made.scores[index] = Score(float(rng.normal()), **shaped)
        elif partial.finished and rng.random() < 0.5:
            partial = partial.append_turn(np.array([5, 6], dtype=np.int32))
        made.partials[index] = partial
    return made


def decode(message, n=3, policy="replace"):
    return in_flight.decode(
        message, n=n, terms=lambda _: Terms("train", LIMIT), stop_token_ids=STOP, routing_policy=policy
    )


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 5),
    policy=st.sampled_from(["replace", "preserve", "exact"]),
    dense=st.booleans(),
)
@settings(max_examples=examples(100), deadline=None)
def test_invariant_3_a_group_comes_back_as_it_stood(seed, n, policy, dense):
    sent = group(seed, n, policy, dense)
    received = decode(in_flight.encode(sent), n, policy)
    assert in_flight.encode(received).tobytes() == in_flight.encode(sent).tobytes()
    assert received.ticket.prompt.fields == sent.ticket.prompt.fields
    assert received.scores == sent.scores
    for a, b in zip(sent.partials, received.partials, strict=True):
        if a is not None:
            kept = None if policy == "replace" and not a.finished else a.routed_experts
            assert (b.routed_experts is None) if kept is None else (b.routed_experts == kept).all()
        assert (a is None) == (b is None)
        if a is not None:
            assert [segment.engine for segment in a.segments] == [segment.engine for segment in b.segments]
        if a is not None and not a.finished:
            assert [x.tolist() if hasattr(x, "tolist") else x for x in a.next_request()] == [
                x.tolist() if hasattr(x, "tolist") else x for x in b.next_request()
            ]
        if b is not None:
            assert b.response_ids.flags.writeable or b.response_ids.base is None, "a copy, not a view on the message"


@given(seed=st.integers(0, 200), at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
@settings(max_examples=examples(100), deadline=None)
def test_a_damaged_message_is_refused(seed, at, bit, cut):
    message = in_flight.encode(group(seed)).tobytes()
    place = int(at * len(message))
    damaged = message[:place] if cut else bytearray(message)
    if not cut:
        damaged[place] ^= 1 << bit
    with pytest.raises(WireError):
        decode(bytes(damaged))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.text(max_size=5), st.lists, max_leaves=5
)


@given(
    seed=st.integers(0, 50),
    key=st.sampled_from(["group_id", "version", "partials", "rewards", "fields", "row"]),
    value=json_like,
    inner=st.sampled_from([None, "trajectory_id", "policy", "finish_reason", "routing"]),
)
@settings(max_examples=examples(300), deadline=None)
def test_a_table_that_says_something_else_is_refused_or_harmless(seed, key, value, inner):
    """With a valid checksum: only the checks of what it means stand in the way."""
    _, table, arrays = wire.unpack(IN_FLIGHT, in_flight.encode(group(seed)))
    table.pop("arrays")
    if inner is None:
        table[key] = value
    else:
        for entry in table["partials"]:
            if entry is not None:
                entry[inner] = value
    altered = wire.pack(IN_FLIGHT, "altered", table, arrays)
    try:
        received = decode(altered)
    except WireError:
        return
    for partial in received.partials:
        if partial is not None:
            partial.check()
            if partial.finish_reason is None:
                partial.next_request()


def with_made(seed=1):
    """A group of three of which an agent's second rollout has ended."""
    rng = np.random.default_rng(seed)
    prompt = Prompt("3-7", 7, "text", rng.integers(1, 100, 4).astype(np.int32), {})
    sent = InFlight.begin(Ticket("3-7.2", prompt, 5), 3)
    partial = PartialRollout.begin(
        "3-7.2/1",
        prompt.token_ids,
        max_response_tokens=LIMIT,
        eos_token_id=STOP,
        routing_spec=ROUTING,
        routing_policy="replace",
    )
    partial = partial.absorb(output(rng, partial, 4, 3, "stop"))
    sent.made[1] = RolloutRecord.of(partial.to_trajectory(), 0.5, {"part": 1.0})
    return sent


def test_rollouts_of_an_agent_that_have_ended_come_along():
    sent = with_made()
    received = decode(in_flight.encode(sent))
    assert list(received.made) == [1]
    (one,), (other,) = sent.made[1].trajectories, received.made[1].trajectories
    assert one.response_ids.tolist() == other.response_ids.tolist()
    assert (one.routed_experts == other.routed_experts).all()
    assert (received.made[1].reward, received.made[1].reward_parts) == (0.5, {"part": 1.0})
    assert in_flight.encode(received).tobytes() == in_flight.encode(sent).tobytes()
    assert received.num_tokens == sent.num_tokens == 4


def earlier(schema, message):
    """Return the message as an earlier release has written it."""
    _, table, arrays = wire.unpack(IN_FLIGHT, message)
    table.pop("arrays")
    return wire.pack(wire.Kind(b"ARLF", schema, "group in flight"), "earlier", table, arrays)


def test_a_message_of_schema_1_is_read():
    sent = in_flight.encode(group(1))
    assert earlier(1, sent).tobytes() != sent.tobytes()
    assert in_flight.encode(decode(earlier(1, sent))).tobytes() == sent.tobytes()


def test_a_message_of_schema_2_is_read():
    sent = in_flight.encode(with_made())
    received = decode(earlier(2, sent))
    assert (list(received.made), received.parked, received.adopted) == ([1], {}, True)
    assert in_flight.encode(received).tobytes() == sent.tobytes()


def with_parked(policy="replace"):
    """The group of ``with_made``, whose third rollout plays with an environment and is in its second turn."""
    sent, rng = with_made(), np.random.default_rng(7)
    first = PartialRollout.begin(
        "3-7.2/2",
        np.array([5, 6], np.int32),
        max_response_tokens=LIMIT,
        eos_token_id=STOP,
        routing_spec=ROUTING,
        routing_policy=policy,
    )
    first = first.absorb(output(rng, first, 3, 3, "stop"))
    second = first.append_turn(np.array([90, 91], np.int32))
    second = second.absorb(output(rng, second, 2, 4, "abort"))
    turns = (SavedTurn("first", 2, 5, None, 0),)
    branch = SavedBranch(second, "", 2, (), turns, SavedTurn("extended", 7, 0, None, -1))
    said = Said({"role": "assistant", "content": "x"}, 0)
    progress = Progress(None, exchanges=(Exchange(said, ({"role": "user", "content": "y"},), 0.5),), state=b"\xff")
    sent.parked[2] = Parked("rollout.agent.environment a:B", SavedSession((branch,), 1, 2), progress)
    return sent


def test_rollouts_that_can_be_continued_come_along():
    sent = with_parked()
    received = decode(in_flight.encode(sent))
    assert (list(received.made), list(received.parked)) == ([1], [2])
    assert received.parked[2].progress == sent.parked[2].progress
    (one,), (other,) = sent.parked[2].session.branches, received.parked[2].session.branches
    assert (one.turns, one.open) == (other.turns, other.open)
    assert one.partial.response_ids.tolist() == other.partial.response_ids.tolist()
    assert other.partial.routed_experts is None, "the next call returns all of them"
    assert sent.copy().parked == sent.parked
    assert received.num_tokens == sent.num_tokens == 4 + 7
    assert in_flight.encode(received).tobytes() == in_flight.encode(sent).tobytes()


@pytest.mark.parametrize("indices", [[], [0], [1], [3], [-1], [2, 2], [True], ["2"], None, {"2": 2}])
def test_parked_rollouts_that_belong_nowhere_are_refused(indices):
    _, table, arrays = wire.unpack(IN_FLIGHT, in_flight.encode(with_parked()))
    table.pop("arrays")
    with pytest.raises(WireError):
        decode(wire.pack(IN_FLIGHT, "altered", table | {"parked": indices}, arrays))


@pytest.mark.parametrize("indices", [[], [3], [-1], [1, 1], [True], ["1"], None, {"1": 1}])
def test_rollouts_that_belong_nowhere_are_refused(indices):
    _, table, arrays = wire.unpack(IN_FLIGHT, in_flight.encode(with_made()))
    table.pop("arrays")
    with pytest.raises(WireError, match="rollouts are those of"):
        decode(wire.pack(IN_FLIGHT, "altered", table | {"made": indices}, arrays))


def test_what_the_settings_of_now_do_not_allow_is_refused():
    message = in_flight.encode(group(1))
    with pytest.raises(WireError, match=r"3 responses in flight, and rollout\.n is 4"):
        decode(message, n=4)
    with pytest.raises(WireError, match="not one kept under exact"):
        decode(message, policy="exact")
    with pytest.raises(WireError, match="response tokens, more than 1 allowed"):
        in_flight.decode(message, n=3, terms=lambda _: Terms("train", 1), stop_token_ids=STOP, routing_policy="replace")
    with pytest.raises(WireError, match="not a group in flight"):
        decode(b"ARLG" + message.tobytes()[4:])


def test_a_row_whose_sampling_the_settings_of_now_cannot_read_is_refused():
    def unreadable(_):
        raise ValueError("temperature: Input should be greater than 0")

    message = in_flight.encode(group(0, 3, "replace", dense=False))
    with pytest.raises(WireError, match=r"prompt 3-7: .*Input should be greater than 0"):
        in_flight.decode(message, n=3, terms=unreadable, stop_token_ids=STOP, routing_policy="replace")


@pytest.mark.parametrize("policy", ["replace", "preserve", "exact"])
def test_invariant_2_a_resumed_response_is_the_same_whether_its_rows_travelled_or_not(policy):
    """Under replace they do not: the next call returns them all, and those that it returns are kept."""
    for seed in range(30):
        for a, b in zip(
            (sent := group(seed, policy=policy)).partials,
            decode(in_flight.encode(sent), policy=policy).partials,
            strict=True,
        ):
            if a is None or a.finished:
                continue
            last = output(np.random.default_rng(seed), a, 2, 9, "stop")
            ended = [partial.absorb(last).to_trajectory() for partial in (a, b)]
            assert (ended[0].routed_experts == ended[1].routed_experts).all()
            assert len(ended[1].routed_experts) == len(a.prompt_ids) + len(ended[1].response_ids) - 1
            assert ended[0].versions.tolist() == ended[1].versions.tolist()


def test_a_message_of_release_0_1_with_rows_that_come_again_is_read():
    sent = group(1)
    _, table, arrays = wire.unpack(IN_FLIGHT, in_flight.encode(sent))
    table.pop("arrays")
    for t, partial in enumerate(sent.partials):
        if partial is not None and partial.routed_experts is not None:
            arrays[f"{t}.routed_experts"] = partial.routed_experts
    received = decode(wire.pack(IN_FLIGHT, "as it was", table, arrays))
    for a, b in zip(sent.partials, received.partials, strict=True):
        assert a is None or (a.routed_experts == b.routed_experts).all()


def test_a_state_that_no_calls_lead_to_is_refused():
    partial = next(p for p in group(1).partials if p is not None)
    for wrong in (
        {"logprobs": partial.logprobs[:-1]},
        {"versions": partial.versions + 1},
        {"segments": ()},
        {"routed_experts": None, "finish_reason": "stop"},
        {"routed_experts": None, "routing_policy": "preserve"},
        {"routed_experts": partial.routed_experts[:-1]},
        {"max_response_tokens": 1},
    ):
        with pytest.raises(InvalidTrajectory):
            dataclasses.replace(partial, **wrong).check()
