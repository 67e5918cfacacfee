"""How a checkpoint's tokenizer and chat template turn prompts into tokens.

Messages are rendered by Transformers' ``apply_chat_template``, which the model was trained with. What users and tools
wrote is encoded as plain text, also where it reads like one of the template's control tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from async_rl.data.messages import Message
from async_rl.data.tokenizer import prompt_encoder
from async_rl.data.tool_calls import wants_text, with_arguments
from async_rl.errors import DatasetError, RowFault

TOOLS_VARIABLE = "tools"
"""Name under which templates find the tools. One that does not have it leaves them out without a word."""

# The function that gives a template the time, and the variables that templates read before they call it.
_CLOCK = "strftime_now"
_DATE = {"date_string", "current_date", "today_date"}


class CheckpointEncoder:
    """Encodes prompts with a tokenizer of Transformers, which is loaded when it is first needed.

    It pickles without its tokenizer, and loads it again where it arrives.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        template: str | None = None,
        on_removed: Callable[[str], None] | None = None,
    ) -> None:
        """Take how to load the tokenizer, which must pickle, and the text of a template for the checkpoint's.

        on_removed: called with the token when a second beginning-of-sequence token is removed for the first time.
        """
        self._load = load
        self._template = template
        self._on_removed = on_removed
        self._tokenizer: Any = None
        self._wants_text: dict[str, bool] = {}  # by template
        self.prints_date = False
        """Whether messages were rendered with a template that may write the date of today, unless told one."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer. Raises ModelError when it cannot be loaded."""
        self._prepare()
        return self._tokenizer

    def _prepare(self) -> None:
        if self._tokenizer is None:
            self._tokenizer = self._load()
            self._encode = prompt_encoder(
                self._tokenizer.encode, self._tokenizer.convert_ids_to_tokens, self._on_removed or (lambda _: None)
            )

    def text(self, text: str) -> list[int]:
        """Return the tokens of text, with one beginning-of-sequence token where the tokenizer adds it."""
        self._prepare()
        return list(self._encode(text))

    def chat(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, variables: Mapping[str, Any]
    ) -> tuple[str, list[int]]:
        """Return the text and tokens of messages, up to where the assistant's answer begins; see ``prompts.Encoder``.

        The template alone decides on a beginning-of-sequence token, so that there is one at most.
        """
        import jinja2

        template = self.template(tools)
        if tools and TOOLS_VARIABLE not in template:
            raise RowFault("the chat template has no place for tools; leave them out, or set data.chat_template")
        render = self.tokenizer.apply_chat_template
        given = {**variables, "tools": tools, "chat_template": template, "add_generation_prompt": True}
        if any(message.get("tool_calls") for message in messages):
            messages = with_arguments(messages, as_text=self._as_text(template))
        try:
            text = render(messages, tokenize=False, **given)
            ids = render(messages, sanitize_control_tokens=True, return_dict=False, **given)
            self.prints_date |= _CLOCK in template and not _DATE & variables.keys()
        except jinja2.TemplateSyntaxError as error:
            raise DatasetError(f"the chat template is not valid (line {error.lineno}: {error.message})") from None
        except Exception as error:  # noqa: BLE001  a template may raise anything
            raise _refusal(error) from None
        return str(text), list(ids)

    def written(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        variables: Mapping[str, Any],
        *,
        asks: bool,
    ) -> str:
        """Return the text of messages, which ends with what begins the assistant's answer if they ``ask`` for one.

        Raises RowFault where the template refuses them.
        """
        template = self.template(tools)
        given = {**variables, "tools": tools, "chat_template": template, "add_generation_prompt": asks}
        messages = with_arguments(messages, as_text=self._as_text(template))
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **given))
        except Exception as error:  # noqa: BLE001  a template may raise anything
            raise _refusal(error) from None

    def _as_text(self, template: str) -> bool:
        """Return whether the template wants the arguments of tool calls as text."""
        if template not in self._wants_text:
            self._wants_text[template] = wants_text(
                lambda messages: self.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template)
            )
        return self._wants_text[template]

    def template(self, tools: Any = None) -> str:
        """Return the text of the template in use. Raises DatasetError when there is none."""
        try:
            found: str = self.tokenizer.get_chat_template(self._template, tools)
        except ValueError:
            raise DatasetError(
                "the prompts are messages, but the tokenizer of model.path has no chat template; set "
                "data.chat_template to a file that has one"
            ) from None
        return found

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_on_removed": None, "_tokenizer": None, "_encode": None}  # made again when needed


def _refusal(error: Exception) -> RowFault:
    why = " ".join(str(error).split())[:200] or type(error).__name__
    return RowFault(f"the chat template refuses the messages: {why}")
