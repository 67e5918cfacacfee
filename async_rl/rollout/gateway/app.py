"""The HTTP of the gateway: who may ask, what a request says, and how its answer is given.

A turn takes as long as it takes, weight syncs included. A client that waits for it is kept waiting by white space,
which JSON may begin with, or by the comments of a stream.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, NamedTuple, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from async_rl.data.tokenizer import prompt_encoder
from async_rl.errors import RequestRefused
from async_rl.rollout.aside import DECODED_BYTES, aside
from async_rl.rollout.gateway.answers import Answer, Kind, error, event
from async_rl.rollout.gateway.endpoint import Asked, Endpoint, Key
from async_rl.rollout.gateway.requests import (
    BadRequest,
    Form,
    TextRequest,
    chat_request,
    json_object,
    text_request,
    tokens,
)
from async_rl.rollout.policy import Reply

MAX_BODY_BYTES = 32 * 2**20
"""The most that one request may have, which is held in memory: the text of a million tokens has about 4 MB."""

MAX_CALLS = 64
"""Requests of one rollout at one time. More are a loop that has gone wrong, at the cost of the other rollouts."""

KEEP_ALIVE_S = 15.0
"""Seconds of silence after which a client gets a sign of life; proxies give one up after 30 to 60."""

_T = TypeVar("_T")
_Handler = Callable[[Endpoint, Request, bytes], Awaitable[Response]]


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, code: str | None = None, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.field = status, code, field

    def response(self) -> Response:
        """Return the answer."""
        return _json(self.body(), self.status)

    def body(self) -> bytes:
        """Return the answer's body."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return error(str(self), type_=kind, code=self.code, field=self.field)


class Dialect(NamedTuple):
    """What the gateway tells of the model, and its tokenizer."""

    model: str
    max_model_len: int
    tokenizer: Any

    def tokens(self, asked: TextRequest) -> list[int]:
        """Return the tokens of a request's prompt, with one token that begins a sequence at most. Raises BadRequest."""
        if not isinstance(asked.prompt, str):
            return self.known(asked.prompt)
        if not asked.special_tokens:
            return list(self.tokenizer.encode(asked.prompt, add_special_tokens=False))
        return list(prompt_encoder(self.tokenizer.encode, self.tokenizer.convert_ids_to_tokens)(asked.prompt))

    def known(self, ids: list[int]) -> list[int]:
        """Return tokens that the tokenizer has. Raises BadRequest: an engine would fail of others."""
        if (most := max(ids)) >= len(self.tokenizer):
            raise BadRequest(None, f"there is no token {most}; the tokenizer has {len(self.tokenizer)}")
        return ids

    def text(self, ids: list[int]) -> str:
        """Return the text of tokens, special ones included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


class Application:
    """Answers the requests of every rollout that has an endpoint."""

    def __init__(self, find: Callable[[str], Endpoint | None], dialect: Dialect) -> None:
        """``find`` returns the endpoint that a key opens."""
        self._find = find
        self._dialect = dialect
        self.requests: Counter[tuple[str, int]] = Counter()
        self.ignored: Counter[str] = Counter()
        self.joined = 0
        self.app = Starlette(routes=self._routes(), exception_handlers={HTTPException: self._unknown})

    def _routes(self) -> list[Route]:
        routes: list[Route] = []
        for base in ("", "/r/{key}"):
            routes += [
                Route(f"{base}/v1/models", self._handled("models", self._models), methods=["GET"]),
                Route(f"{base}/v1/chat/completions", self._handled("chat", self._chat), methods=["POST"]),
                Route(f"{base}/v1/completions", self._handled("completions", self._completions), methods=["POST"]),
            ]
            for prefix in (base, f"{base}/v1"):  # vLLM's are not below v1, where a client's base address ends
                routes += [
                    Route(f"{prefix}/tokenize", self._handled("tokenize", self._tokenize), methods=["POST"]),
                    Route(f"{prefix}/detokenize", self._handled("detokenize", self._detokenize), methods=["POST"]),
                ]
        return routes

    async def _unknown(self, _request: Request, fault: Exception) -> Response:
        assert isinstance(fault, HTTPException)
        self.requests["other", fault.status_code] += 1
        known = "/v1/chat/completions, /v1/completions, /v1/models, /tokenize and /detokenize"
        return Refused(fault.status_code, f"the gateway has {known} alone").response()

    def _handled(self, name: str, handler: _Handler) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            try:
                endpoint = self._endpoint(request)
                if endpoint.calls >= MAX_CALLS:
                    why = f"the rollout has {MAX_CALLS} requests that are not answered yet"
                    raise Refused(429, why, "too_many_requests")
                with endpoint.calling():
                    response = await handler(endpoint, request, await _body(request))
            except Refused as refused:
                response = refused.response()
            except BadRequest as fault:
                response = Refused(400, str(fault), "invalid_request", fault.field).response()
            except ClientDisconnect:
                response = Response(status_code=499)  # goes nowhere
            self.requests[name, response.status_code] += 1
            return response

        return handle

    def _endpoint(self, request: Request) -> Endpoint:
        """Return the endpoint that a request's key opens: the one in its path, else the one in its header."""
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        key = request.path_params.get("key") or (sent.strip() if scheme.lower() == "bearer" else "")
        endpoint = self._find(key)
        if endpoint is None or endpoint.failed.done():
            raise Refused(401, "the key is unknown, or its rollout has ended", "invalid_api_key")
        return endpoint

    async def _models(self, _endpoint: Endpoint, _request: Request, _data: bytes) -> Response:
        name = self._dialect.model
        model = {"id": name, "object": "model", "created": 0, "owned_by": "async_rl", "root": name}
        return _plain({"object": "list", "data": [model | {"max_model_len": self._dialect.max_model_len}]})

    async def _tokenize(self, endpoint: Endpoint, _request: Request, data: bytes) -> Response:
        body = json_object(data)
        if "messages" in body:
            asked = chat_request(body)
            ids = await _refusing(endpoint.policy.tokenize(asked.messages, asked.tools))
        else:
            ids = self._dialect.tokens(text_request(body))
        limit = self._dialect.max_model_len
        return _plain({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": None})

    async def _detokenize(self, _endpoint: Endpoint, _request: Request, data: bytes) -> Response:
        ids = tokens(json_object(data).get("tokens"), "tokens")
        return _plain({"prompt": self._dialect.text(self._dialect.known(ids))})

    async def _chat(self, endpoint: Endpoint, request: Request, data: bytes) -> Response:
        asked = await aside(len(data), lambda: chat_request(json_object(data)))
        how: dict[str, Any] = {"max_tokens": asked.form.max_tokens, "stop": asked.form.stop}
        ask = partial(endpoint.policy.chat, asked.messages, asked.tools, **how)
        again = partial(endpoint.policy.repeated, asked.messages, asked.tools, **how)
        return await self._turn(endpoint, request, "chat.completion", data, asked.form, ask, again)

    async def _completions(self, endpoint: Endpoint, request: Request, data: bytes) -> Response:
        asked = await aside(len(data), lambda: text_request(json_object(data)))
        ids = self._dialect.tokens(asked)
        how: dict[str, Any] = {"max_tokens": asked.form.max_tokens, "stop": asked.form.stop}
        ask, again = partial(endpoint.policy.complete, ids, **how), partial(endpoint.policy.completed, ids, **how)
        return await self._turn(endpoint, request, "text_completion", data, asked.form, ask, again)

    async def _turn(
        self,
        endpoint: Endpoint,
        request: Request,
        kind: Kind,
        data: bytes,
        form: Form,
        ask: Callable[[], Coroutine[Any, Any, Reply]],
        again: Callable[[], Reply | None],
    ) -> Response:
        """Answer with a turn of the policy, which begins with ``ask`` unless the request repeats one."""
        if endpoint.closed:  # while the request was read
            raise _ended()
        self.ignored.update(form.ignored)
        key = kind, data
        repeats = request.headers.get("x-stainless-retry-count", "0") != "0"
        asked = endpoint.known(key, repeats=repeats)
        self.joined += asked is not None
        if asked is None and repeats and (reply := again()) is not None:
            self.joined += 1
            return await self._answered(kind, form, reply)
        asked = asked or endpoint.ask(key, ask)
        answered = handed_over = False
        asked.waiting += 1
        try:
            if await _done_or_gone(request, asked.turn):
                reply = await self._reply(asked)
                answered = True
                return await self._answered(kind, form, reply)
            handed_over = True
            asked.waiting += 1  # from here on, for the stream
            return StreamingResponse(
                self._kept_waiting(endpoint, key, asked, kind, form),
                media_type="text/event-stream" if form.stream else "application/json",
            )
        finally:
            if handed_over:
                asked.waiting -= 1
            else:
                endpoint.leave(key, asked, answered=answered)

    async def _kept_waiting(
        self, endpoint: Endpoint, key: Key, asked: Asked, kind: Kind, form: Form
    ) -> AsyncIterator[bytes]:
        """Give the answer once it is there, and signs of life until then."""
        answered = False
        with endpoint.calling():
            try:
                while not asked.turn.done():
                    yield b": waiting\n\n" if form.stream else b" "
                    await asyncio.wait({asked.turn}, timeout=KEEP_ALIVE_S)
                try:
                    answer = await self._answer(kind, form, await self._reply(asked))
                except Refused as refused:
                    if not form.stream:
                        raise  # The status was sent: a connection that breaks off is all that can tell.
                    yield event(refused.body())
                    return
                answered = True
                if not form.stream:
                    yield answer.body()
                    return
                for each in answer.events():
                    yield each
            finally:
                endpoint.leave(key, asked, answered=answered)

    async def _reply(self, asked: Asked) -> Reply:
        """Return the reply of a turn that has ended. Raises Refused."""
        if asked.turn.cancelled():
            raise _ended()
        return await _refusing(asked.turn)

    async def _answered(self, kind: Kind, form: Form, reply: Reply) -> Response:
        answer = await self._answer(kind, form, reply)
        if form.stream:
            return Response(b"".join(answer.events()), media_type="text/event-stream")
        return _json(answer.body())

    async def _answer(self, kind: Kind, form: Form, reply: Reply) -> Answer:
        ids = reply.token_ids.tolist() if form.logprobs else []
        pieces = await aside(DECODED_BYTES * len(ids), lambda: [self._dialect.text([token]) for token in ids])
        name = f"{'chatcmpl' if kind == 'chat.completion' else 'cmpl'}-{secrets.token_hex(12)}"
        return Answer(kind, name, int(time.time()), self._dialect.model, reply, pieces, form)


def _ended() -> Refused:
    return Refused(401, "the rollout has ended", "invalid_api_key")


async def _body(request: Request) -> bytes:
    """Return the body of a request. Raises Refused, ClientDisconnect."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise Refused(413, f"the request has more than {MAX_BODY_BYTES // 2**20} MiB", "request_too_large")
    return bytes(data)


async def _done_or_gone(request: Request, turn: asyncio.Task[Reply]) -> bool:
    """Return whether a turn ends before its client needs a sign of life. Raises ClientDisconnect."""
    gone = asyncio.ensure_future(request.receive())  # After the body, only the end of the connection comes.
    try:
        await asyncio.wait({turn, gone}, timeout=KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
        if not turn.done() and gone.done():
            raise ClientDisconnect
        return turn.done()
    finally:
        gone.cancel()


async def _refusing(reply: Awaitable[_T]) -> _T:
    """Return what a policy replies. Raises Refused as HTTP has it."""
    try:
        return await reply
    except RequestRefused as refused:
        raise Refused(400, refused.why, refused.code) from None
    except Exception as failure:
        # The rollout fails of it as well, and its key is dead.
        raise Refused(503, f"{type(failure).__name__}: {failure}", "rollout_failed") from failure


def _plain(value: Any) -> Response:
    return _json(json.dumps(value).encode())


def _json(data: bytes, status: int = 200) -> Response:
    return Response(data, status, media_type="application/json")
