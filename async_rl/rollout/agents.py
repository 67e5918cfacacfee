"""Rollouts of a user's own, rollout.agent.function: a program that asks the policy as often as it likes.

Makes a session and a policy for each, calls the program on the worker's event loop, and makes a rollout record of what
it returns. Knows sessions and engine calls; neither groups nor the queue.
"""

from __future__ import annotations

import functools
import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from async_rl.config.functions import load_function
from async_rl.config.schema import RunConfig
from async_rl.data.chat_turns import ChatTurns
from async_rl.data.messages import Message
from async_rl.data.reading import chat_turns
from async_rl.errors import AgentFailure, AsyncRLError, RequestRefused, RewardNotApplicable
from async_rl.rollout.aside import aside
from async_rl.rollout.calls import EngineCalls, routing_bytes
from async_rl.rollout.policy import Policy
from async_rl.rollout.responses import COST_THEIR_GROUP, Responses
from async_rl.rollout.rewards.score import score_of
from async_rl.rollout.session import Limits, Session
from async_rl.types import Prompt, RolloutEnd, RolloutRecord

SETTING = "rollout.agent.function"
ARGUMENTS = ("prompt", "policy", "context")


@dataclass(frozen=True, slots=True)
class Context:
    """What an agent may know of its rollout beside the prompt."""

    rollout_id: str
    """The id "<group_id>/<index>", different for each attempt at a prompt."""
    seed: int
    """A number below 2**32 that is the same whenever this rollout is made again."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an agent returns. A number or a mapping alone stands for one with this reward."""

    reward: float | Mapping[str, Any] | None
    """A finite number, or a mapping with ``reward`` or ``score``, whose other numbers are metrics; None for a rollout
    that has no reward and is left out of its group."""
    end: RolloutEnd | None = None
    """How it ended; None for truncated if a request was refused at a limit or the last turn was cut off, else done."""
    trainable: bool = True
    """Whether the rollout is compared with others of its group, and trained."""


def load_agent(name: str) -> Callable[..., Any]:
    """Import the function that rollout.agent.function names. Raises AgentFailure."""
    return load_function(SETTING, name, ARGUMENTS, AgentFailure)


class Agents:
    """Makes the rollouts of one worker."""

    def __init__(self, config: RunConfig, responses: Responses, calls: EngineCalls, tokenizer: Any) -> None:
        """Load the function that the settings name. Raises AgentFailure."""
        assert config.rollout.agent.function is not None
        self._config = config
        self._name = config.rollout.agent.function
        self._function = load_agent(self._name)
        self._responses = responses
        self._calls = calls
        self._tokenizer = tokenizer
        self._turns = functools.cache(lambda: chat_turns(config))  # loaded by the first agent that sends messages

    async def rollout(self, prompt: Prompt, rollout_id: str) -> RolloutRecord:
        """Make one rollout. Raises AgentFailure, RewardNotApplicable, and what an engine call raises."""
        session = self._session(prompt, rollout_id)
        policy = Policy(
            session,
            lambda *call: self._calls.sample(prompt, *call),
            chat=_RowChat(self._turns, prompt),
            encode=lambda text: list(self._tokenizer.encode(text, add_special_tokens=False)),
            decode=lambda ids: str(self._tokenizer.decode(ids, skip_special_tokens=True)),
        )
        try:
            outcome = await self._outcome(prompt, policy, Context(rollout_id, zlib.crc32(rollout_id.encode())))
        finally:
            session.close()  # what the agent has left running asks nothing more
        nbytes = sum(routing_bytes(branch.partial.routed_experts) for branch in session.branches)
        return await aside(nbytes, lambda: self._record(prompt, session, outcome))

    def _session(self, prompt: Prompt, rollout_id: str) -> Session:
        settings, terms = self._config.rollout.agent, self._responses.terms(prompt)
        limits = Limits(
            # As many as the engine has room for.
            context_tokens=self._config.data.max_prompt_tokens + self._config.longest_response,
            response_tokens=terms.max_response_tokens,
            sampled_tokens=settings.max_sampled_tokens,
            turns=settings.max_turns,
            branches=settings.max_branches,
        )
        return Session(rollout_id, functools.partial(self._responses.begin_tokens, terms=terms), limits)

    async def _outcome(self, prompt: Prompt, policy: Policy, context: Context) -> Outcome:
        try:
            found = self._function(prompt, policy, context)
            if not inspect.isawaitable(found):
                raise self._failure(prompt, "is not async; define it with async def, and await the policy")
            found = await found
        except COST_THEIR_GROUP:
            raise
        except RequestRefused as error:
            raise self._failure(
                prompt, f"a request was refused ({error}); catch RequestRefused, and return what the rollout is worth"
            ) from error
        except Exception as error:
            raise self._failure(prompt, f"raised {type(error).__name__}: {error}") from error
        return found if isinstance(found, Outcome) else Outcome(found)

    def _record(self, prompt: Prompt, session: Session, outcome: Outcome) -> RolloutRecord:
        cut = session.truncated or session.cut_off
        try:
            score = score_of(outcome.reward)
        except ValueError as error:
            raise self._failure(prompt, f"{error}") from None
        if score is None:
            raise RewardNotApplicable(f"{SETTING} {self._name}: no reward for prompt {prompt.prompt_id}")
        return RolloutRecord(
            rollout_id=session.rollout_id,
            reward=score.reward,
            trajectories=session.trajectories(),
            end=outcome.end or ("truncated" if cut else "done"),
            reward_parts=score.parts,
            trainable=outcome.trainable,
        )

    def _failure(self, prompt: Prompt, what: str) -> AsyncRLError:
        where = f"prompt {prompt.prompt_id} (dataset row {prompt.row})"
        return AgentFailure(f"{SETTING} {self._name}, {where}: {what}")


class _RowChat:
    """Renders what an agent sends for one row; the tokenizer for it is loaded when it is first needed."""

    def __init__(self, turns: Callable[[], ChatTurns], prompt: Prompt) -> None:
        self._turns, self._prompt = turns, prompt

    def prompt(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> list[int]:
        return self._turns().for_row(self._prompt.fields).prompt(messages, tools)

    def after(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> list[int]:
        return self._turns().for_row(self._prompt.fields).after(messages, tools)
