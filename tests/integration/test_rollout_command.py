"""``async-rl rollout`` and ``async-rl chat`` with the real vLLM engine, each in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import urllib.request

import psutil
import pytest

from tests.support.real_run import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture
def started(recipe, tmp_path):
    """Start a verb on the small recipe, as a terminal does: in a process group of its own."""
    made = []

    def start(verb, *words):
        command = [sys.executable, "-m", "async_rl.cli", verb, str(recipe), "--runs", str(tmp_path / "runs"), *words]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        made.append(subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes))
        return made[-1]

    yield start
    for process in made:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def assert_nothing_left(tmp_path):
    mark = str(tmp_path / "runs")
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if mark in " ".join(p.info["cmdline"] or ())]
    assert left == [], "left running"
    assert list((tmp_path / "runs").iterdir()) == [], "left behind"


def test_an_agent_s_rollouts_are_made_and_printed(started, tmp_path):
    agent = ["--rollout.agent.function", "tests.support.user_agents:forks", "--data.eval", "null"]
    process = started("rollout", "--n", "3", "--row", "2", "--json", *agent)
    out, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    lines = [json.loads(line) for line in out.splitlines()]
    assert sorted(line["rollout"] for line in lines) == ["0-2.0/0", "0-2.1/0", "0-2.2/0"]
    for line in lines:
        first, *others = line["branches"]
        assert first["origin"] == "first"
        assert first["prompt"] == line["prompt"]
        assert others, "the agent asks twice at one time"
        for branch in line["branches"]:
            sampled = [turn for turn in branch["turns"] if turn["by"] == "policy"]
            assert all(segment["version"] == 0 for turn in sampled for segment in turn["segments"])
            if "forks" in branch:
                assert branch["shared_tokens"] >= first["prompt_tokens"] + 1
        assert line["reward_parts"]["tokens"] <= line["tokens"]["sampled"]
    assert_nothing_left(tmp_path)


def test_lines_are_answered_through_the_gateway_until_ctrl_c(started, tmp_path):
    """The demo's checkpoint has no chat template: each line is continued as text."""
    process = started("chat")
    process.stdin.write("hdbca>\nbca>\n")
    process.stdin.flush()
    printed = {}
    while len(printed) < 3:
        line = process.stderr.readline()
        assert line, "it has ended"
        if line.startswith("OPENAI_"):
            name, _, printed[name] = line.rstrip("\n").partition("=")
    answers = [process.stdout.readline() for _ in range(2)]
    assert all(answer.strip() for answer in answers), answers
    body = json.dumps({"model": printed["OPENAI_MODEL"], "prompt": "ba>", "max_tokens": 5}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {printed['OPENAI_API_KEY']}"}
    request = urllib.request.Request(f"{printed['OPENAI_BASE_URL']}/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert 1 <= json.load(answer)["usage"]["completion_tokens"] <= 5
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert_nothing_left(tmp_path)
