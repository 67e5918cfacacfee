"""Where an agent's request belongs, what it may cost, and what a failed or repeated one leaves."""

import pytest

from async_rl.errors import InvalidTrajectory, RequestRefused
from async_rl.rollout.conversation import canonical, in_common
from tests.support.agent_sessions import (
    CALL_END,
    END,
    LETTERS,
    NEWLINE,
    ROLES,
    WORDS,
    Engine,
    ask,
    ids,
    missing,
    session,
    user,
)

SYSTEM = {"role": "system", "content": "s"}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def text(*characters):
    return [LETTERS + ord(c) for c in characters]


def asked(role, *characters):
    """The tokens of a message, and of the question for an answer after it."""
    return [ROLES[role], *text(*characters), END, NEWLINE, ROLES["assistant"]]


def trajectories(subject):
    return {t.trajectory_id: t for t in subject.trajectories()}


def test_a_conversation_is_one_trajectory_of_which_nothing_is_tokenized_twice():
    subject, engine = session(), Engine()
    history = [SYSTEM, user("a")]
    for word in (7, 8, 9):
        turn = ask(subject, history)
        history += [engine.answer(subject, turn, word), {"role": "tool", "content": str(word)}]
    (made,) = subject.trajectories()
    assert made.trajectory_id == "r"
    assert made.prompt_ids.tolist() == [ROLES["system"], *text("s"), END, NEWLINE, *asked("user", "a")]
    one, two, three = ([WORDS + word, END] for word in (7, 8, 9))
    between = ([NEWLINE, *asked("tool", c)] for c in "78")
    assert made.response_ids.tolist() == [*one, *next(between), *two, *next(between), *three]
    assert made.sampled.sum() == 6
    assert made.logprobs[made.sampled].tolist() == pytest.approx([-0.001 * n for n in range(1, 7)])
    assert (made.routed_experts == 3).all(), "replaced by the rows of the last call"
    assert subject.ways == {"first": 1, "extended": 2}
    assert (subject.turns, subject.sampled_tokens) == (3, 6)


def test_the_order_in_which_a_client_lists_keys_and_what_it_drops_is_no_edit():
    subject, engine = session(), Engine()
    turn = ask(subject, [user("a")])
    engine.call(subject, turn, [WORDS + 1, END], "stop")
    said = {
        "role": "assistant",
        "content": "\n\nwell",
        "reasoning_content": "hm",
        "tool_calls": [{"id": "x1", "type": "function", "function": {"name": "f", "arguments": '{"b": 1,  "a": 2}'}}],
    }
    subject.end(turn, said)
    calls = [{"id": "other", "function": {"arguments": {"a": 2, "b": 1}, "name": "f"}}]
    back = {"role": "assistant", "content": [{"type": "text", "text": "well"}], "tool_calls": calls, "refusal": None}
    place = subject.find([user("a"), back, user("b")])
    assert (place.how, place.after, place.added) == ("extended", turn, [user("b")])
    for change in ({"content": "Well"}, {"reasoning_content": "ha"}, {"tool_calls": []}, {"role": "user"}):
        assert subject.find([user("a"), back | change, user("b")]).how == "root"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"role": "user", "content": "a "}, {"role": "user", "content": "a"}, False),
        ({"role": "assistant", "content": " a "}, {"role": "assistant", "content": "a"}, True),
        ({"role": "assistant", "content": None}, {"role": "assistant"}, True),
        ({"role": "tool", "content": "1", "tool_call_id": "x"}, {"role": "tool", "content": "1"}, False),
        ({"role": "user", "content": "a", "name": "x"}, {"role": "user", "content": "a", "name": "y"}, False),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{ "}}]},
            False,
        ),
    ],
)
def test_what_of_a_message_counts(one, other, same):
    assert in_common([canonical(one)], [canonical(other)]) == same


def test_a_history_that_was_edited_forks_before_the_edit_and_each_token_is_trained_once():
    subject, engine = session(), Engine()
    history = [user("a")]
    for word in (1, 2, 3):
        history += [engine.answer(subject, ask(subject, history), word), user("x")]
    edited = [*history[:2], user("y"), history[3], user("z")]
    place = subject.find(edited)
    assert place.how == "edited"
    assert place.added == edited[2:], "also what the policy said after the edit: as context"
    turn = ask(subject, edited)
    engine.answer(subject, turn, 4)
    made = trajectories(subject)
    assert made.keys() == {"r", "r.1"}
    kept = [*made["r"].prompt_ids.tolist(), WORDS + 1, END]
    context = [NEWLINE, ROLES["user"], *text("y"), END, NEWLINE, ROLES["assistant"], *text("2"), END, NEWLINE]
    assert made["r.1"].prompt_ids.tolist() == [*kept, *context, *asked("user", "z")]
    assert made["r.1"].response_ids.tolist() == [WORDS + 4, END]
    assert sum(int(t.sampled.sum()) for t in made.values()) == 8


def test_two_requests_on_one_history_at_one_time_are_two_trajectories():
    subject, engine = session(), Engine()
    history = [user("a")]
    history += [engine.answer(subject, ask(subject, history), 1), user("b")]
    first, second = ask(subject, history), ask(subject, history)
    assert (first.how, second.how) == ("extended", "parallel")
    for turn, word in ((second, 3), (first, 2)):
        engine.answer(subject, turn, word)
    made = trajectories(subject)
    assert made["r"].response_ids.tolist()[-2:] == [WORDS + 2, END]
    assert made["r.1"].response_ids.tolist() == [WORDS + 3, END]
    assert made["r.1"].prompt_ids.tolist() == [*made["r"].prompt_ids, *made["r"].response_ids[:-2]]
    # Both may go on.
    for turn in (first, second):
        assert subject.find([*history, turn.message, user("c")]).how == "extended"


def test_a_place_that_was_taken_while_its_tokens_were_made_is_found_again():
    subject, engine = session(), Engine()
    history = [user("a")]
    history += [engine.answer(subject, ask(subject, history), 1), user("b")]
    place, other = subject.find(history), subject.find(history)
    assert subject.begin(place, missing(place)).how == "extended"
    assert subject.begin(other, missing(other)) is None
    assert subject.turns == 2
    assert ask(subject, history).how == "parallel"


def test_other_tools_and_other_beginnings_are_roots():
    subject, engine = session(), Engine()
    history = [user("a")]
    history += [engine.answer(subject, ask(subject, history), 1), user("b")]
    with_tools, other = ask(subject, history, TOOLS), ask(subject, [user("z")])
    assert (with_tools.how, other.how) == ("tools", "root")
    assert with_tools.branch.tokens.tolist()[:3] == text("a", "d", "d")
    engine.answer(subject, with_tools, 2)
    assert subject.find([*history, with_tools.message, user("c")], TOOLS).how == "extended"
    engine.answer(subject, ask(subject, [*history, with_tools.message, user("c")], TOOLS), 1)
    engine.answer(subject, other, 1)
    assert [(t.origin, t.tools) for t in subject.trajectories()] == [("first", ()), ("tools", ("add",)), ("root", ())]


def test_a_turn_without_its_stop_token_goes_on_in_a_fork_that_has_it_as_context():
    subject, engine = session(), Engine()
    turn = ask(subject, [user("a")], max_tokens=2)
    said = engine.answer(subject, turn, 1, 2, 3, last=None)
    assert turn.finish_reason == "length"
    after = ask(subject, [user("a"), said, user("b")])
    assert after.how == "cut"
    assert after.branch.tokens.tolist()[-8:] == [WORDS + 2, END, NEWLINE, *asked("user", "b")]
    engine.answer(subject, after, 4)
    assert [int(t.sampled.sum()) for t in subject.trajectories()] == [2, 2]


def test_a_turn_that_ended_at_a_stop_string_keeps_the_templates_stop_token_as_context():
    subject, engine = session(), Engine()
    turn = ask(subject, [user("a")])
    engine.call(subject, turn, [WORDS + 1], "stop")
    said = {"role": "assistant", "content": "1"}
    subject.end(turn, said)
    assert ask(subject, [user("a"), said, user("b")]).how == "extended"
    assert turn.branch.partial.response_ids.tolist() == [WORDS + 1, END, NEWLINE, *asked("user", "b")]


def test_another_stop_token_than_the_templates_is_trained_in_one_branch_and_left_out_of_the_other():
    subject, engine = session(), Engine()
    turn = ask(subject, [user("a")])
    said = engine.answer(subject, turn, 1, last=CALL_END)
    fork = ask(subject, [user("a"), said, user("b")])
    assert fork.how == "stop_mismatch"
    engine.answer(subject, fork, 2)
    made = trajectories(subject)
    assert made["r"].response_ids.tolist() == [WORDS + 1, CALL_END]
    assert made["r.1"].prompt_ids.tolist() == [*made["r"].prompt_ids, WORDS + 1, END, NEWLINE, *asked("user", "b")]
    assert len(made["r"].routed_experts) == made["r"].num_tokens - 1


def test_a_turn_that_failed_leaves_no_trace_and_its_id_is_not_used_again():
    subject, engine = session(), Engine()
    history = [user("a")]
    history += [engine.answer(subject, ask(subject, history), 1), user("b")]
    before = subject.branches[0].tokens
    failed = ask(subject, history)
    engine.call(subject, failed, [WORDS + 2, WORDS + 3], "abort")
    subject.undo(failed)
    subject.undo(failed)
    assert subject.branches[0].tokens.tolist() == before.tolist()
    gone = ask(subject, [user("z")])
    subject.undo(gone)
    subject.keep(gone, gone.branch.partial)
    again, root = ask(subject, history), ask(subject, [user("z")])
    assert (again.how, root.branch.partial.trajectory_id) == ("extended", "r.2")
    calls = [subject.next_call(turn) for turn in (again, again, root)]
    assert calls == ["r/0", "r/1", "r.2/2"]
    engine.answer(subject, again, 4)
    engine.answer(subject, root, 5)
    assert subject.ways == {"first": 1, "extended": 1, "root": 1}
    assert subject.sampled_tokens == 6
    assert [t.trajectory_id for t in subject.trajectories()] == ["r", "r.2"]


def test_what_is_under_way_at_the_end_is_undone():
    subject, engine = session(), Engine()
    history = [user("a")]
    history += [engine.answer(subject, ask(subject, history), 1), user("b")]
    late, root = ask(subject, history), ask(subject, [user("z")])
    engine.call(subject, late, [WORDS + 2], "abort")
    (made,) = subject.trajectories()
    assert made.response_ids.tolist() == [WORDS + 1, END]
    assert {late.state, root.state} == {"failed"}


def test_an_agent_that_asked_nothing_has_no_trajectories():
    assert session().trajectories() == ()


def test_a_repetition_joins_the_turn_of_the_first_request_and_no_other():
    subject, engine = session(), Engine()
    request = ([user("a")], TOOLS, {"max_tokens": 5})
    assert subject.repeated(*request) is None
    place = subject.find(*request)
    turn = subject.begin(place, missing(place, TOOLS))
    assert subject.repeated(*request) is turn
    assert subject.repeated([user("a")], TOOLS, {"max_tokens": 6}) is None
    said = engine.answer(subject, turn, 1)
    assert subject.repeated(*request) is turn
    assert subject.joined == 2
    after = ask(subject, [user("a"), said, user("b")], TOOLS)
    assert subject.repeated(*request) is None
    subject.undo(after)
    assert subject.repeated(*request) is turn


def test_requests_of_tokens_share_the_branches():
    subject, engine = session(), Engine()
    place, rest = subject.find_tokens(ids(11, 12))
    assert (place.how, rest.tolist()) == ("first", [11, 12])
    turn = subject.begin(place, rest)
    engine.answer(subject, turn, 1)
    place, rest = subject.find_tokens(ids(11, 12, WORDS + 1, END, 13))
    assert (place.how, rest.tolist()) == ("extended", [13])
    second = subject.begin(place, rest)
    engine.answer(subject, second, 2)
    for sent, how in (
        ((11, 12, WORDS + 1, END, 14), "edited"),
        ((11, 12, WORDS + 1, END, 13, WORDS + 2, END), "cut"),  # nothing after the stop token: it cannot be extended
        ((11, 13), "root"),
    ):
        place, rest = subject.find_tokens(ids(*sent))
        turn = subject.begin(place, rest)
        assert (turn.how, turn.branch.partial.prompt_ids.tolist()) == (how, list(sent))
        engine.answer(subject, turn, 3)
    assert sum(int(t.sampled.sum()) for t in subject.trajectories()) == 10


def test_text_follows_a_turn_as_it_stands():
    subject, engine = session(), Engine()
    turn = ask(subject, [user("a")])
    engine.answer(subject, turn, 1)
    second = subject.begin(subject.find_after(turn), ids(50, 51))
    assert second.how == "extended"
    engine.answer(subject, second, 2)
    (made,) = subject.trajectories()
    assert made.response_ids.tolist() == [WORDS + 1, END, 50, 51, WORDS + 2, END]


# -- limits -----------------------------------------------------------------------------------------------------------


def refused(subject, history, code, match, **more):
    before = [(b.partial, b.history, list(b.turns), b.open) for b in subject.branches]
    with pytest.raises(RequestRefused, match=match) as error:
        ask(subject, history, **more)
    assert error.value.code == code
    assert [(b.partial, b.history, list(b.turns), b.open) for b in subject.branches] == before, "nothing has changed"


def test_each_limit_is_named_and_a_refused_request_changes_nothing():
    for limits, code, match in (
        ({"turns": 1}, "rollout_budget_exceeded", "has had its 1 turns"),
        ({"sampled_tokens": 2}, "rollout_budget_exceeded", "has sampled its 2 tokens"),
        ({"context_tokens": 13}, "context_length_exceeded", "13 tokens leave no room for another: a context may have"),
        ({"response_tokens": 7}, "context_length_exceeded", "and a response 7"),
        ({"branches": 1}, "rollout_budget_exceeded", "has 1 branches; an agent has to send back what was said"),
    ):
        subject, engine = session(**limits), Engine()
        said = engine.answer(subject, ask(subject, [user("a")]), 1)
        assert not subject.truncated
        history = [user("z")] if "branches" in limits else [user("a"), said, user("b")]
        refused(subject, history, code, match)
        assert subject.truncated
        assert len(subject.trajectories()) == 1


def test_a_turn_has_what_is_left_of_each_limit():
    for limits, room in (
        ({"sampled_tokens": 5}, 5 - 2),
        ({"context_tokens": 20}, 20 - 13),
        ({"response_tokens": 15}, 15 - 8),
    ):
        subject, engine = session(**limits), Engine()
        said = engine.answer(subject, ask(subject, [user("a")]), 1)
        turn = ask(subject, [user("a"), said, user("b")])
        assert (len(turn.branch.tokens), turn.branch.partial.next_request().max_tokens) == (13, room), limits
        subject.undo(turn)
        # A fork has what the branch had, not a budget of its own.
        fork = ask(subject, [user("a"), said, user("c")], max_tokens=100)
        other = ask(subject, [user("a"), said, user("b")])
        assert other.how == "parallel"
        assert other.branch.partial.next_request().max_tokens == room
        assert fork.branch.partial.next_request().max_tokens == room


def test_requests_that_cannot_be_answered_are_refused():
    subject, engine = session(), Engine()
    said = engine.answer(subject, ask(subject, [user("a")]), 1)
    refused(subject, [], "invalid_request", "must end with one that the policy is to answer")
    refused(subject, [user("a"), said], "invalid_request", "must end with one that the policy is to answer")
    refused(subject, [user("z")], "invalid_request", "max_tokens is 0; it must be at least 1", max_tokens=0)
    assert not subject.truncated


def test_a_turn_ends_only_when_it_is_complete():
    subject, engine = session(), Engine()
    turn = ask(subject, [user("a")])
    engine.call(subject, turn, [WORDS + 1], "abort")
    with pytest.raises(InvalidTrajectory, match="trajectory r: a turn ends that is not complete"):
        subject.end(turn)


def test_tokens_that_no_trajectory_has_are_noticed():
    subject, engine = session(), Engine()
    turn = ask(subject, [user("a")])
    engine.answer(subject, turn, 1)
    subject.branches.append(subject.branches[0])
    with pytest.raises(InvalidTrajectory, match=r"rollout r: its turns have 2 sampled tokens, its trajectories 4"):
        subject.trajectories()
