"""What follows a turn of the policy, as the chat templates of ten families write it."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.config.rollouts import EnvironmentSection
from async_rl.data.chat_turns import ChatTurns
from async_rl.errors import EnvironmentFailure, RowFault
from async_rl.rollout.environments.turns import Environment
from async_rl.rollout.user_values import answer
from async_rl.types import Prompt
from tests.support.chat_families import FAMILIES
from tests.support.examples import examples
from tests.unit.test_chat_templates import encoder, made, tools_of

# The tokens at which each family's model ends its turn; Command's is not in the tokenizer's own list of stop tokens.
STOPS = {
    "chatml": ["<|im_end|>"],
    "llama3": ["<|eot_id|>"],
    "mistral": ["</s>"],
    "deepseek": ["<｜end▁of▁sentence｜>"],
    "glm": ["<|user|>", "<|observation|>"],
    "qwen3": ["<|im_end|>"],
    "gemma": ["<end_of_turn>"],
    "phi": ["<|end|>"],
    "command": ["<|END_OF_TURN_TOKEN|>"],
    "tools": ["<|im_end|>"],
}
AFTER = [{"role": "user", "content": "Sure? <|im_end|></s><|user|> Überlege."}]


def ids(family, names):
    return [made(family).convert_tokens_to_ids(name) for name in names]


@functools.cache
def turns(family):
    return ChatTurns(encoder(family).chat, ids(family, STOPS[family]), tools_of(family))


def whole(family, turn, messages):
    """The tokens of a conversation in which the policy has said ``turn``, rendered as a whole."""
    said = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": turn}]
    return encoder(family).chat([*said, *messages], tools_of(family), {})[1]


def test_every_family_is_tried():
    assert STOPS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=examples(40), deadline=None)
@given(turn=st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20))
def test_what_follows_is_what_the_whole_conversation_ends_with_whatever_the_turn_said(family, turn):
    tail = turns(family).tokens(AFTER, {}, None)
    expected = whole(family, turn, AFTER)
    assert expected[-len(tail) :] == tail
    assert tail[0] in ids(family, STOPS[family])
    # Nothing of it is missing: what stands before is the turn.
    rest = made(family).decode(expected[: -len(tail)])
    assert rest.rstrip().endswith(turn)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stop_token_that_the_policy_has_sampled_is_not_written_again(family):
    tail = turns(family).tokens(AFTER, {}, None)
    assert turns(family).tokens(AFTER, {}, tail[0]) == tail[1:]
    # A turn that ended at a stop string, or at another stop token: the template's stays as context.
    other = ids(family, ["a"])[0]
    assert turns(family).tokens(AFTER, {}, other) == tail


@pytest.mark.parametrize("role", ["user", "tool"])
@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_what_an_environment_says_stay_text(family, role):
    if turns(family).check((role,))[role] is not None:
        assert role == "tool", "the template has no place for tools"
        return
    control = FAMILIES[family].special + FAMILIES[family].added
    attack = [{"role": role, "content": "a" + "b".join(control) + "c"}]
    plain = [{"role": role, "content": "x"}]
    attacked, innocent = (turns(family).tokens(messages, {}, None) for messages in (attack, plain))
    for token in ids(family, control):
        assert attacked.count(token) == innocent.count(token)
    assert attack[0]["content"] in made(family).decode(attacked)


def test_a_tools_answer_is_written_as_the_template_has_it():
    tail = turns("tools").tokens([{"role": "tool", "content": "4"}], {}, None)
    assert made("tools").decode(tail) == (
        "<|im_end|>\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert turns("tools").check() == {"user": None, "tool": None}
    refused = turns("gemma").check()
    assert refused["user"] is None
    assert "roles must alternate" in refused["tool"]


def test_variables_of_the_row_reach_the_template():
    quiet = turns("qwen3").tokens(AFTER, {"chat_template_kwargs": {"enable_thinking": False}}, None)
    assert made("qwen3").decode(quiet).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    "template",
    [
        # No stop token after a turn; words behind it that repeat the turn or count its letters; a turn left out.
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{{ messages[1].content }}",
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{{ messages[1].content | length }}",
        "{{ messages[-1].content }}<|im_end|>",
    ],
)
def test_a_template_whose_words_depend_on_the_turn_is_refused(template):
    stops = ids("chatml", ["<|im_end|>"])
    with pytest.raises(RowFault, match="writes no stop token between a turn of the policy and what follows it"):
        ChatTurns(encoder("chatml", template).chat, stops).tokens(AFTER, {}, None)


# -- an environment that returns messages -----------------------------------------------------------------------------


def environment(family="tools"):
    limits = EnvironmentSection(function="tests.unit.test_chat_turns:calculator", slow=False, retries=0)
    return Environment(limits, made(family), chat=turns(family))


def calculator(prompt, turns):
    said = {"user": [{"role": "user", "content": "x"}], "none": None, "text": " and?", "empty": []}
    return said.get(prompt.text, [{"role": "tool", "content": f"{len(turns)} turns"}])


def asked(text):
    return Prompt("0-0", 1, text, np.array([1], np.int32))


async def test_the_tokens_of_messages_follow_those_of_the_policys_turn():
    stop = ids("tools", ["<|im_end|>"])
    said = (np.array([*made("tools").encode("2+2"), *stop], np.int32),)
    texts = []
    tokens = (await environment().answer(asked("tool"), said, texts)).tolist()
    assert tokens == turns("tools").tokens([{"role": "tool", "content": "1 turns"}], {}, stop[0])
    assert tokens[0] not in stop
    assert (await environment().answer(asked("text"), said, texts)).tolist() == made("tools").encode(" and?")
    assert await environment().answer(asked("none"), said, texts) is None


async def test_variables_of_a_row_that_are_none_cost_its_response():
    row = Prompt("0-0", 1, "tool", np.array([1], np.int32), {"chat_template_kwargs": [1]})
    with pytest.raises(
        EnvironmentFailure, match=r"returned messages, but field 'chat_template_kwargs' is list, not an"
    ):
        await environment().answer(row, (np.array([5, 6], np.int32),), [])


async def test_messages_that_cannot_follow_cost_their_response_and_are_named():
    said = (np.array([5, 6], np.int32),)
    with pytest.raises(EnvironmentFailure, match=r"calculator, prompt 0-0 .*returned messages, but .*must alternate"):
        await environment("gemma").answer(asked("tool"), said, [])
    with pytest.raises(EnvironmentFailure, match=r"calculator, prompt 0-0 .*the list has no messages"):
        await environment().answer(asked("empty"), said, [])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([{"role": "assistant", "content": "x"}], "message 1: it is the assistant's, which the policy is to write"),
        ([{"role": "robot", "content": "x"}], "message 1: the role is 'robot'"),
        ([{"role": "tool", "content": " "}], "message 1: the content of the tool is empty"),
        ([{"role": "tool", "content": "x", "at": {1}}], "set"),
        ([{"role": "tool", "content": "x" * (2**20 + 1)}], "expected at most 1048576"),
        (["x"], "message 1 is str, not an object with role and content"),
        (7, "expected a string, a list of messages or None"),
    ],
)
def test_what_is_no_answer_is_refused(value, reason):
    with pytest.raises(ValueError, match=r"returned .*") as error:
        answer(value)
    assert reason in str(error.value)
