"""How what follows a turn of the policy becomes tokens, without a look at that turn.

Rendering the whole conversation again would turn what the policy sampled into text and back, which can give other
tokens than were sampled. So a stand-in takes the place of its turn: what the template writes after it, from its stop
token on, is what follows every turn. Two stand-ins must lead to the same tokens, or the template is refused.

Pure: it knows ``messages``, ``prompts`` and ``errors``; how messages become tokens is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from async_rl.data.messages import Message
from async_rl.data.prompts import template_inputs
from async_rl.errors import RowFault

Render = Callable[[list[Message], list[dict[str, Any]] | None, Mapping[str, Any]], tuple[str, list[int]]]
"""``Encoder.chat``: (messages, tools, variables) -> text and tokens, up to where the assistant's answer begins."""

Write = Callable[..., str]
"""``CheckpointEncoder.written``."""

_QUESTION: Message = {"role": "user", "content": "u"}
# They end differently, so that what is equal after them is the template's.
_STAND_INS = ("One", "Two!")


class ChatTurns:
    """Renders messages that follow a turn of the policy."""

    def __init__(
        self,
        render: Render,
        stop_token_ids: Collection[int],
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        write: Write | None = None,
    ) -> None:
        """Take ``CheckpointEncoder``'s ``chat`` and ``written``, and what they get where a row says nothing else."""
        self._render = render
        self._write = write
        self._stop_token_ids = frozenset(stop_token_ids)
        self._tools = tools
        self._template_kwargs = dict(template_kwargs or {})

    def tokens(self, messages: Sequence[Message], fields: Mapping[str, Any], last: int | None) -> list[int]:
        """Return the tokens from the end of a turn of the policy to where its next turn begins.

        ``messages`` follow the turn, whose ``last`` token it was: if that is the stop token that the template would
        write, it is not written again. ``fields`` are those of the row. Raises RowFault when the template refuses the
        messages, or where they do not follow every turn alike.
        """
        after = self.after(messages, *template_inputs(fields, self._tools, self._template_kwargs))
        return after[after[0] == last :]

    def after(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, variables: Mapping[str, Any]
    ) -> list[int]:
        """Return the tokens from the template's stop token after a turn of the policy to where its next turn begins.

        Raises RowFault as ``tokens`` does.
        """
        one, two = (
            self._render([_QUESTION, {"role": "assistant", "content": turn}, *messages], tools, variables)[1]
            for turn in _STAND_INS
        )
        pairs = zip(reversed(one), reversed(two), strict=False)
        after = one[len(one) - next((n for n, (a, b) in enumerate(pairs) if a != b), 0) :]
        start = next((at for at, token in enumerate(after) if token in self._stop_token_ids), None)
        if start is None:
            raise RowFault(
                "the chat template writes no stop token between a turn of the policy and what follows it, or what "
                "follows depends on the turn; return text, which is appended as it stands"
            )
        return after[start:]

    def for_row(self, fields: Mapping[str, Any]) -> RowChat:
        """Return what renders the requests of an agent for a row, with the row's variables. Raises RowFault."""
        variables = template_inputs(fields, None, self._template_kwargs)[1]
        return RowChat(self._render, self.after, variables, self._write)

    def check(self, roles: Sequence[str] = ("user", "tool")) -> dict[str, str | None]:
        """Return for each role why a message of it cannot follow a turn; None where it can."""
        found: dict[str, str | None] = {}
        for role in roles:
            try:
                self.tokens([{"role": role, "content": "x"}], {}, None)
            except RowFault as fault:
                found[role] = str(fault)
            else:
                found[role] = None
        return found


class RowChat(NamedTuple):
    """Renders what an agent asks, with the tools that it names itself. See ``ChatTurns`` for what is raised."""

    render: Render
    rest: Callable[[Sequence[Message], list[dict[str, Any]] | None, Mapping[str, Any]], list[int]]
    variables: Mapping[str, Any]
    write: Write | None = None

    def prompt(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> list[int]:
        """Return the tokens of a whole conversation, up to where the policy's turn begins."""
        return self.render(list(messages), tools, self.variables)[1]

    def after(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> list[int]:
        """Return the tokens of messages that follow a turn of the policy, from the template's stop token on."""
        return self.rest(messages, tools, self.variables)

    def written(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, *, asks: bool) -> str:
        """Return messages as text, with the beginning of the policy's turn behind them if they ``ask`` for one."""
        assert self.write is not None, "nothing writes text"
        return self.write(messages, tools, self.variables, asks=asks)
