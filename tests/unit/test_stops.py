"""Where responses end: the same tokens after any interruptions, whether or not the engine looks for stop strings."""

import asyncio
import itertools
from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from async_rl.config.inputs import Terms
from async_rl.rollout.engine.interface import EngineOutput, Sampling
from async_rl.rollout.engine.vllm.stopping import StoppingDetokenizer
from async_rl.rollout.evaluation import EvalProblem
from async_rl.rollout.partial import PartialRollout
from async_rl.rollout.stop_strings import StopStrings
from async_rl.rollout.stops import Stops
from async_rl.types import Prompt, RoutingSpec
from tests.support.scripted_replica import Digits, ListQueue, push, sampled, scripted, worker

EOS, ENDS = 0, 1
PIECES = [b"<eos>", b"!", b"a", b"b", b"ab", b" ", b"\xc3", b"\xa9", b"b a\xc3"]
PROMPT = np.array([4, 2, 3], np.int32)  # abab: the text of a prompt ends nothing
SPEC = RoutingSpec(num_moe_layers=1, top_k=1, num_experts=256)


def decode(tokens):
    """The text of tokens as a byte-level tokenizer shows it that strips a space at the beginning, as some do."""
    return b"".join(PIECES[token] for token in tokens).decode(errors="replace").removeprefix(" ")


def engine_call(response, done, upto, strings, searched):
    """What an engine returns that samples ``response`` from ``done`` on until it is interrupted at ``upto``."""
    tokens, finish = [], "abort"
    detokenizer = StoppingDetokenizer(SimpleNamespace(update=lambda *_: None), strings, np.array(response[:done]))
    for token in response[done:upto]:
        tokens.append(token)
        if token in (EOS, ENDS):
            finish = "stop"
            break
        if searched and detokenizer.update([token], False):
            finish = "stop"
            break
    if done + len(tokens) == len(response) and finish == "abort":
        finish = "length"
    rows = np.arange(len(PROMPT) + done + len(tokens) - 1, dtype=np.uint8).reshape(-1, 1, 1)
    logprobs = -np.arange(done, done + len(tokens), dtype=np.float32)
    versions = np.full(len(tokens), upto % 3, np.int32)
    return EngineOutput(np.array(tokens, np.int32), logprobs, versions, rows if tokens else None, finish)


def ended(response, cuts, stop, searched):
    """The response's end after calls that end at ``cuts``."""
    stops = Stops(stop, {EOS, ENDS}, decode)
    partial = PartialRollout.begin(
        "t", PROMPT, max_response_tokens=len(response), eos_token_id={EOS, ENDS}, routing_spec=SPEC
    )
    for upto in [*cuts, len(response)]:
        done = len(partial.response_ids)
        if done < upto and not partial.finished:
            strings = StopStrings(stop, decode)
            partial = partial.absorb(stops.cut(partial, engine_call(response, done, upto, strings, searched)))
    return partial.to_trajectory()


@given(
    # Stop tokens at the very end, if at all, so that most responses get to a stop string.
    st.lists(st.integers(2, len(PIECES) - 1), min_size=4, max_size=10).flatmap(
        lambda tokens: st.sampled_from([tokens, [*tokens, EOS], [*tokens, ENDS]])
    ),
    st.lists(st.sampled_from(["aba", "bb", "b ", "é", "abab"]), min_size=1, max_size=2),
    st.integers(1, 9),
)
def test_a_response_that_is_cut_anywhere_ends_at_the_same_token_as_one_that_is_not(response, stop, also):
    whole = ended(response, [], stop, searched=False)
    for cut, searched in itertools.product(range(1, len(response)), (True, False)):
        found = ended(response, sorted({cut, min(also, len(response) - 1)}), stop, searched)
        assert found.response_ids.tolist() == whole.response_ids.tolist(), (cut, searched)
        assert (found.logprobs.tolist(), found.finish_reason) == (whole.logprobs.tolist(), whole.finish_reason)
        assert len(found.routed_experts) == len(PROMPT) + len(whole.response_ids) - 1
    # And that token is the first stop token, or the first with which the text has a stop string.
    texts = [decode(response[: n + 1]) for n in range(len(response))]
    ends = [n for n, text in enumerate(texts) if response[n] in (EOS, ENDS) or any(s in text for s in stop)]
    assert len(whole.response_ids) == (ends[0] + 1 if ends else len(response))
    assert whole.finish_reason == ("stop" if ends else "length")


def test_a_stop_string_over_two_turns_ends_neither():
    stops = Stops(["aba"], (), decode)
    partial = PartialRollout.begin("t", PROMPT, max_response_tokens=9, eos_token_id=EOS, routing_spec=None)
    partial = partial.absorb(_output([4, EOS])).append_turn(np.array([2, 3], np.int32))
    assert stops.sampling(Sampling(1.0, 1.0), partial).turn_start == len(PROMPT) + 4
    output = _output([2, 7, 4, 2, 3])
    assert stops.cut(partial, output).token_ids.tolist() == [2, 7, 4, 2]


def _output(tokens):
    count = len(tokens)
    return EngineOutput(
        np.array(tokens, np.int32), np.zeros(count, np.float32), np.zeros(count, np.int32), None, "stop"
    )


class Letters(Digits):
    """Its tokens are letters: 1 is b."""

    def decode(self, ids, **_):
        return "".join(chr(ord("a") + int(token) % 26) for token in ids)


async def test_a_worker_ends_responses_at_a_stop_string_that_a_push_cuts():
    engine, queue, letters = scripted(length=30), ListQueue(1), Letters()
    rollout = {"n": 2, "max_num_seqs": 4, "max_response_tokens": 40, "stop": ["klmno", "never"]}
    subject, _ = worker(engine, queue, digits=letters, rollout=rollout)
    run = asyncio.create_task(subject.run())
    await sampled(engine, 2 * 12)
    await push(subject, engine)
    await run
    (group,) = queue.groups
    for trajectory in group.trajectories:
        assert letters.decode(trajectory.response_ids) == "bcdefghijklmno"
        assert trajectory.finish_reason == "stop"
        assert trajectory.is_partial


async def test_stop_tokens_of_the_settings_end_responses_and_evaluations_of_an_engine_that_does_not_know_them():
    engine, queue = scripted(length=30), ListQueue(1)
    rollout = {"n": 2, "max_num_seqs": 4, "max_response_tokens": 40, "stop_token_ids": [7, 9]}
    subject, _ = worker(engine, queue, rollout=rollout)
    await subject.run()
    assert [t.response_ids.tolist() for t in queue.groups[0].trajectories] == [[1, 2, 3, 4, 5, 6, 7]] * 2
    result = await subject.evaluate([EvalProblem(Terms("held_out", 40), Prompt("eval-1", 1, "abc", PROMPT))])
    assert [answer.scored.tokens for answer in result.answers] == [(7,)]
