"""A judge behind an OpenAI-compatible URL, and what it may answer instead of a number."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from async_rl.config.inputs import RewardSection
from async_rl.errors import RewardError
from async_rl.rollout.rewards import judge as module
from async_rl.rollout.rewards.runner import RewardRunner
from async_rl.rollout.rewards.score import FinishedResponse
from async_rl.types import Prompt

PROMPT = Prompt("0-17", 17, "Sort: cab", np.array([1], np.int32), {"answer": "abc"})


class Judge(BaseHTTPRequestHandler):
    """Answers as ``server.answers`` says, in turn, and then always with the last: (status, text), or None for never."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer is None:
            self.server.released.wait(10)
            return
        status, text = answer
        message = {"role": "assistant", "content": text}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        content = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
        data = json.dumps(content if status == 200 else {"error": {"message": text}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status in (429, 500):
            self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        """Nothing to say."""


@pytest.fixture
def judged(monkeypatch):
    """Return a function that has a response judged by a server with these answers; and the server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.daemon_threads = True
    server.asked, server.released = [], threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr("async_rl.rollout.user_function._BACK_OFF_S", 0.001)
    module._judgements.clear()
    made = []

    async def judged(*answers, response="abc", arguments=(), **settings):
        server.answers = list(answers)
        given = {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", **dict(arguments)}
        function = {"function": "async_rl.rollout.rewards.judge:judge", "arguments": given}
        made.append(RewardRunner(RewardSection.model_validate({**function, **settings})))
        return (await made[-1].score(PROMPT, FinishedResponse(response))).reward

    yield judged, server
    for runner in made:
        runner.close()
    server.released.set()
    server.shutdown()
    server.server_close()


async def test_the_number_on_the_last_line_is_the_reward_and_the_same_question_is_asked_once(judged, monkeypatch):
    judged, server = judged
    monkeypatch.setenv("JUDGES_KEY", "secret")
    arguments = {"question": "{prompt} {answer} {response}", "highest": 5, "key_variable": "JUDGES_KEY"}
    for _ in range(2):
        assert await judged((200, "It has 3 letters.\nScore: 4"), arguments=arguments) == 0.8
    ((path, key, body),) = server.asked
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "m")
    assert body["messages"] == [{"role": "user", "content": "Sort: cab abc abc"}]


@pytest.mark.parametrize(
    "answers",
    [
        [(429, "slow down"), (200, "10")],
        [(500, "broken"), (500, "broken"), (200, "10")],
        [(200, "I cannot say."), (200, ""), (200, "10")],
        [(200, "Score: 11"), (200, "10")],
        [None, (200, "10")],
    ],
)
async def test_a_judge_that_fails_is_asked_again(judged, answers):
    judged, server = judged
    assert await judged(*answers, timeout_s=0.5 if None in answers else 30.0) == 1.0
    assert len(server.asked) == len(answers)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, "nonsense"), r"the judge answered 'nonsense'; expected a number from 0 to 10 .*, at 2 attempts"),
        ((500, "broken"), r"raised InternalServerError: .*broken.*, at 2 attempts"),
        ((429, "slow down"), r"raised RateLimitError: .*slow down.*, at 2 attempts"),
        ((401, "no such key"), r"the judge m at http://.*/v1 refused: .*no such key"),
        ((404, "no such model"), r"the judge m at http://.*/v1 refused: .*no such model"),
    ],
)
async def test_a_judge_that_never_gives_a_number_is_named_with_what_it_said(judged, answer, message):
    judged, _ = judged
    with pytest.raises(RewardError, match=rf"^reward\.function .*judge, prompt 0-17 .dataset row 17.: .*{message}"):
        await judged(answer, retries=1)


async def test_a_judge_that_is_not_there_or_a_question_that_cannot_be_asked_is_named(judged):
    judged, _ = judged
    nowhere = {"url": "http://127.0.0.1:9/v1"}
    with pytest.raises(RewardError, match="raised APIConnectionError"):
        await judged((200, "10"), arguments=nowhere, retries=0)
    with pytest.raises(RewardError, match=r"the question '\{solution\}' cannot be filled in from row 17: KeyError"):
        await judged((200, "10"), arguments={"question": "{solution}"})
