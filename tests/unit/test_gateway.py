"""The gateway of agents, asked by the client that OpenAI publishes: answers, errors, repetitions, patience."""

import asyncio
import json

import httpx
import openai
import pytest

from async_rl.errors import EngineDied, RowFault
from async_rl.rollout.aside import DECODED_BYTES
from async_rl.rollout.gateway import app, endpoint
from async_rl.rollout.gateway.requests import text_request
from tests.support.agent_sessions import END, LETTERS, WORDS, user
from tests.support.chat_families import FAMILIES, tokenizer
from tests.support.gateway_parts import CONTEXT, served

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
ASKED = [user("a")]


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_conversation_over_several_requests_is_one_trajectory():
    async with served() as subject, subject.client() as client:
        history = [user("a")]
        for index in range(3):
            answer = await client.chat.completions.create(model="any", messages=history, logprobs=True)
            (choice,) = answer.choices
            assert (choice.message.content, choice.finish_reason, answer.model) == ("1 2", "stop", "tiny")
            assert answer.usage.completion_tokens == 3
            assert [each.logprob for each in choice.logprobs.content] == [-0.5 - index, -1.0 - index, -1.0 - index]
            assert [each.token for each in choice.logprobs.content] == [" 1", " 2", f"<{END}>"]
            history += [choice.message.model_dump(exclude_none=True), user("b")]
        assert subject.session.ways == {"first": 1, "extended": 2}
        (made,) = subject.session.trajectories()
        assert (made.sampled.sum(), len(made.resume_points)) == (9, 3)
        assert answer.usage.prompt_tokens == len(made.prompt_ids) + len(made.response_ids) - 3
        assert subject.gateway.requests == {("chat", 200): 3}


async def test_a_stream_is_the_finished_turn():
    async with served() as subject, subject.client() as client:
        stream = await client.chat.completions.create(
            model="m", messages=ASKED, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        said = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
        assert (said, chunks[1].choices[0].finish_reason) == (["1 2", None], "stop")
        assert chunks[-1].usage.completion_tokens == 3
        assert len({chunk.id for chunk in chunks}) == 1
        texts = await client.completions.create(model="m", prompt="ab", stream=True)
        assert [chunk.choices[0].text async for chunk in texts] == ["1 2", ""]


async def test_completions_of_text_and_of_tokens():
    async with served() as subject, subject.client() as client:
        first = await client.completions.create(
            model="m", prompt="ab", logprobs=1, extra_body={"return_token_ids": True}
        )
        sent = [LETTERS + ord("a"), LETTERS + ord("b")]
        said = first.choices[0].token_ids
        assert (first.choices[0].text, said) == ("1 2", [WORDS + 1, WORDS + 2, END])
        assert first.choices[0].logprobs.token_logprobs == [-0.5, -1.0, -1.0]
        assert first.choices[0].logprobs.text_offset == [0, 2, 4]
        await client.completions.create(model="m", prompt=[*sent, *said, LETTERS], max_tokens=1)
        (made,) = subject.session.trajectories()
        assert made.prompt_ids.tolist() == sent
        assert made.response_ids.tolist() == [*said, LETTERS, WORDS + 1]
        assert made.finish_reason == "length"


async def test_the_key_comes_in_the_header_or_in_the_path():
    async with served() as subject:
        for address, key in ((subject.policy.base_url, "of another"), (f"{subject.root}/v1", subject.policy.api_key)):
            async with subject.client(base_url=address, api_key=key) as client:
                (model,) = (await client.models.list()).data
                assert (model.id, model.max_model_len) == (subject.policy.model, CONTEXT)


async def test_tokenize_and_detokenize():
    async with served() as subject, httpx.AsyncClient(base_url=f"{subject.root}/r/{subject.policy.api_key}") as client:
        found = (await client.post("/tokenize", json={"prompt": "ab"})).json()
        assert (found["tokens"], found["count"], found["max_model_len"]) == (
            [LETTERS + ord("a"), LETTERS + ord("b")],
            2,
            CONTEXT,
        )
        chat = (await client.post("/v1/tokenize", json={"messages": ASKED})).json()["tokens"]
        await subject.policy.chat(ASKED)
        assert chat == subject.session.branches[0].partial.prompt_ids.tolist()
        assert (await client.post("/detokenize", json={"tokens": [*found["tokens"], END]})).json() == {
            "prompt": "ab<1>"
        }
        assert (await client.post("/detokenize", json={"tokens": [10**6]})).status_code == 400


async def test_what_belongs_to_the_run_is_ignored_and_counted_and_the_rest_reaches_the_policy():
    async with served() as subject, subject.client() as client:
        answer = await client.chat.completions.create(
            model="m",
            messages=ASKED,
            temperature=0.1,
            top_p=0.5,
            frequency_penalty=0.5,
            seed=3,
            max_completion_tokens=1,
            stop=["x", "y"],
            tools=[TOOL],
            user="somebody",
        )
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 1)
        assert subject.gateway.ignored == {"temperature": 1, "top_p": 1, "frequency_penalty": 1, "seed": 1}
        assert subject.call.stops == [("x", "y")]
        named = subject.session.branches[0].partial.prompt_ids.tolist()
        await client.chat.completions.create(model="m", messages=[user("b")], tools=[TOOL], tool_choice="none")
        assert named[:4] == [LETTERS + ord(c) for c in "look"]
        assert subject.session.branches[1].partial.prompt_ids.tolist()[:4] != named[:4]


async def test_a_stop_string_is_no_part_of_the_message():
    async with served() as subject, subject.client() as client:
        answer = await client.chat.completions.create(model="m", messages=ASKED, stop=[" 2"])
        assert answer.choices[0].message.content == "1"
        history = [*ASKED, {"role": "assistant", "content": "1"}, user("b")]
        await client.chat.completions.create(model="m", messages=history)
        assert subject.session.ways == {"first": 1, "extended": 1}


BAD = [
    ({"messages": []}, "messages", "messages has no messages"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages", "the role is 'robot'"),
    ({"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}])]}, "messages", "only text can be trained"),
    ({"messages": [*ASKED, {"role": "assistant", "content": "x"}]}, None, "one that the policy is to answer"),
    ({"messages": "a"}, "messages", "messages is str, not a list"),
    ({"tools": [{"type": "function"}]}, "tools", "no name of a function"),
    ({"n": 2}, "n", "n is 2"),
    ({"stream": 1}, "stream", "true or false"),
    ({"stop": [""]}, "stop", "none of them empty"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_completion_tokens": "many"}, "max_completion_tokens", "an integer"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "not sampled with"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not sampled with"),
    ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice", "not sampled with"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "not sampled with"),
    ({"guided_json": {"type": "object"}}, "guided_json", "not sampled with"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "not sampled with"),
    ({"ignore_eos": True}, "ignore_eos", "not sampled with"),
    ({"top_logprobs": 3, "logprobs": True}, "top_logprobs", "not sampled with"),
]


@pytest.mark.parametrize(
    ("fields", "field", "match"), BAD, ids=[f"{next(iter(each[0]))}-{i}" for i, each in enumerate(BAD)]
)
async def test_a_bad_request_is_refused_with_its_field_and_changes_nothing(fields, field, match):
    async with served() as subject, subject.client() as client:
        with pytest.raises(openai.BadRequestError, match=match) as caught:
            await client.post("/chat/completions", cast_to=object, body={"messages": ASKED, **fields})
        assert (caught.value.type, caught.value.code, caught.value.param) == (
            "invalid_request_error",
            "invalid_request",
            field,
        )
        assert (subject.session.branches, subject.call.calls) == ([], [])


@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff"])
async def test_a_body_that_is_no_json_object_is_refused(body):
    async with served() as subject, httpx.AsyncClient() as client:
        answer = await client.post(f"{subject.policy.base_url}/completions", content=body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("prompt", ["", [], ["a", "b"], [[1], [2]], [1, "a"], [-1], [10**6]])
async def test_a_bad_prompt_is_refused(prompt):
    async with served() as subject, subject.client() as client:
        with pytest.raises(openai.BadRequestError):
            await client.post("/completions", cast_to=object, body={"prompt": prompt})
        assert subject.call.calls == []


async def test_what_the_template_refuses_is_said_in_its_words():
    async with served() as subject, subject.client() as client:

        def refuse(*_):
            raise RowFault("the chat template refuses the row: roles must alternate")

        subject.policy._chat = type("Refusing", (), {"prompt": refuse, "after": refuse})()
        with pytest.raises(openai.BadRequestError, match="roles must alternate"):
            await client.chat.completions.create(model="m", messages=ASKED)
        assert not subject.failed.done()


async def test_no_room_and_a_budget_that_is_spent_have_codes_of_their_own():
    async with served(turns=1) as subject, subject.client() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="m", messages=[user("a" * CONTEXT)])
        assert caught.value.code == "context_length_exceeded"
        await client.chat.completions.create(model="m", messages=ASKED)
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="m", messages=ASKED)
        assert caught.value.code == "rollout_budget_exceeded"
        assert subject.session.truncated


async def test_a_key_that_is_unknown_or_whose_rollout_has_ended_opens_nothing():
    async with served() as subject, subject.client() as client:
        subject.call.hold = asyncio.Event()
        straggler = asyncio.create_task(client.chat.completions.create(model="m", messages=ASKED))
        await until(lambda: subject.call.calls)
        async with subject.client(base_url=f"{subject.root}/v1", api_key="sk-guessed") as other:
            with pytest.raises(openai.AuthenticationError):
                await other.models.list()
        await subject.gateway.end(subject.policy.api_key)
        with pytest.raises(openai.AuthenticationError):
            await straggler
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(model="m", messages=ASKED)
        assert subject.session.trajectories() == ()


async def test_a_request_that_arrives_while_its_rollout_ends_writes_nothing():
    async with served() as subject:
        port = int(subject.root.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps({"messages": ASKED}).encode()
        key = subject.policy.api_key
        writer.write(
            f"POST /r/{key}/v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body[:5]
        )
        only = subject.gateway._endpoints[key]
        await until(lambda: only.calls)
        await subject.gateway.end(key)
        writer.write(body[5:])
        assert (await reader.readline()).split()[1] == b"401"
        assert (subject.call.calls, subject.session.branches) == ([], [])
        writer.close()


async def test_large_requests_and_the_log_probs_of_long_answers_are_turned_into_text_beside_the_loop(monkeypatch):
    sizes = []

    async def noted(nbytes, work):
        sizes.append(nbytes)
        return work()

    monkeypatch.setattr(app, "aside", noted)
    async with served() as subject, subject.client() as client:
        answer = await client.chat.completions.create(model="m", messages=[user("a" * 500)], logprobs=True)
        assert sizes[0] > 500
        assert sizes[1] == DECODED_BYTES * answer.usage.completion_tokens


async def test_a_body_of_more_than_32_mib_is_refused():
    empty = len(json.dumps({"messages": [{"role": "robot", "content": ""}]}))
    async with served() as subject, subject.client(base_url=subject.policy.base_url) as client:
        for size, status in ((32 * 2**20, 400), (32 * 2**20 + 1, 413)):
            body = {"messages": [{"role": "robot", "content": "a" * (size - empty)}]}
            with pytest.raises(openai.APIStatusError) as caught:
                await client.post("/chat/completions", cast_to=object, content=json.dumps(body).encode())
            assert caught.value.status_code == status


async def test_the_65th_request_of_a_rollout_at_one_time_is_refused(monkeypatch):
    monkeypatch.setattr(app, "KEEP_ALIVE_S", 0.01)  # the calls count on while they are kept waiting
    async with served() as subject, subject.client() as client:
        subject.call.hold = asyncio.Event()
        texts = [f"{number}" for number in range(64)]
        asked = [asyncio.create_task(client.chat.completions.create(model="m", messages=[user(t)])) for t in texts]
        await until(lambda: len(subject.call.calls) == 64)
        await asyncio.sleep(0.05)
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(model="m", messages=[user("c")])
        subject.call.hold.set()
        await asyncio.gather(*asked[:-1])
        assert (await asked[-1]).choices[0].message.content == "1 2"
        with pytest.raises(openai.BadRequestError, match="64 branches"):
            await client.chat.completions.create(model="m", messages=[user("c")])


@pytest.mark.parametrize("text", ["ab", "<|begin_of_text|>ab"])
def test_a_text_that_begins_with_the_begin_token_has_it_once(text):
    """As NeMo #855 had it: a harness that writes the template itself sends a text that begins with it."""
    made = tokenizer(FAMILIES["llama3"])
    dialect = app.Dialect("m", 100, made)
    begin, *rest = dialect.tokens(text_request({"prompt": text}))
    assert made.convert_ids_to_tokens([begin]) == ["<|begin_of_text|>"]
    assert dialect.text(rest) == "ab"
    exact = dialect.tokens(text_request({"prompt": text, "add_special_tokens": False}))
    assert dialect.text(exact) == text


async def test_an_engine_that_died_is_said_once_and_the_rollout_fails_of_it():
    async with served() as subject, subject.client() as client:
        subject.call.error = EngineDied("replica 0: the engine died")
        with pytest.raises(openai.InternalServerError, match="the engine died") as caught:
            await client.chat.completions.create(model="m", messages=ASKED)
        assert caught.value.status_code == 503
        assert isinstance(subject.failed.result(), EngineDied)
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(model="m", messages=ASKED)


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
async def test_a_client_that_repeats_after_its_time_out_gets_the_answer_to_its_first_request(path):
    body = {"messages": ASKED, "prompt": "ab", "max_tokens": 9}
    async with served() as subject, subject.client(max_retries=3, timeout=0.3) as client:

        async def said(**options):
            answer = await client.post(f"/{path}", cast_to=object, body=body, options=options)
            (choice,) = answer["choices"]
            return choice["message"]["content"] if "message" in choice else choice["text"]

        subject.call.hold = asyncio.Event()
        asked = asyncio.create_task(said())
        await until(lambda: subject.gateway.joined)
        subject.call.hold.set()
        assert await asked == "1 2"
        assert subject.session.ways == {"first": 1}
        # Its answer was lost on the way: it is given again, as long as nothing followed.
        repeated = {"headers": {"x-stainless-retry-count": "1"}}
        before = subject.gateway.joined
        assert (await said(**repeated), subject.gateway.joined) == ("1 2", before + 1)
        assert subject.session.ways == {"first": 1}
        await said()
        assert subject.session.ways == {"first": 1, "root": 1}, "without that header it is a second sample"
        body["max_tokens"] = 8
        await said(**repeated)
        assert subject.session.ways == {"first": 1, "root": 2}, "it was never asked before"


async def test_a_request_that_says_that_it_is_repeated_joins_also_beside_a_live_one():
    async with served() as subject, subject.client() as client:
        subject.call.hold = asyncio.Event()
        asked = [asyncio.create_task(client.chat.completions.create(model="m", messages=ASKED))]
        await until(lambda: subject.call.calls)
        repeated = {"x-stainless-retry-count": "1"}
        asked.append(
            asyncio.create_task(client.chat.completions.create(model="m", messages=ASKED, extra_headers=repeated))
        )
        await until(lambda: subject.gateway.joined)
        subject.call.hold.set()
        assert len({answer.choices[0].message.content for answer in await asyncio.gather(*asked)}) == 1
        assert (subject.session.ways, len(subject.session.branches)) == ({"first": 1}, 1)


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
async def test_an_equal_request_joins_after_a_lost_connection_and_samples_beside_a_live_one(path):
    body = {"messages": ASKED, "prompt": "ab"}
    async with served() as subject, subject.client() as client:
        subject.call.hold = asyncio.Event()
        lost = asyncio.create_task(client.post(f"/{path}", cast_to=object, body=body))
        await until(lambda: len(subject.call.calls) == 1)
        lost.cancel()
        (only,) = subject.gateway._endpoints.values()
        await until(lambda: not any(asked.waiting for asked in only._asked.values()))
        asked = [asyncio.create_task(client.post(f"/{path}", cast_to=object, body=body))]
        await until(lambda: subject.gateway.joined == 1)
        asked.append(asyncio.create_task(client.post(f"/{path}", cast_to=object, body=body)))
        await until(lambda: len(subject.call.calls) == 2)
        subject.call.hold.set()
        await asyncio.gather(*asked)
        assert (len(subject.session.branches), subject.gateway.joined) == (2, 1)


async def test_a_turn_that_nobody_waits_for_is_given_up(monkeypatch):
    monkeypatch.setattr(endpoint, "REPEAT_WITHIN_S", 0.05)
    async with served() as subject, subject.client(timeout=0.3) as client:
        subject.call.hold = asyncio.Event()
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(model="m", messages=ASKED)
        await until(lambda: not subject.session.branches)
        assert not subject.failed.done()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_is_kept_waiting_by_signs_of_life(monkeypatch, stream):
    monkeypatch.setattr(app, "KEEP_ALIVE_S", 0.05)
    async with served() as subject, subject.client(timeout=0.5) as client:
        subject.call.hold = asyncio.Event()

        async def ask():
            answer = await client.chat.completions.create(model="m", messages=ASKED, stream=stream)
            return [chunk.choices[0].delta.content async for chunk in answer] if stream else answer

        asked = asyncio.create_task(ask())
        await asyncio.sleep(1.0)  # twice the time after which the client gives up without a sign
        subject.call.hold.set()
        answer = await asked
        if stream:
            assert answer == ["1 2", None]
        else:
            assert answer.choices[0].message.content == "1 2"
        assert subject.session.ways == {"first": 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_turn_that_fails_while_its_client_is_kept_waiting_is_an_error_there(monkeypatch, stream):
    monkeypatch.setattr(app, "KEEP_ALIVE_S", 0.02)
    async with served() as subject, subject.client() as client:
        subject.call.hold, subject.call.error = asyncio.Event(), EngineDied("the engine died")

        async def ask():
            answer = await client.chat.completions.create(model="m", messages=ASKED, stream=stream)
            return [chunk async for chunk in answer]

        asked = asyncio.create_task(ask())
        await until(lambda: subject.call.calls)
        await asyncio.sleep(0.1)
        subject.call.hold.set()
        with pytest.raises(openai.APIError if stream else openai.APIConnectionError):
            await asked


async def test_what_the_gateway_has_not_is_said():
    async with served() as subject, subject.client() as client:
        with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
            await client.embeddings.create(model="m", input="a")
        assert subject.gateway.requests["other", 404] == 1


class Calling:
    """Reads a call and a thought in every turn."""

    def message(self, turn):
        at = len(turn.before)
        function = {"name": turn.tools[0]["function"]["name"], "arguments": json.dumps({"at": at})}
        call = {"id": f"c{at}", "type": "function", "function": function}
        return {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]}


async def test_calls_of_tools_go_to_the_client_and_back_in_one_branch():
    look = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    async with served() as subject, subject.client() as client:
        subject.policy._reader = Calling()
        history = list(ASKED)
        for _ in range(3):
            answer = await client.chat.completions.create(model="m", messages=history, tools=[look])
            (choice,) = answer.choices
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
            (call,) = choice.message.tool_calls
            assert call.function.name == "look"
            back = choice.message.model_dump(exclude={"reasoning_content"}, exclude_none=True)
            history += [back, {"role": "tool", "content": "x", "tool_call_id": call.id}]
        assert subject.session.ways == {"first": 1, "extended": 2}
        events = [
            event
            async for event in await client.chat.completions.create(
                model="m", messages=history, tools=[look], stream=True
            )
        ]
        assert [c.function.name for e in events for c in (e.choices[0].delta.tool_calls or [])] == ["look"]
        assert events[-1].choices[0].finish_reason == "tool_calls"
