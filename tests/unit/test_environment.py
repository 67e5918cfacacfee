"""The user's environment: called with texts, answered in tokens, and every way in which it can fail."""

import os
import sys

import numpy as np
import pytest

from async_rl.config.rollouts import EnvironmentSection
from async_rl.errors import EnvironmentFailure
from async_rl.rollout.environments.turns import Environment, load_environment
from async_rl.types import Prompt
from tests.support.user_workers import wait_for_no_workers

PROMPT = Prompt("0-17", 18, "abc", np.array([5, 6, 7], dtype=np.int32))
TURNS = (np.array([1, 2], np.int32), np.array([3], np.int32), np.array([4], np.int32))


class Letters:
    """A tokenizer: token n is the n-th letter."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(96 + int(i)) for i in ids)

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens, "the answer stands in the middle of a sequence"
        return [ord(letter) - 96 for letter in text]


@pytest.fixture
def environment(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    made = []

    def make(source, **settings):
        (tmp_path / "my_environment.py").write_text(f"import asyncio, os, time\n{source}")
        sys.modules.pop("my_environment", None)
        made.append(Environment(EnvironmentSection(function="my_environment:answer", **settings), Letters()))
        return made[-1]

    yield make
    for each in made:
        each.close()
    sys.modules.pop("my_environment", None)
    wait_for_no_workers()


@pytest.mark.parametrize("prefix", ["", "async "])
async def test_it_is_given_the_turns_as_text_and_answers_in_tokens(environment, prefix):
    subject = environment(f"{prefix}def answer(prompt, turns): return prompt.text + '|'.join(turns).replace('|', '')")
    assert (await subject.answer(PROMPT, TURNS, [])).tolist() == [1, 2, 3, 1, 2, 3, 4]
    assert (await subject.answer(PROMPT, TURNS, [])).dtype == np.int32


async def test_an_object_with_an_async_call_is_an_environment(environment):
    source = "class Game:\n    async def __call__(self, prompt, turns): return 'ab'\nanswer = Game()"
    assert (await environment(source).answer(PROMPT, TURNS, [])).tolist() == [1, 2]


async def test_a_plain_function_runs_in_another_process_unless_it_is_said_to_be_fast(environment):
    source = "def answer(prompt, turns): return 'a' if os.getpid() == {} else 'b'"
    for slow, letter in ((True, 2), (False, 1)):
        subject = environment(source.format(os.getpid()), slow=slow)
        assert (await subject.answer(PROMPT, TURNS, [])).tolist() == [letter]


async def test_only_the_turns_since_the_last_call_are_decoded(environment):
    """Else the time for it would grow with the square of the turns."""
    subject, texts, decoded = environment("async def answer(prompt, turns): return ''.join(turns)"), [], []
    letters = subject._tokenizer
    letters.decode = lambda ids, **options: (decoded.append(len(ids)), Letters().decode(ids))[1]
    assert (await subject.answer(PROMPT, TURNS[:1], texts)).tolist() == [1, 2]
    assert (await subject.answer(PROMPT, TURNS, texts)).tolist() == [1, 2, 3, 4]
    assert decoded == [2, 1, 1]


async def test_none_ends_the_response(environment):
    assert await environment("async def answer(prompt, turns): return None").answer(PROMPT, TURNS, []) is None


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("def answer(prompt, turns): return {}['x']", {}, "raised KeyError: 'x'"),
        ("def answer(prompt, turns): return 7", {}, "returned 7 of type int; expected a string, a list of messages"),
        ("def answer(prompt, turns): return 'a\\ud800'", {}, r"returned 'a\ud800', which has half of a surrogate pair"),
        ("def answer(prompt, turns): return ''", {}, "returned '', which has no tokens; return None to end"),
        ("def answer(prompt, turns): return 'a' * (2**20 + 1)", {}, "returned 1048577 characters; expected at most"),
        ("def answer(prompt, turns): time.sleep(600)", {"timeout_s": 0.05, "slow": True}, "timeout_s = 0.05 s"),
        ("def answer(prompt, turns): os._exit(3)", {"slow": True}, "ended its process: EXIT(3)"),
        ("def answer(prompt, turns): raise SystemExit(3)", {}, "raised SystemExit: 3"),
        ("def answer(prompt, turns): raise StopIteration", {}, "raised StopIteration"),
        ("async def answer(prompt, turns): raise asyncio.CancelledError", {}, "raised CancelledError"),
    ],
)
async def test_a_failure_names_function_row_and_what_it_did(environment, source, settings, message):
    with pytest.raises(EnvironmentFailure, match=r"my_environment:answer, prompt 0-17 \(dataset row 18\): ") as caught:
        await environment(source, **{"slow": False} | settings).answer(PROMPT, TURNS, [])
    assert message in str(caught.value)


@pytest.mark.parametrize(("retries", "answers"), [(2, True), (1, False)])
async def test_an_environment_that_asks_something_is_tried_again(environment, monkeypatch, retries, answers):
    monkeypatch.setattr("async_rl.rollout.user_function._BACK_OFF_S", 0.001)
    source = (
        "calls = []\n"
        "async def answer(prompt, turns):\n"
        "    calls.append(turns)\n"
        "    if len(calls) < 3: raise OSError('busy')\n"
        "    return 'a'\n"
    )
    subject = environment(source, retries=retries)
    if answers:
        assert (await subject.answer(PROMPT, TURNS, [])).tolist() == [1]
    else:
        with pytest.raises(EnvironmentFailure, match=r"row 18\): raised OSError: busy, at 2 attempts$"):
            await subject.answer(PROMPT, TURNS, [])
    calls = sys.modules["my_environment"].calls
    assert calls == [("ab", "c", "d")] * (1 + retries)


async def test_after_close_it_is_not_called(environment):
    subject = environment("def answer(prompt, turns): return 'a'")
    subject.close()
    with pytest.raises(EnvironmentFailure, match="shutting down"):
        await subject.answer(PROMPT, TURNS, [])


def test_what_cannot_be_called_is_refused_when_loaded():
    with pytest.raises(
        EnvironmentFailure, match=r"rollout\.environment\.function: 'math:nothing'.*no function 'nothing'"
    ):
        load_environment("math:nothing")
    with pytest.raises(EnvironmentFailure, match=r"cannot be called as f\(prompt, turns\)"):
        load_environment("async_rl.rollout.environments.named:environments_of")
