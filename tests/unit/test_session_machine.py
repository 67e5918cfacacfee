"""Random histories against invariant 12: whatever an agent does to a session, and whatever interrupts it.

The model beside the session is a list of all tokens that the engine has sampled, by their log-probs, which number them.
"""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from async_rl.errors import RequestRefused
from async_rl.types import NOT_SAMPLED
from tests.support.agent_sessions import CALL_END, END, WORDS, Engine, ask, ids, message_of, missing, session, user
from tests.support.examples import examples

TOOLS = [{"type": "function", "function": {"name": "add"}}]
POLICIES = ["replace", "preserve", "exact"]
LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "context_tokens": st.integers(10, 60),
        "response_tokens": st.integers(1, 40),
        "sampled_tokens": st.integers(1, 20),
        "turns": st.integers(1, 6),
        "branches": st.integers(1, 4),
    },
)


class Agents(RuleBasedStateMachine):
    """Several requests at one time, of messages, tokens and text; calls cut anywhere, turns that fail anywhere."""

    def __init__(self):
        super().__init__()
        self.engine = Engine()
        self.turns = {}  # each open turn: (its messages or None, tools, the log-probs that were sampled for it)
        self.ended = []  # (turn, its messages with what the policy said or None, tools, log-probs)
        self.sent = []  # (turn, tokens of a call)

    @initialize(policy=st.sampled_from(POLICIES), limits=LIMITS)
    def begin(self, policy, limits):
        self.policy, self.session = policy, session(policy, **limits)

    def states(self):
        return [(branch, branch.partial, branch.history, branch.open) for branch in self.session.branches]

    def opened(self, make, messages=None, tools=None):
        """Begin a turn; a refusal must change nothing, and a turn that begins no branch but its own."""
        before = self.states()
        try:
            turn = make()
        except RequestRefused:
            assert self.states() == before
            return None
        if turn is None:
            assert self.states() == before
            return None
        assert [s for s in self.states() if s[0] is not turn.branch] == [s for s in before if s[0] is not turn.branch]
        self.turns[turn] = (messages, tools, [])
        return turn

    @rule(
        data=st.data(),
        tools=st.sampled_from([None, TOOLS]),
        more=st.lists(st.tuples(st.sampled_from(["user", "tool"]), st.text("ab", max_size=2)), min_size=1, max_size=3),
        room=st.none() | st.integers(1, 6),
    )
    def ask(self, data, tools, more, room):
        """Send a stored history, as it was, cut short or with a message edited, or none; and more messages after it."""
        history, used = [], tools
        if self.ended and data.draw(st.integers(0, 3)):
            _, stored, used, _ = data.draw(st.sampled_from(self.ended))
            history = list(stored or [])
            used = used if data.draw(st.booleans()) else tools
            if history and data.draw(st.booleans()):
                history = history[: data.draw(st.integers(0, len(history)))]
            if history and data.draw(st.booleans()):
                at = data.draw(st.integers(0, len(history) - 1))
                history[at] = {**history[at], "content": data.draw(st.sampled_from(["p", "q"]))}
        history += [{"role": role, "content": content} for role, content in more]
        after = self.session.find(history, used).after
        stored = ids() if after is None else after.branch.tokens[: after.stop]
        turn = self.opened(lambda: ask(self.session, history, used, room), history, used)
        if turn is not None:
            prompt = turn.branch.tokens[: turn.start].tolist()
            mismatch = stored[-1:].tolist() == [CALL_END]  # the template writes END in its place, in any fork
            assert mismatch or turn.how != "stop_mismatch"
            kept = len(stored) - mismatch
            assert prompt[:kept] == stored.tolist()[:kept], "what was stored up to the turn, token by token"
            assert max(prompt[kept:]) < WORDS, "and nothing that was sampled after it"

    @precondition(lambda self: self.ended)
    @rule(data=st.data(), more=st.lists(st.integers(10, 12), max_size=3))
    def ask_with_tokens(self, data, more):
        """Send the tokens of a stored turn, some of them, and others behind."""
        turn, *_ = data.draw(st.sampled_from(self.ended))
        tokens = turn.branch.tokens[: data.draw(st.sampled_from([turn.stop, turn.start, turn.stop - 1]))]
        place, rest = self.session.find_tokens(np.concatenate([tokens, ids(*more)]).astype(np.int32))
        self.opened(lambda: self.session.begin(place, rest))

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def text_after(self, data):
        turn, *_ = data.draw(st.sampled_from(self.ended))
        self.opened(lambda: self.session.begin(self.session.find_after(turn), ids(20, 21)))

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def two_at_once(self, data):
        """Find the places of two requests before either begins."""
        _, history, tools, _ = data.draw(st.sampled_from(self.ended))
        history = [*(history or []), user("c")]
        places = [self.session.find(history, tools) for _ in range(2)]
        for place in places:
            self.opened(lambda place=place: self.session.begin(place, missing(place, tools)), history, tools)

    @precondition(lambda self: self.turns)
    @rule(
        data=st.data(), words=st.lists(st.integers(1, 5), max_size=4), end=st.sampled_from(["abort", "abort", "stop"])
    )
    def call(self, data, words, end):
        """Make an engine call for an open turn, which a push may end early, also before its first token."""
        turn = data.draw(st.sampled_from(list(self.turns)))
        if turn.branch.partial.finished:
            return
        words = [WORDS + word for word in words]
        if end == "stop":
            words.append(data.draw(st.sampled_from([END, CALL_END, WORDS + 9])))
        self.sent.append((turn, turn.branch.partial.next_request().token_ids))
        self.turns[turn][2].extend(self.engine.call(self.session, turn, words, end))

    @rule()
    def push(self):
        self.engine.version += 1

    @precondition(lambda self: self.turns)
    @rule(data=st.data())
    def answer(self, data):
        """Complete a turn, and end it."""
        turn = data.draw(st.sampled_from(list(self.turns)))
        if not turn.branch.partial.finished:
            self.turns[turn][2].extend(self.engine.call(self.session, turn, [WORDS + 1, END], "stop"))
        self.end(turn)

    def end(self, turn):
        messages, tools, logprobs = self.turns.pop(turn)
        said = None if messages is None else message_of(turn)
        self.session.end(turn, said)
        self.ended.append((turn, None if said is None else [*messages, said], tools, logprobs))

    @precondition(lambda self: self.turns)
    @rule(data=st.data())
    def fail(self, data):
        turn = data.draw(st.sampled_from(list(self.turns)))
        before, late = turn.before, turn.branch.partial
        self.session.undo(turn)
        self.session.keep(turn, late)
        del self.turns[turn]
        if before is None:
            assert turn.branch not in self.session.branches
        else:
            assert (turn.branch.partial, turn.branch.history) == before
            assert turn.branch.partial.finish_reason == "stop"

    @invariant()
    def invariant_1_each_branch_is_aligned(self):
        for branch in getattr(self, "session", session()).branches:
            branch.partial.check()

    @invariant()
    def invariant_12_what_was_sent_is_a_prefix_of_the_branch(self):
        for turn, sent in self.sent:
            if turn.state != "failed":
                assert turn.branch.tokens[: len(sent)].tolist() == sent.tolist()

    def teardown(self):
        """Invariant 12 at the end: the sampled tokens of all trajectories are those of all turns that ended."""
        if not hasattr(self, "session"):
            return
        made = self.session.trajectories()
        assert len({t.trajectory_id for t in made}) == len(made)
        found = np.sort(np.concatenate([np.zeros(0), *(t.logprobs[t.sampled] for t in made)]))
        sampled = np.sort(np.array([value for *_, values in self.ended for value in values], np.float32))
        assert found.tolist() == sampled.tolist()
        for turn, *_, values in self.ended:
            partial = turn.branch.partial
            at = turn.start - len(partial.prompt_ids)
            own = partial.logprobs[at : turn.stop - len(partial.prompt_ids)]
            assert own.tolist() == np.array(values, np.float32).tolist(), "as recorded, and where they were sampled (3)"
            assert (partial.versions[at : at + len(own)] != NOT_SAMPLED).all()
        for trajectory in made:  # building them has checked alignment (1) and rows
            if self.policy == "replace":
                assert len(np.unique(trajectory.routed_experts)) == 1, "rows of one call, never two (2)"


Agents.TestCase.settings = settings(max_examples=examples(400), stateful_step_count=40, deadline=None)
TestAgents = Agents.TestCase
