"""What the gateway answers in the dialect of OpenAI, as JSON or as the events of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from async_rl.rollout.gateway.requests import Form
from async_rl.rollout.policy import Reply

Kind = Literal["chat.completion", "text_completion"]


@dataclass(frozen=True, slots=True)
class Answer:
    """A turn of the policy as the answer to a request."""

    kind: Kind
    id: str
    created: int
    """Seconds since 1970."""
    model: str
    reply: Reply
    pieces: list[str]
    """The text of each token; empty unless log-probs are asked for."""
    form: Form

    def body(self) -> bytes:
        """Return it whole."""
        said = {"message": self._message} if self.kind == "chat.completion" else {"text": self._text}
        return _json(self._head(self.kind) | {"choices": [self._choice(said, ends=True)], "usage": self._usage})

    def events(self) -> Iterator[bytes]:
        """Return it as a stream: one event with all that was said, one with why it ended, and the numbers of tokens."""
        kind = "chat.completion.chunk" if self.kind == "chat.completion" else self.kind
        said: dict[str, Any] = {"text": self._text}
        nothing: dict[str, Any] = {"text": ""}
        if self.kind == "chat.completion":
            said, nothing = {"delta": self._delta()}, {"delta": {}}
        head = self._head(kind) | ({"usage": None} if self.form.with_usage else {})
        yield event(_json(head | {"choices": [self._choice(said, ends=False)]}))
        last = {"index": 0, "finish_reason": self._finish_reason, "logprobs": None, **nothing}
        yield event(_json(head | {"choices": [last]}))
        if self.form.with_usage:
            yield event(_json(head | {"choices": [], "usage": self._usage}))
        yield event(b"[DONE]")

    @property
    def _message(self) -> dict[str, Any]:
        calls = [_call(call, self.id, at) for at, call in enumerate(self.reply.message.get("tool_calls") or [])]
        content = self.reply.message.get("content")
        message = self.reply.message | {"role": "assistant", "content": content or None if calls else content or ""}
        return message | {"tool_calls": calls} if calls else message

    def _delta(self) -> dict[str, Any]:
        message = self._message
        if "tool_calls" not in message:
            return message
        return message | {"tool_calls": [call | {"index": at} for at, call in enumerate(message["tool_calls"])]}

    @property
    def _text(self) -> str:
        return str(self.reply.message.get("content") or "")

    @property
    def _finish_reason(self) -> str:
        return "tool_calls" if self.reply.message.get("tool_calls") else self.reply.finish_reason

    def _choice(self, said: dict[str, Any], *, ends: bool) -> dict[str, Any]:
        choice = {"index": 0, **said, "finish_reason": self._finish_reason if ends else None, "logprobs": None}
        if self.form.logprobs:
            choice["logprobs"] = self._logprobs()
        if self.form.token_ids:
            choice["token_ids"] = self.reply.token_ids.tolist()
        return choice

    def _logprobs(self) -> dict[str, Any]:
        values = self.reply.logprobs.tolist()
        if self.kind == "text_completion":
            starts = [0]
            for piece in self.pieces[:-1]:
                starts.append(starts[-1] + len(piece))
            return {"tokens": self.pieces, "token_logprobs": values, "top_logprobs": None, "text_offset": starts}
        pairs = zip(self.pieces, values, strict=True)
        content = [{"token": t, "logprob": v, "bytes": list(t.encode()), "top_logprobs": []} for t, v in pairs]
        return {"content": content, "refusal": None}

    @property
    def _usage(self) -> dict[str, int]:
        before, sampled = self.reply.context_tokens, len(self.reply.token_ids)
        return {"prompt_tokens": before, "completion_tokens": sampled, "total_tokens": before + sampled}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def error(message: str, *, type_: str, code: str | None, field: str | None = None) -> bytes:
    """Return the body of a refusal."""
    return _json({"error": {"message": message, "type": type_, "param": field, "code": code}})


def event(data: bytes) -> bytes:
    """Return one event of a stream."""
    return b"data: " + data + b"\n\n"


def _call(call: dict[str, Any], answer: str, at: int) -> dict[str, Any]:
    """Return a tool call with an id, and with its arguments as text."""
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {
        "id": call.get("id") or f"call_{answer}_{at}",
        "type": "function",
        "function": {"name": function.get("name"), "arguments": text},
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
