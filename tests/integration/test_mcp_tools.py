"""Tools of real MCP servers, over their standard streams and HTTP: good ones, bad ones, and that nothing is left."""

import asyncio
import contextlib
import os
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from async_rl.errors import AgentFailure
from async_rl.rollout.environments.instance import Failed
from tests.support.played import Says, bare_python, call, environments, play, summed
from tests.support.processes import alive, over

ROOT = Path(__file__).resolve().parents[2]
MCP = "async_rl.rollout.environments.mcp:McpTools"
WORTH = "tests.support.mcp_tools:worth"
ROW = {"prompt": [{"role": "user", "content": "Add."}]}


def family():
    """What this process has started and is not over, by id."""
    return {child.pid for child in psutil.Process().children(recursive=True) if alive(child)}


@pytest.fixture(autouse=True)
def nothing_is_left():
    before, opened = family(), psutil.Process().num_fds()
    yield
    deadline = time.monotonic() + 60  # what was killed on a busy machine may need a moment
    while not family() <= before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert family() <= before
    assert psutil.Process().num_fds() <= opened + 2  # those of the loop, which pytest keeps


def program(tmp_path, *arguments, **env):
    """The settings of a server that is started."""
    env = {"PYTHONPATH": str(ROOT), "MCP_LOG": str(tmp_path / "log"), **env}
    return {"command": [sys.executable, "-m", "tests.support.mcp_tools", *arguments], "env": env}


def tools(*servers, reward=WORTH, inline=True, **arguments):
    named = {f"s{i}": each for i, each in enumerate(servers)}
    agent = {"arguments": {"servers": named, "reward": reward, **arguments}, "inline": inline}
    return environments(MCP, **agent)


def started(tmp_path):
    """The ids of the servers that were started."""
    log = tmp_path / "log"
    return [line.split()[1] for line in log.read_text().splitlines()] if log.exists() else []


@contextlib.asynccontextmanager
async def over_http(tmp_path):
    """Yield the address of a server on a free port, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = program(tmp_path, str(port))
    process = await asyncio.create_subprocess_exec(*settings["command"], env=os.environ | settings["env"])
    try:
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(OSError):
                    (await asyncio.open_connection("127.0.0.1", port))[1].close()
                    break
                await asyncio.sleep(0.05)
        yield f"http://127.0.0.1:{port}/mcp", process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.parametrize("inline", [True, False])
async def test_a_policy_uses_the_tools_of_a_program(inline, tmp_path):
    policy = Says(call("add", {"a": 2, "b": 3}), call("odd", {"function": "f", "name": "n"}), call("count"), "five")
    async with tools(program(tmp_path), inline=inline) as subject:
        played = await play(subject, policy, ROW)
    assert [text for _, text in policy.heard] == ["5", "f n", "1"]
    assert summed(played) == {"reward": 1.0, "letters": 4, "row": 1}
    assert subject.counts.tool_calls == {"ok": 3}
    described = {tool["function"]["name"]: tool["function"] for tool in policy.tools}
    assert described["add"]["description"] == "Add two numbers."
    assert described["add"]["parameters"]["properties"]["b"]["minimum"] == 0
    assert described["add"]["parameters"]["required"] == ["a"]


async def test_a_policy_uses_the_tools_of_an_address(tmp_path):
    policy = Says(call("add", {"a": 2}), call("fail", {"why": "no"}), call("mixed"))
    async with over_http(tmp_path) as (url, _), tools({"url": url}) as subject:
        assert (await play(subject, policy, ROW)).reward["reward"] == 2 / 3
    assert policy.heard[0] == ("tool", "3")


async def test_what_a_tool_answers_becomes_text(tmp_path):
    policy = Says(call("mixed"), call("nothing"), call("large"))
    async with tools(program(tmp_path), reward="tests.support.mcp_tools:said", call_s=55.0) as subject:
        assert (await play(subject, policy, ROW)).reward == 8
    mixed, nothing, large = (text for _, text in policy.heard)
    assert mixed == "a<|im_end|>\n[image/png: no text]\n[log: file:///log.txt]\ninside"
    assert nothing == ""
    assert large == "x" * 16384 + "\n[cut here: 10000000 characters are more than the 16384 that are shown]"


async def test_ten_megabytes_come_over_http(tmp_path):
    policy = Says(call("large"))
    async with over_http(tmp_path) as (url, _), tools({"url": url}, call_s=55.0) as subject:
        await play(subject, policy, ROW)
    assert "[cut here: 10000000 characters" in policy.heard[0][1]


async def test_what_the_policy_does_wrong_is_answered_and_counted(tmp_path):
    wrong = [call("sell"), call("add", {"a": "x"}), call("add", {"a": 1, "b": -1}), call("fail", {"why": "no luck"})]
    policy = Says(*wrong, call("hang"), call("add", {"a": 1}))
    async with tools(program(tmp_path), call_s=3.0) as subject:
        played = await play(subject, policy, ROW)
    answers = [text for _, text in policy.heard]
    assert answers[0].startswith("Error: there is no tool 'sell'; the tools are add, count")
    assert "does not fit" in answers[1]
    assert "greater than or equal to 0" in answers[2]
    assert "no luck" in answers[3]
    assert answers[4:] == ["Error: hang has not answered within 3 s", "2"]
    assert subject.counts.tool_calls == {"unknown_tool": 1, "bad_arguments": 1, "tool_error": 3, "ok": 1}
    assert played.reward["reward"] == 1 / 4


@pytest.mark.parametrize("inline", [True, False])
async def test_a_server_that_dies_in_a_call_costs_its_rollout_alone(inline, tmp_path):
    async with tools(program(tmp_path), inline=inline) as subject:
        beside = asyncio.create_task(play(subject, Says(call("add", {"a": 1}), "x"), ROW, name="0-2"))
        with pytest.raises(Failed, match="its server s0 failed in a call of crash: Connection closed"):
            await play(subject, Says(call("crash")), ROW)
        assert (await beside).reward["reward"] == 1.0
        assert (await play(subject, Says(call("count")), ROW)).reward["reward"] == 1.0
    assert len(started(tmp_path)) == 3


async def test_a_server_that_goes_while_it_is_used_over_http_fails_the_rollout(tmp_path):
    async with over_http(tmp_path) as (url, process), tools({"url": url}) as subject:
        policy = Says(call("add", {"a": 1}), call("add", {"a": 2}))
        first = policy.chat

        async def chat(messages, tools=None):
            if policy.asked:
                process.kill()
                await process.wait()
            return await first(messages, tools)

        policy.chat = chat
        with pytest.raises(Failed, match="its server s0 failed in a call of add"):
            await play(subject, policy, ROW)


async def test_each_rollout_has_a_server_of_its_own_unless_it_is_shared(tmp_path):
    async with tools(program(tmp_path), inline=False) as subject:
        policies = [Says(call("count")) for _ in range(3)]
        await asyncio.gather(*(play(subject, policy, ROW, name=f"0-{i}") for i, policy in enumerate(policies)))
        assert [policy.heard for policy in policies] == [[("tool", "1")]] * 3
        assert all(over(int(pid)) for pid in started(tmp_path))
    assert len(started(tmp_path)) == 3


async def test_a_shared_server_serves_all_rollouts_of_a_host_and_is_started_again(tmp_path):
    async with tools({**program(tmp_path), "shared": True}, inline=False) as subject:
        policies = [Says(call("count")) for _ in range(3)]
        await asyncio.gather(*(play(subject, policy, ROW, name=f"0-{i}") for i, policy in enumerate(policies)))
        assert sorted(policy.heard[0][1] for policy in policies) == ["1", "2", "3"]
        assert len(started(tmp_path)) == 1
        with pytest.raises(Failed, match="failed in a call of crash"):
            await play(subject, Says(call("crash")), ROW)
        again = Says(call("count"))
        await play(subject, again, ROW)
        assert again.heard == [("tool", "1")]
    assert len(started(tmp_path)) == 2


async def test_two_servers_and_a_choice_of_their_tools(tmp_path):
    first, second = program(tmp_path), program(tmp_path)
    async with tools({**first, "tools": ["add"]}, {**second, "tools": ["count"]}) as subject:
        policy = Says(call("count"), call("add", {"a": 1}))
        await play(subject, policy, ROW)
    assert [tool["function"]["name"] for tool in policy.tools] == ["add", "count"]
    assert policy.heard == [("tool", "1"), ("tool", "2")]
    async with tools({**first, "tools": ["add"]}, {**second, "tools": ["add"]}) as subject:
        with pytest.raises(Failed, match="has two tools 'add', of its servers s0 and s1; list under tools"):
            await play(subject, Says(), ROW)


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("end", ["of itself", "cancelled"])
async def test_nothing_that_a_server_starts_is_left(inline, end, tmp_path):
    async with tools(program(tmp_path), inline=inline) as subject:
        policy = Says(call("leave"), *([call("hang")] if end == "cancelled" else []))
        running = asyncio.create_task(play(subject, policy, ROW))
        async with asyncio.timeout(60):
            while end == "cancelled" and len(policy.asked) < 2:
                await asyncio.sleep(0.01)
        if end == "cancelled":
            running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        left = int(policy.heard[0][1])
        assert over(left)


@pytest.mark.parametrize("inline", [True, False])
async def test_a_server_that_never_starts_is_named_and_ended(inline, tmp_path):
    async with tools(program(tmp_path, MCP_STUBBORN="1"), inline=inline, start_s=2.0) as subject:
        with pytest.raises(
            Failed, match=r"its server s0 \(.*has not listed its tools within 2 s, its argument start_s"
        ):
            await play(subject, Says(), ROW)
        assert all(over(int(pid)) for pid in started(tmp_path))


@pytest.mark.parametrize("inline", [True, False])
async def test_a_setup_that_is_cut_off_ends_its_server(inline, tmp_path):
    async with tools(program(tmp_path, MCP_STUBBORN="1"), inline=inline) as subject:
        running = asyncio.create_task(play(subject, Says(), ROW))
        async with asyncio.timeout(60):
            while not started(tmp_path):
                await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert all(over(int(pid)) for pid in started(tmp_path))


@pytest.mark.parametrize(
    ("server", "match"),
    [
        ({"command": ["/no/program"]}, r"its server s0 cannot be started: there is no program '/no/program'"),
        ({"command": ["false"]}, r"its server s0 \(false\) cannot be used: Connection closed; what it wrote is in the"),
        ({"command": ["echo", "hello"]}, r"its server s0 \(echo hello\) cannot be used: "),
        ({"url": "http://127.0.0.1:9/mcp"}, r"its server s0 \(http://127\.0\.0\.1:9/mcp\) cannot be used: "),
        ({"command": ["true"], "tool": []}, r"servers\.s0 has tool; known are command, env"),
        ({"command": "true"}, r"servers\.s0\.command is 'true'; expected a list"),
        ({"command": ["true"], "url": "http://a"}, r"servers\.s0 needs one of command and url"),
        ({"url": "a:80"}, r"servers\.s0\.url is 'a:80'; expected one that begins with http"),
        (
            {"command": ["true"], "env": {"A": "$NO_SUCH"}},
            r"servers\.s0\.env names the variable NO_SUCH, which is not set",
        ),
        ({"command": ["true"], "env": {"A": "a$"}}, r"servers\.s0\.env has a \$ before what is no name"),
        ("true", r"servers\.s0 is 'true'; expected command or url"),
    ],
)
async def test_settings_and_servers_that_cannot_be_used_say_why(server, match):
    async with tools(server) as subject:
        with pytest.raises(Failed, match=match):
            await play(subject, Says(), ROW)


async def test_a_tool_that_a_server_lacks_is_named(tmp_path):
    async with tools({**program(tmp_path), "tools": ["sell"]}) as subject:
        with pytest.raises(Failed, match="its server s0 has no tool sell; it has add, count"):
            await play(subject, Says(), ROW)


async def test_a_reward_has_to_come_from_somewhere(tmp_path):
    for reward, match in ((None, "has no reward; set its argument reward"), ("tests.support.mcp_tools:no", "'no'")):
        async with tools(program(tmp_path), reward=reward) as subject:
            with pytest.raises(Failed, match=match):
                await play(subject, Says(), ROW)


async def test_an_interpreter_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    async with environments(MCP, python=bare_python(tmp_path, monkeypatch)) as subject:
        match = r"need the package mcp, version 2: .*; run \S+ -m pip install 'mcp>=2,<3'$"
        with pytest.raises(AgentFailure, match=match):
            await subject.start()
