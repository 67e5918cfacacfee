"""``async-rl chat`` around a scripted engine: what it says, what it sends, how it ends."""

import os
import threading
import time
import urllib.request

import pytest
import structlog

from async_rl.config.loading import validate
from async_rl.driver import chat_command, lone_worker
from async_rl.errors import DatasetError, EngineDied, EngineError
from async_rl.rollout.engine.interface import EngineOutput
from tests.support.agent_sessions import CHAT, END, WORDS, ids, render
from tests.support.gateway_parts import Letters
from tests.support.scripted_engine import Layout, Script, ScriptedEngine


class Says(ScriptedEngine):
    """Answers each call with two words and a stop token."""

    made, error, over = None, None, None

    def __init__(self, config, replica, cores=None):
        super().__init__(config, replica, cores, Script(layout=Layout(None, frozenset({END}), 10_000)))
        self.sent, self.ended, Says.made = [], False, self

    async def generate(self, request_id, token_ids, sampling, max_tokens, first_row=0):
        if self.error is not None:
            raise self.error
        self.sent.append((Letters().decode(token_ids), max_tokens))
        said = [WORDS + 1, WORDS + len(self.sent), END][:max_tokens]
        zeros = ids(*[0] * len(said))
        return EngineOutput(ids(*said), zeros.astype("float32"), zeros, None, "stop" if END in said else "length")

    async def shutdown(self):
        self.ended = True
        self.over.set()
        await super().shutdown()


class Encoder:
    tokenizer = Letters()
    templated = True

    def template(self, tools=None):
        if not self.templated:
            raise DatasetError("no template")
        return "template"

    chat = staticmethod(render)


@pytest.fixture
def chat(tmp_path, monkeypatch, capsys):
    """Talk, a line at a time; returns the exit code and what was said."""
    monkeypatch.setattr(lone_worker, "load_engine", lambda name: Says)
    monkeypatch.setattr(lone_worker.logs, "configure", lambda *_, **__: None)
    monkeypatch.setattr(chat_command.reading, "encoder", lambda config: Encoder())
    monkeypatch.setattr(Says, "over", threading.Event())
    monkeypatch.setattr("async_rl.rollout.chat.chat_turns", lambda config: CHAT)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    def talk(text, before_it_ends=None, pipe=os.pipe, **settings):
        read, write = pipe()
        os.write(write, text.encode())

        def end():
            if before_it_ends is not None:
                before_it_ends()
            if pipe is os.pipe:
                os.close(write)

        threading.Thread(target=end).start()
        data = {"train": "none.jsonl", "max_prompt_tokens": 100, **settings}
        tree = {"runs": str(tmp_path / "runs"), "model": {"path": str(tmp_path / "model")}, "data": data}
        config = validate({"name": "demo", **tree, "rollout": {"max_response_tokens": 20}})
        with os.fdopen(read) as stream, structlog.testing.capture_logs():
            monkeypatch.setattr("sys.stdin", stream)
            code = chat_command.run(config)
        if pipe is not os.pipe:
            os.close(write)
        assert Says.made.ended
        assert list((tmp_path / "runs").iterdir()) == []
        said = capsys.readouterr()
        return code, said.out, said.err

    return talk


def test_each_line_is_answered_and_what_was_said_stays_the_tokens_that_were_sampled(chat):
    code, answers, said = chat("hi\n\nho\n/new\nhu")
    assert (code, answers) == (0, " 1 1\n 1 2\n 1 3\n")
    sent = [text for text, _ in Says.made.sent]
    assert sent == ["<5>hi<1><3><6>", "<5>hi<1><3><6> 1 1<1><3><5>ho<1><3><6>", "<5>hu<1><3><6>"]
    assert {most for _, most in Says.made.sent} == {20}, "an answer may be as long as in the run"
    assert "OPENAI_BASE_URL=http://127.0.0.1:" in said


def test_in_a_terminal_it_asks_until_ctrl_d(chat):
    def terminal():
        master, slave = os.openpty()
        return slave, master

    code, answers, said = chat("hi\n\x04", pipe=terminal)
    assert (code, answers) == (0, ">  1 1\n> ")
    assert "/new begins another conversation, Ctrl-D ends" in said


def test_a_checkpoint_without_a_template_continues_each_line(chat, monkeypatch):
    monkeypatch.setattr(Encoder, "templated", False)
    code, answers, said = chat("hi\nho\n")
    assert (code, answers) == (0, " 1 1\n 1 2\n")
    assert [text for text, _ in Says.made.sent] == ["hi", "ho"]
    assert "no chat template" in said


def test_the_system_prompt_of_the_settings_is_sent(chat):
    chat("hi\n", system_prompt="be", format="messages")
    assert Says.made.sent[0][0] == "<4>be<1><3><5>hi<1><3><6>"


def test_a_conversation_may_fill_the_context_of_the_run_and_no_more(chat):
    code, answers, said = chat("a" * 50 + "\n" + "b" * 80 + "\nc\n")
    assert (code, answers) == (0, " 1 1\n 1 2\n")
    assert "a context may have 120" in said
    assert "/new begins another conversation" in said


def test_another_client_is_answered_while_it_lasts(chat, capsys):
    found = []

    def ask():
        text, until = "", time.monotonic() + 60
        while "OPENAI_MODEL" not in text and time.monotonic() < until:
            time.sleep(0.01)
            text += capsys.readouterr().err  # which takes it away
        url = next(line.partition("=")[2] for line in text.splitlines() if line.startswith("OPENAI_BASE_URL"))
        with urllib.request.urlopen(f"{url}/models") as answer:
            found.append(answer.read())

    assert chat("", before_it_ends=ask)[0] == 0
    assert b'"id": "model"' in found[0]


def test_an_engine_that_dies_ends_it(chat, monkeypatch):
    monkeypatch.setattr(Says, "error", EngineDied("gone"))
    with pytest.raises(EngineError, match=r"gone \(logs: "):
        chat("hi\n", before_it_ends=lambda: Says.over.wait(60))
    assert Says.made.ended
