"""OpenEnv's protocol as the environment speaks it, with a server in this process that also answers what none may.

A server of OpenEnv itself is in tests/integration/test_openenv.py.
"""

import contextlib
import json

import pytest
from websockets.asyncio.server import serve

from async_rl.errors import AgentFailure
from async_rl.rollout.environments import openenv
from async_rl.rollout.environments.instance import Failed
from tests.support.played import Says, call, calls, environments, play, summed

NAME = "async_rl.rollout.environments.openenv:OpenEnv"
TOOL = {
    "name": "add",
    "description": "Add.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}


def observed(reward=None, done=False, metadata=None, **observation):
    answer = {"observation": {**observation, "metadata": {}}, "reward": reward, "done": done}
    return {"type": "observation", "data": {**answer, **({"metadata": metadata} if metadata else {})}}


def refused(code, message="no", errors=None):
    return {"type": "error", "data": {"code": code, "message": message, **({"errors": errors} if errors else {})}}


class Server:
    """Answers a reset and each step by what ``replies`` has next; a state, and a close, always."""

    def __init__(self):
        self.replies, self.heard, self.opened, self.closed = [], [], 0, 0

    async def __call__(self, connection):
        self.opened += 1
        async for raw in connection:
            asked = json.loads(raw)
            self.heard.append(asked)
            if asked["type"] == "close":
                break
            if asked["type"] == "state":
                await connection.send(json.dumps({"type": "state", "data": {"episode_id": "e", "step_count": 7}}))
                continue
            reply = self.replies.pop(0)
            if reply == "lost":
                connection.transport.abort()
                break
            if reply == "late":
                await connection.wait_closed()
                break
            await connection.send(reply if isinstance(reply, str) else json.dumps(reply))
        self.closed += 1


@contextlib.asynccontextmanager
async def played_with(*replies, limits=None, **arguments):
    """Yield a server that gives these replies, and environments that are its sessions."""
    server = Server()
    server.replies = list(replies)
    async with serve(server, "127.0.0.1", 0) as listening:
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        settings = {"inline": True, "arguments": {"url": url, **arguments}, **(limits or {})}
        async with environments(NAME, **settings) as subject:
            await subject.start()
            yield subject, server


async def test_a_text_is_a_field_of_an_action():
    policy = Says("crane", "slate")
    replies = (
        observed(text="Guess."),
        observed(0.25, text="no"),
        observed(True, done=True, text="yes", metadata={"tries": 2}),
    )
    async with played_with(*replies, text_field="word") as (subject, server):
        played = await play(subject, policy, {"seed": 5, "reset": {"level": 3}})
    assert [asked["data"] for asked in server.heard[:3]] == [
        {"seed": 5, "episode_id": "0-1.0/0", "level": 3},
        {"word": "crane"},
        {"word": "slate"},
    ]
    assert [asked["type"] for asked in server.heard] == ["reset", "step", "step", "state", "close"]
    assert (server.opened, server.closed) == (1, 1)
    assert policy.asked[0] == [{"role": "user", "content": "abc\n\nGuess."}]
    assert policy.heard == [("user", "no")]
    assert summed(played) == {"reward": 1.25, "step_count": 7.0, "tries": 2.0, "action_errors": 0.0}
    assert played.turn_rewards == {0: 0.25, 1: 1.0}


async def test_observations_are_shown_as_json_or_by_a_field():
    for arguments, seen in (
        ({}, '{"board": [1, 2], "turn": "you"}'),
        ({"observation_field": "board"}, "[1, 2]"),
        ({"answer_chars": 4}, '{"bo\n[cut here: 32 characters are more than the 4 that are shown]'),
    ):
        policy = Says("{}")
        reply = observed(board=[1, 2], turn="you", hint=None)
        async with played_with(reply, observed(done=True), text_field="word", **arguments) as (subject, _):
            await play(subject, policy, {"prompt": [{"role": "system", "content": "S"}]})
        assert [message["content"] for message in policy.asked[0]] == ["S", seen]


async def test_an_action_in_json_that_is_none_is_told_to_the_policy():
    policy = Says("left", "[1]", '{"to": "up"}', '{"to": 2}')
    wrong = refused(
        "VALIDATION_ERROR", errors=[{"loc": ["to"], "msg": "Input should be an integer", "type": "int_type"}]
    )
    async with played_with(observed(), wrong, observed(1.0, done=True)) as (subject, server):
        played = await play(subject, policy)
    assert [said for _, said in policy.heard] == [
        "Error: an action must be a JSON object alone: Expecting value: line 1 column 1 (char 0)",
        "Error: an action must be a JSON object",
        "Error: to: Input should be an integer",
    ]
    assert policy.asked[0] == [{"role": "user", "content": "abc"}]
    assert [asked["data"] for asked in server.heard[1:3]] == [{"to": "up"}, {"to": 2}]
    assert summed(played) == {"reward": 1.0, "action_errors": 3.0, "step_count": 7.0}


async def test_tools_of_the_server_are_those_of_the_policy():
    policy = Says(
        call("add", {"a": 1}),
        call("add", {"b": 1}),
        calls(*call("add", {"a": 2}, "x")["tool_calls"], *call("add", '{"a": 3}', "y")["tool_calls"]),
        "done",
    )
    replies = (
        observed(),
        observed(tools=[TOOL]),
        observed(0.5, tool_name="add", result={"data": 3, "content": []}, error=None),
        observed(1.0, tool_name="add", result=None, error={"error_type": "execution_error", "message": "too much"}),
        observed(0.25, tool_name="add", result={"sum": 9}),
    )
    async with played_with(*replies, tools=True) as (subject, server):
        played = await play(subject, policy)
    assert [asked["data"] for asked in server.heard[1:5]] == [
        {"type": "list_tools"},
        *({"type": "call_tool", "tool_name": "add", "arguments": {"a": a}} for a in (1, 2, 3)),
    ]
    assert [tool["function"] for tool in policy.tools] == [
        {"name": "add", "description": "Add.", "parameters": TOOL["input_schema"]}
    ]
    assert [said for _, said in policy.heard] == [
        "3",
        "Error: add needs the argument a",
        "Error: too much",
        '{"sum": 9}',
    ]
    assert [m["tool_call_id"] for m in policy.asked[-1] if m["role"] == "tool"] == ["c1", "c1", "x", "y"]
    assert summed(played) == {"reward": 1.75, "tool_errors": 1.0}
    assert played.turn_rewards == {0: 0.5, 2: 1.25}


WRONG = {
    "no json": ("<html>", r"answered a step with '<html>', which OpenEnv's protocol does not have"),
    "no object": ("[]", r"answered a step with '\[\]', which"),
    "no data": (json.dumps({"type": "observation"}), "which OpenEnv's protocol does not have"),
    "another type": (json.dumps({"type": "state", "data": {}}), "which OpenEnv's protocol does not have"),
    "no observation": (json.dumps({"type": "observation", "data": {"reward": 1}}), "without an observation"),
    "a reward of text": (observed("high", board="a"), "gave the reward 'high'; expected a finite number"),
    "no finite reward": (
        '{"type": "observation", "data": {"observation": {"board": ""}, "reward": NaN}}',
        "gave the reward nan",
    ),
    "a bug": (
        refused("EXECUTION_ERROR", "list index out of range"),
        r"failed in its step: list .* \(EXECUTION_ERROR\)",
    ),
    "another field": (
        refused("VALIDATION_ERROR", errors=[{"loc": ["word"], "msg": "Extra inputs", "type": "extra_forbidden"}]),
        r"is not a text in 'word' \(word: Extra inputs\); set rollout\.agent\.arguments\.text_field",
    ),
    "nothing to see": (
        observed(text="no"),
        r"has no 'board', which rollout\.agent\.arguments\.observation_field names",
    ),
    "lost": ("lost", r"lost the connection to ws://127\.0\.0\.1:\d+/ws in its step"),
    "late": ("late", r"its step has not ended after 1 s"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_what_a_server_does_wrong_costs_one_rollout(what):
    reply, match = WRONG[what]
    limits = {"step_s": 1.0} if what == "late" else {}
    arguments = {"text_field": "word", "observation_field": "board"}
    replies = (observed(board="a"), reply, observed(board="a"), observed(1.0, done=True, board="b"))
    async with played_with(*replies, limits=limits, **arguments) as (subject, server):
        with pytest.raises(Failed, match=match):
            await play(subject, Says())
        assert (await play(subject, Says())).reward == 1.0
        assert server.opened == 2


@pytest.mark.parametrize(
    ("replies", "arguments", "match"),
    [
        ([refused("FACTORY_ERROR", "no board")], {}, r"failed in its reset: no board \(FACTORY_ERROR\)"),
        ([observed(), observed(tools=[])], {"tools": True}, r"has no tools \(none is listed\); leave"),
        (
            [observed(), refused("VALIDATION_ERROR", "Invalid message")],
            {"tools": True},
            r"failed in its step: Invalid message \(VALIDATION_ERROR\)",
        ),
        (
            [
                observed(),
                observed(tools=[TOOL]),
                observed(tool_name="add", error={"error_type": "transport_error", "message": "gone"}),
            ],
            {"tools": True},
            "could not call its tool: gone",
        ),
    ],
)
async def test_a_session_that_cannot_go_on_is_named(replies, arguments, match):
    async with played_with(*replies, **arguments) as (subject, _):
        with pytest.raises(Failed, match=match):
            await play(subject, Says(call("add", {"a": 1})))


async def test_a_session_is_waited_for_where_the_server_has_none_left(monkeypatch):
    full = refused("CAPACITY_REACHED", "1 of 1 sessions")
    async with played_with(full, observed(), observed(1.0, done=True), text_field="word") as (subject, server):
        assert (await play(subject, Says())).reward == 1.0
        assert server.opened == 2
        monkeypatch.setattr(openenv, "FREE_SESSION_S", 0.0)
        server.replies = [full]
        with pytest.raises(
            Failed, match=r"no session to spare for 0 s \(1 of 1 sessions\); set rollout\.agent\.concurr"
        ):
            await play(subject, Says())


async def test_a_server_that_is_not_there_is_named():
    async with environments(NAME, inline=True, arguments={"url": "ws://127.0.0.1:9/ws"}) as subject:
        with pytest.raises(Failed, match=r"cannot connect to ws://127\.0\.0\.1:9/ws \("):
            await play(subject, Says())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            {"url": "127.0.0.1:8000"},
            r"has the url '127\.0\.0\.1:8000'; set rollout\.agent\.arguments\.url to one such as",
        ),
        ({"url": "ws://h", "tools": True, "text_field": "w"}, "has tools true and text_field 'w'"),
        ({"url": "ws://h", "token_variable": "NO_SUCH_TOKEN"}, "NO_SUCH_TOKEN is not set"),
        ({}, r"its prepare raised TypeError.*url"),
    ],
)
async def test_arguments_that_cannot_work_are_refused_before_the_first_rollout(arguments, match):
    async with environments(NAME, inline=True, arguments=arguments) as subject:
        with pytest.raises(AgentFailure, match=match):
            await subject.start()


async def test_a_token_of_the_environment_goes_with_the_connection(monkeypatch):
    monkeypatch.setenv("SERVER_TOKEN", "secret")
    seen = []

    async def checked(connection, request):
        seen.append((request.path, request.headers.get("Authorization")))

    server = Server()
    server.replies = [observed(), observed(done=True)]
    async with serve(server, "127.0.0.1", 0, process_request=checked) as listening:
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/base/"
        arguments = {"url": url, "text_field": "w", "token_variable": "SERVER_TOKEN"}
        async with environments(NAME, inline=True, arguments=arguments) as subject:
            await play(subject, Says())
    assert seen == [("/base/ws", "Bearer secret")]
